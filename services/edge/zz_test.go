package edge
import ("testing";"time";"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest";"fmt";"syscall";"net";"net/http";"context";"github.com/nats-io/nats.go/jetstream";"github.com/latchkey-dev/latchkey/services/internal/bus")
func cpu() float64 { var r syscall.Rusage; syscall.Getrusage(0,&r); return float64(r.Utime.Nano()+r.Stime.Nano())/1e3 }
func TestZZBench(t *testing.T){
 nc := natstest.Connect(t, natstest.Start(t))
 o := BenchOptions{Keys: 70000, Round: time.Second, Clients: 32, Spool: t.TempDir(), Say: func(string, ...any){}}
 js,_ := jetstream.New(nc); bus.Ensure(t.Context(), js, bus.Config{})
 secrets, _ := publishSamples(t.Context(), js, o.Keys)
 var rep BenchReport
 s, stop, err := benchStart(t.Context(), nc, o, &rep)
 if err != nil { t.Fatal(err) }
 bare, _ := net.Listen("tcp", "127.0.0.1:0")
 go (&http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200) })}).Serve(bare)
 for range 4 {
  for _, a := range []string{bare.Addr().String(), s.Addr()} {
   c0 := cpu(); r, err := load(context.Background(), a, secrets, o); c1 := cpu()
   fmt.Printf("%s %.0f/s cpu %.2f us/req %v   ", a, r, (c1-c0)/r, err)
  }
  fmt.Println()
 }
 stop()
}
