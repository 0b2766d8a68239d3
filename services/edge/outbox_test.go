package edge

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/latchkey-dev/latchkey/pkg/usage"
	schema "github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// server is a NATS server that can go away and come back at the same address
// with the same data.
type server struct {
	t    testing.TB
	dir  string
	addr string
	srv  *natsd.Server
}

func newServer(t testing.TB) *server {
	t.Helper()
	s := &server{t: t, dir: t.TempDir(), addr: "127.0.0.1:0"}
	s.start()
	s.addr = s.srv.Addr()
	t.Cleanup(func() { s.srv.Shutdown() })
	_, js := s.connect()
	if err := bus.Ensure(t.Context(), js, bus.Config{Partitions: 4}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) start() {
	s.t.Helper()
	srv, err := natsd.Start(s.t.Context(), natsd.Options{DataDir: s.dir, Addr: s.addr, Sync: time.Minute})
	if err != nil {
		s.t.Fatal(err)
	}
	s.srv = srv
}

func (s *server) connect() (*nats.Conn, jetstream.JetStream) {
	s.t.Helper()
	nc, err := bus.Connect(s.srv.ClientURL(), s.t.Name(), nats.ReconnectWait(10*time.Millisecond))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		s.t.Fatal(err)
	}
	return nc, js
}

func testOutbox(t testing.TB, nc *nats.Conn, change func(*outboxOptions)) (*outbox, *metrics) {
	t.Helper()
	m := newMetrics()
	opts := outboxOptions{
		queue: 1000, interval: time.Millisecond, dir: filepath.Join(t.TempDir(), "spool"), maxBytes: 64 << 20,
		window: 16, timeout: 2 * time.Second,
	}
	if change != nil {
		change(&opts)
	}
	pub, err := usage.New(t.Context(), nc, usage.Options{Partitions: 4})
	if err != nil {
		t.Fatal(err)
	}
	o, err := openOutbox(nc, pub, opts, discard, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = o.close(ctx)
		_ = pub.Close(ctx)
	})
	return o, m
}

// numbered is the n-th event of a key.
func numbered(keyID string, n int) *schema.Event {
	return &schema.Event{
		ID: fmt.Sprintf("%s-%d", keyID, n), Time: time.Date(2026, 11, 21, 0, 0, 0, n, time.UTC), OrgID: "org_1", KeyID: keyID,
		SourceIP: netip.MustParseAddr("203.0.113.7"), Method: "GET", Route: "/v1/orders", Decision: schema.Allow,
	}
}

// inOrder demands that each of keys has its first n events once and in order.
func inOrder(t *testing.T, js jetstream.JetStream, keys, n int) {
	t.Helper()
	next := map[string]int{}
	for _, ev := range readEvents(t, js, keys*n) {
		if want := fmt.Sprintf("%s-%d", ev.KeyID, next[ev.KeyID]); ev.ID != want {
			t.Fatalf("got %s, want %s", ev.ID, want)
		}
		next[ev.KeyID]++
	}
}

// TestOutage takes NATS away in the middle: nobody waits, and afterwards every
// event is there once and in its key's order.
func TestOutage(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	nc, _ := srv.connect()
	o, m := testOutbox(t, nc, nil)
	const keys, n = 5, 600
	enqueue := func(from, to int) {
		for i := from; i < to; i++ {
			for k := range keys {
				if !o.Enqueue(numbered(fmt.Sprint("key_", k), i)) {
					t.Fatal("dropped")
				}
			}
			if i%20 == 0 {
				o.flush()
			}
		}
	}
	enqueue(0, 200)
	srv.srv.Shutdown()
	enqueue(200, 400)
	eventually(t, "noticing", func() bool { return !nc.IsConnected() })
	enqueue(400, n)
	o.flush()
	if events, bytes := m.backlog(); events < 1000 || bytes == 0 {
		t.Errorf("spool holds %d events, %d bytes", events, bytes)
	}
	srv.start()
	eventually(t, "replay", o.drained)
	_, js := srv.connect()
	inOrder(t, js, keys, n)
	if dropped := dropTotal(m); dropped != 0 {
		t.Errorf("%v dropped", dropped)
	}
}

func dropTotal(m *metrics) (sum float64) {
	for _, d := range m.drops {
		sum += testutil.ToFloat64(d.count)
	}
	return sum
}

