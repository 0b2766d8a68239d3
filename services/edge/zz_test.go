package edge
import ("testing";"time";"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest";"fmt")
func TestZZBench(t *testing.T){
 nc := natstest.Connect(t, natstest.Start(t))
 r, err := Bench(t.Context(), nc, BenchOptions{Keys: 70000, Round: time.Second, Clients: 32, Spool: t.TempDir(), Say: func(string, ...any){}})
 fmt.Printf("%+v %v\n", r, err)
}