// TestSpoolOutlivesTheProcess: what one outbox could not send, the next one does.
func TestSpoolOutlivesTheProcess(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	nc, _ := srv.connect()
	dir := t.TempDir()
	spooled := func(o *outboxOptions) { o.dir = dir }
	o, _ := testOutbox(t, nc, spooled)
	srv.srv.Shutdown()
	eventually(t, "noticing", func() bool { return !nc.IsConnected() })
	for i := range 50 {
		o.Enqueue(numbered("key_1", i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := o.close(ctx); err != nil {
		t.Fatal(err)
	}
	if o.Enqueue(numbered("key_1", 99)) {
		t.Error("a closed outbox takes events")
	}
	srv.start()
	again, js := srv.connect()
	o, _ = testOutbox(t, again, spooled)
	eventually(t, "replay", o.drained)
	inOrder(t, js, 1, 50)
}

// TestOverflowIsCounted fills queue and spool with NATS away.
func TestOverflowIsCounted(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	nc, _ := srv.connect()
	srv.srv.Shutdown()
	eventually(t, "noticing", func() bool { return !nc.IsConnected() })
	for name, dir := range map[string]string{"disk": t.TempDir(), "memory": ""} {
		o, m := testOutbox(t, nc, func(o *outboxOptions) { o.dir, o.maxBytes, o.queue, o.interval = dir, 20_000, 10, time.Hour })
		taken, refused := 0, 0
		for i := range 2000 {
			if o.Enqueue(numbered("key_1", i)) {
				taken++
			} else {
				refused++
				o.flush()
			}
		}
		o.flush()
		held, _ := o.store.backlog()
		full := testutil.ToFloat64(m.drops[dropSpoolFull].count)
		if full == 0 || held+int(full) != taken || float64(refused) != testutil.ToFloat64(m.drops[dropQueueFull].count) {
			t.Errorf("%s: taken %d, refused %d, held %d, dropped %v for the spool", name, taken, refused, held, full)
		}
	}
}

// TestStreamFull: a stream that refuses is waited for, nothing is dropped, and
// the order is kept, though many frames are on their way at once.
func TestStreamFull(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	nc, js := srv.connect()
	stream, err := js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	cfg := stream.CachedInfo().Config
	cfg.MaxMsgs = 1
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	o, m := testOutbox(t, nc, nil)
	for i := range 100 {
		o.Enqueue(numbered("key_1", i))
		o.flush()
		if i == 1 {
			eventually(t, "refusal", func() bool { return testutil.ToFloat64(m.retries) > 0 })
		}
	}
	cfg.MaxMsgs = -1
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "publishing", o.drained)
	inOrder(t, js, 1, 100)
}

// TestSpoolMendsATornEnd cuts and garbles the last record, as a power cut does.
func TestSpoolMendsATornEnd(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func([]byte) []byte{
		"cut":      func(b []byte) []byte { return b[:len(b)-3] },
		"cut head": func(b []byte) []byte { return append(b, 1, 2, 3) },
		"garbled":  func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"length": func(b []byte) []byte {
			return binary.LittleEndian.AppendUint32(b, 1<<31)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s, err := openSpool(dir, 1<<20, discard)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 3 {
				if err := s.append(frame{ID: fmt.Sprint(i), Events: 1, Data: []byte("data")}); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.close(); err != nil {
				t.Fatal(err)
			}
			names, _ := filepath.Glob(filepath.Join(dir, "*.seg"))
			text, _ := os.ReadFile(names[0])
			if err := os.WriteFile(names[0], spoil(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if s, err = openSpool(dir, 1<<20, discard); err != nil {
				t.Fatal(err)
			}
			defer s.close()
			want := map[string]int{"cut": 2, "garbled": 2, "cut head": 3, "length": 3}[name]
			for i := range want {
				if f, ok, err := s.next(); !ok || err != nil || f.ID != fmt.Sprint(i) {
					t.Fatalf("frame %d: %+v %v %v", i, f, ok, err)
				}
			}
			if _, ok, err := s.next(); ok || err != nil {
				t.Fatal("more than was whole")
			}
		})
	}
}

// TestSpoolGivesSpaceBack: segments go when their frames are released, also
// through rewinds.
func TestSpoolGivesSpaceBack(t *testing.T) {
	t.Parallel()
	s, err := openSpool(t.TempDir(), 64<<10, discard)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	sent, read := 0, 0
	for round := range 2000 {
		err := s.append(frame{ID: fmt.Sprint(sent), Events: 1, Data: make([]byte, 500)})
		switch {
		case err == nil:
			sent++
		case !errors.Is(err, errFull):
			t.Fatal(err)
		}
		if round%3 == 0 {
			continue
		}
		if _, ok, err := s.next(); err != nil {
			t.Fatal(err)
		} else if !ok {
			continue
		}
		s.rewind()
		f, _, err := s.next()
		if err != nil || f.ID != fmt.Sprint(read) {
			t.Fatalf("frame %q, want %d: %v", f.ID, read, err)
		}
		read++
		s.release()
	}
	for ; read < sent; read++ {
		if f, ok, err := s.next(); !ok || err != nil || f.ID != fmt.Sprint(read) {
			t.Fatalf("frame %+v %v %v", f, ok, err)
		}
		s.release()
	}
	if events, bytes := s.backlog(); events != 0 || bytes > 20<<10 {
		t.Errorf("%d events, %d bytes are left", events, bytes)
	}
	if sent < 1300 {
		t.Errorf("only %d frames fitted", sent)
	}
}

func TestSpoolIsLocked(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := openSpool(dir, 1<<20, discard)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if _, err := openSpool(dir, 1<<20, discard); err == nil {
		t.Error("two edges share a spool")
	}
}

var addr = netip.MustParseAddr("203.0.113.7")

// Environment of the child process that TestKilled kills.
const (
	envChildURL   = "LATCHKEY_TEST_NATS_URL"
	envChildSpool = "LATCHKEY_TEST_SPOOL"
)

func TestMain(m *testing.M) {
	if url := os.Getenv(envChildURL); url != "" {
		serveUntilKilled(url, os.Getenv(envChildSpool))
	}
	os.Exit(m.Run())
}

func serveUntilKilled(url, spool string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
	}
	nc, err := bus.Connect(url, "child")
	fail(err)
	cfg := testConfig()
	cfg.Spool, cfg.FlushInterval = spool, 20*time.Millisecond
	s, err := New(context.Background(), cfg, run.Deps{NATS: nc, Bus: bus.Config{Partitions: 4}})
	fail(err)
	go func() {
		<-s.Loaded()
		fmt.Println(s.Addr())
	}()
	fail(s.Run(context.Background()))
}

// TestKilled takes NATS away from an edge under load, kills the edge with -9 in
// the middle, and lets another one go on: every request was answered, what was
// written down arrives once, and what was not is counted.
//
// The long form takes NATS away for a minute.
func TestKilled(t *testing.T) {
	t.Parallel()
	outage := 1500 * time.Millisecond
	if os.Getenv("LATCHKEY_TEST_LONG") == "1" {
		outage = time.Minute
	}
	srv := newServer(t)
	_, js := srv.connect()
	rec, secret := newKey(t, "key_1", "org_1")
	publishKey(t, js, rec)
	dir := t.TempDir()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), envChildURL+"="+srv.srv.ClientURL(), envChildSpool+"="+dir)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	var killed atomic.Bool
	kill := func() {
		once.Do(func() {
			killed.Store(true)
			_ = child.Process.Kill()
			_ = child.Wait()
		})
	}
	t.Cleanup(kill)
	line := bufio.NewScanner(out)
	if !line.Scan() {
		t.Fatal("the edge did not start")
	}

	var answered atomic.Int64
	var clients sync.WaitGroup
	for range 8 { // 20,000 requests a second together
		clients.Go(func() {
			err := pacedClient(line.Text(), secret, 25, 10*time.Millisecond, &answered)
			if !killed.Load() {
				t.Errorf("a request was not answered: %v", err)
			}
		})
	}
	began := time.Now()
	<-time.After(outage / 2) // the load before the outage is the test's subject, not its clock
	srv.srv.Shutdown()
	<-time.After(outage)
	kill()
	took := time.Since(began)
	clients.Wait()

	tally, err := openTally(filepath.Join(dir, "tally"))
	if err != nil {
		t.Fatal(err)
	}
	taken, settled := int(tally.taken.Load()), int(tally.settled.Load())
	_ = tally.unmap()
	srv.start()
	nc, js := srv.connect()
	o, m := testOutbox(t, nc, func(o *outboxOptions) { o.dir = dir })
	eventually(t, "replay", o.drained)
	lost := int(testutil.ToFloat64(m.drops[dropCrash].count))
	arrived := countOnce(t, js)
	t.Logf("%d requests answered (%.0f/s), %d events taken, %d arrived, %d counted as lost", answered.Load(), float64(answered.Load())/took.Seconds(), taken, arrived, lost)
	switch {
	case taken < int(answered.Load()):
		t.Errorf("%d answered and %d events taken", answered.Load(), taken)
	case lost != taken-settled || arrived < settled || arrived > taken:
		t.Errorf("taken %d, written down %d, arrived %d, counted as lost %d", taken, settled, arrived, lost)
	case lost > taken/4: // 20 ms of the load; a busy machine flushes late
		t.Errorf("%d of %d lost", lost, taken)
	}
}

// pacedClient asks size requests at once, as HTTP allows on one connection, every
// interval, and counts the answers, until one fails. Whoever falls behind catches up.
func pacedClient(addr, secret string, size int, interval time.Duration, answered *atomic.Int64) error {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	batch := bytes.Repeat(authRequest(secret), size)
	in := bufio.NewReader(conn)
	for next := time.Now(); ; next = next.Add(interval) {
		<-time.After(time.Until(next))
		if _, err := conn.Write(batch); err != nil {
			return err
		}
		for range size {
			if err := readOK(in); err != nil {
				return err
			}
			answered.Add(1)
		}
	}
}

// countOnce counts the events of the stream and demands that none is there twice.
func countOnce(t *testing.T, js jetstream.JetStream) (n int) {
	t.Helper()
	stream, err := js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		msg, err := stream.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		_ = schema.Decode(msg.Header.Get("Content-Type"), msg.Data, time.Now(), func(_ int, ev *schema.Event, err error) {
			if err != nil {
				t.Fatal(err)
			}
			if seen[ev.ID] {
				t.Errorf("%s came twice", ev.ID)
			}
			seen[ev.ID] = true
			n++
		})
	}
	return n
}
