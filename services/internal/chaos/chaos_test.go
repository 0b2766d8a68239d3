package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	publisher "github.com/latchkey-dev/latchkey/pkg/usage"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

var long = os.Getenv("LATCHKEY_TEST_LONG") != ""

// world is everything that the suite breaks.
type world struct {
	t          *testing.T
	servers    []*process
	collectors []*process
	engine     *engine.Engine
	proxy      *proxy
	nc         *nats.Conn
	js         jetstream.JetStream
	db         *store.Store
	dir        func() string
	partitions int
	batch      int

	accepted atomic.Int64
	batches  atomic.Int64
	poison   atomic.Int64
}

// newWorld starts servers of NATS (one, or three in a cluster), the engine behind
// a proxy, and two collectors.
func newWorld(t *testing.T, servers int) *world {
	t.Helper()
	return newWorldIn(t, layout{servers: servers, partitions: 4, collectors: 2, flush: 100 * time.Millisecond, batch: 45, dir: t.TempDir})
}

// layout says how large a world is, and where its servers' streams lie.
type layout struct {
	servers, partitions, collectors int
	flush                           time.Duration
	// batch is how many events are published at once, and up to ten times as many.
	batch int
	dir   func() string
}

func newWorldIn(t *testing.T, l layout) *world {
	t.Helper()
	w := &world{t: t, engine: enginetest.StartOwn(t), dir: l.dir, partitions: l.partitions, batch: l.batch}
	w.proxy = newProxy(t, w.engine.NativeAddr())
	urls := w.startServers(l.servers)
	var err error
	if w.nc, err = connect(urls); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.nc.Close)
	if w.js, err = jetstream.New(w.nc); err != nil {
		t.Fatal(err)
	}
	w.eventually("create the streams", func(ctx context.Context) error {
		return bus.Ensure(ctx, w.js, bus.Config{Replicas: l.servers, Partitions: l.partitions})
	})
	if w.db, err = store.Open(t.Context(), w.engine.URL("latchkey")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.db.Close() })
	if _, err := w.db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range l.collectors {
		w.collectors = append(w.collectors, start(t, "collector", "LATCHKEY_NATS_URL="+urls, fmt.Sprintf("CHAOS_REPLICAS=%d", l.servers),
			"LATCHKEY_CLICKHOUSE_URL=clickhouse://"+w.proxy.addr()+"/latchkey", "LATCHKEY_COLLECTOR_FLUSH_INTERVAL="+l.flush.String(),
			"LATCHKEY_COLLECTOR_INSERT_TIMEOUT=10s"))
	}
	return w
}

// connect waits for the server's first breath.
func connect(urls string) (nc *nats.Conn, err error) {
	for range 300 {
		if nc, err = bus.Connect(urls, "chaos", nats.ReconnectWait(50*time.Millisecond)); err == nil {
			return nc, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil, err
}

func (w *world) startServers(n int) (urls string) {
	addrs, routes := make([]string, n), make([]string, n)
	for i := range n {
		addrs[i], routes[i] = freeAddr(w.t), freeAddr(w.t)
	}
	for i := range n {
		env := []string{"CHAOS_DIR=" + w.dir(), "CHAOS_ADDR=" + addrs[i]}
		if n > 1 {
			env = append(env, fmt.Sprintf("CHAOS_NAME=n%d", i), "CHAOS_CLUSTER_ADDR="+routes[i], "CHAOS_ROUTES=nats://"+strings.Join(routes, ",nats://"))
		}
		w.servers = append(w.servers, start(w.t, "nats", env...))
	}
	return "nats://" + strings.Join(addrs, ",nats://")
}

func (w *world) eventually(what string, try func(context.Context) error) {
	w.t.Helper()
	deadline, patience := time.Now().Add(time.Minute), 5*time.Second
	if long { // a query over ten million rows takes its time
		deadline, patience = time.Now().Add(4*time.Minute), time.Minute
	}
	for {
		ctx, cancel := context.WithTimeout(w.t.Context(), patience)
		err := try(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// load publishes until ctx is done; what Publish did not confirm is published
// again until it does, as a careful gateway would.
func (w *world) load(ctx context.Context) {
	p, err := publisher.New(w.t.Context(), w.nc, publisher.Options{Partitions: w.partitions, AckTimeout: time.Second})
	if err != nil {
		w.t.Errorf("publisher: %v", err)
		return
	}
	defer p.Close(context.Background())
	for ctx.Err() == nil {
		n := w.batches.Add(1)
		events := make([]usage.Event, w.batch+rand.IntN(9*w.batch))
		for i := range events {
			events[i] = usage.Event{
				Time: time.Now().UTC(), OrgID: "org_a", KeyID: fmt.Sprintf("key_%d", rand.IntN(60)), SourceIP: netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}),
				Method: "GET", Route: "/v1/x", Status: 200, Decision: usage.Allow, RequestBytes: uint64(n),
			}
		}
		for {
			// The load is generated beyond ctx, or an event might be half accepted.
			pctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
			err := p.Publish(pctx, events)
			cancel()
			if err == nil {
				break
			}
			if w.t.Context().Err() != nil {
				return
			}
		}
		w.accepted.Add(int64(len(events)))
		if rand.IntN(10) == 0 {
			w.publishPoison()
		}
	}
}

// publishPoison puts something unreadable between good events.
func (w *world) publishPoison() {
	bodies := []struct{ contentType, body string }{
		{usage.ContentTypeJSON, "{"}, {usage.ContentTypeNDJSON, "x\ny\n"}, {usage.ContentTypeProtobuf, "\xff\x01"}, {"text/plain", "hello"}, {usage.ContentTypeJSON, ""},
	}
	b := bodies[rand.IntN(len(bodies))]
	_ = w.nc.PublishMsg(&nats.Msg{
		Subject: usage.Subject(rand.IntN(w.partitions)), Header: nats.Header{"Content-Type": {b.contentType}}, Data: []byte(b.body),
	})
	w.poison.Add(1)
}

// faults are what may happen, each in its own time.
func (w *world) faults() map[string]func() {
	pick := func(list []*process) *process { return list[rand.IntN(len(list))] }
	return map[string]func(){
		"kill collector":  func() { p := pick(w.collectors); p.kill(); p.start() },
		"kill nats":       func() { p := pick(w.servers); p.kill(); p.start() },
		"kill clickhouse": func() { _ = syscall.Kill(w.engine.Pid(), syscall.SIGKILL) },
		"lose answers":    func() { w.proxy.swallow.Store(3) },
		"break the wire":  w.proxy.cut,
	}
}

// settle waits until the collectors have acknowledged everything.
func (w *world) settle() {
	w.t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for {
		waiting, err := w.waiting()
		if err == nil && waiting == 0 {
			return
		}
		if time.Now().After(deadline) {
			w.describe()
			w.t.Fatalf("%d messages are not stored, %v", waiting, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// describe shows where the consumers are.
func (w *world) describe() {
	for p := range w.partitions {
		if c, err := w.js.Consumer(w.t.Context(), bus.Usage, bus.ConsumerName(bus.Collector, p)); err == nil {
			info := c.CachedInfo()
			w.t.Logf("partition %d: delivered %+v, floor %+v, pending %d, unacknowledged %d, waiting %d, %+v, %+v",
				p, info.Delivered, info.AckFloor, info.NumPending, info.NumAckPending, info.NumWaiting, info.PriorityGroups, info.Cluster)
		}
	}
}

func (w *world) waiting() (n uint64, err error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
	defer cancel()
	for p := range w.partitions {
		c, err := w.js.Consumer(ctx, bus.Usage, bus.ConsumerName(bus.Collector, p))
		if err != nil {
			return 0, err
		}
		info := c.CachedInfo()
		n += info.NumPending + uint64(info.NumAckPending)
	}
	return n, nil
}

// verify is the promise: every accepted event once, the rollups alike.
func (w *world) verify() {
	w.t.Helper()
	w.settle()
	want := uint64(w.accepted.Load())
	for _, query := range []string{
		"SELECT count() FROM usage_events",
		"SELECT uniqExact(id) FROM usage_events",
		"SELECT sum(events) FROM usage_hourly",
		"SELECT sum(events) FROM key_last_used",
	} {
		var got uint64
		w.eventually(query, func(ctx context.Context) error { return w.db.Conn.QueryRow(ctx, query).Scan(&got) })
		if got != want {
			w.t.Errorf("%s: %d, want %d", query, got, want)
		}
	}
	w.t.Logf("%d events, %d poisoned messages, %d answers lost", want, w.poison.Load(), w.proxy.lost.Load())
}

// TestKills breaks everything at random moments under load.
func TestKills(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	kills, between := 12, 400*time.Millisecond
	if long {
		kills, between = 75, 1200*time.Millisecond
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.load(ctx) })
	faults := w.faults()
	names := []string{"kill collector", "kill nats", "kill clickhouse", "lose answers", "kill collector", "break the wire"}
	for i := range kills {
		time.Sleep(between/2 + rand.N(between))
		name := names[i%len(names)]
		faults[name]()
		t.Logf("%d: %s after %d events", i, name, w.accepted.Load())
	}
	cancel()
	wg.Wait()
	w.verify()
}

// TestOutage takes ClickHouse away for longer than a batch waits.
func TestOutage(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.load(ctx) })
	time.Sleep(time.Second)
	w.proxy.down.Store(true)
	w.proxy.cut()
	outage := 4 * time.Second
	if long {
		outage = 90 * time.Second
	}
	time.Sleep(outage / 2)
	w.collectors[0].kill()
	w.collectors[0].start()
	time.Sleep(outage / 2)
	w.proxy.down.Store(false)
	time.Sleep(time.Second)
	cancel()
	wg.Wait()
	w.verify()
}

// TestMemory gives all partitions to one collector, takes ClickHouse away while a
// third of the events comes, and looks at the most memory that it ever had.
func TestMemory(t *testing.T) {
	t.Parallel()
	w := newWorldIn(t, layout{servers: 1, partitions: bus.DefaultPartitions, collectors: 1, flush: time.Second, batch: 1000, dir: t.TempDir})
	events := int64(300_000)
	if long {
		events = 10_000_000
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { w.load(ctx) })
	}
	until := func(n int64) {
		for w.accepted.Load() < n && !t.Failed() {
			time.Sleep(10 * time.Millisecond)
		}
	}
	until(events / 3)
	before := w.collectors[0].peakMemory()
	w.proxy.down.Store(true)
	w.proxy.cut()
	until(2 * events / 3)
	away := w.collectors[0].peakMemory()
	w.proxy.down.Store(false)
	until(events)
	cancel()
	wg.Wait()
	w.settle()
	peak := w.collectors[0].peakMemory()
	t.Logf("peak memory %d MB before the outage, %d MB behind it, %d MB in the end", before>>20, away>>20, peak>>20)
	if peak > 300<<20 {
		t.Errorf("the collector had %d MB, want at most 300", peak>>20)
	}
	w.verify()
}

// TestFrozenOwner freezes a collector until the other one has its partitions,
// and then lets it go on with what it had in hand.
func TestFrozenOwner(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.load(ctx) })
	rounds := 1
	if long {
		rounds = 8
	}
	for i := range rounds {
		time.Sleep(time.Second)
		w.collectors[i%2].signal(syscall.SIGSTOP)
		time.Sleep(8 * time.Second)
		w.collectors[i%2].signal(syscall.SIGCONT)
	}
	time.Sleep(time.Second)
	cancel()
	wg.Wait()
	w.verify()
}

// TestCluster kills servers of a cluster of three under load.
func TestCluster(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 3)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.load(ctx) })
	kills := 2
	if long {
		kills = 12
	}
	for i := range kills {
		time.Sleep(2 * time.Second)
		w.servers[i%3].kill()
		time.Sleep(3 * time.Second)
		w.servers[i%3].start()
		// The next one is killed once this one has caught up, or there is no quorum.
		w.eventually("find the quorum again", w.inSync)
	}
	cancel()
	wg.Wait()
	w.verify()
}

func (w *world) inSync(ctx context.Context) error {
	s, err := w.js.Stream(ctx, bus.Usage)
	if err != nil {
		return err
	}
	c := s.CachedInfo().Cluster
	if c == nil || c.Leader == "" || len(c.Replicas) != 2 {
		return fmt.Errorf("cluster is %+v", c)
	}
	for _, r := range c.Replicas {
		if r.Offline || !r.Current {
			return fmt.Errorf("replica %s is behind", r.Name)
		}
	}
	return nil
}

// TestFullDisk fills the disk that the streams lie on. What was accepted before
// is there when there is room again, and nothing is accepted meanwhile.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mount := func(options string) error {
		return exec.Command("mount", "-t", "tmpfs", "-o", options, "tmpfs", dir).Run()
	}
	if err := mount("size=48m"); err != nil {
		t.Skipf("mount a small disk: %v (needs root)", err)
	}
	t.Cleanup(func() { _ = exec.Command("umount", "-l", dir).Run() })
	w := newWorldIn(t, layout{servers: 1, partitions: 4, collectors: 2, flush: 100 * time.Millisecond, batch: 45, dir: func() string { return dir }})
	// Nothing is consumed, so that the disk fills.
	for _, c := range w.collectors {
		c.kill()
	}
	filler := make([]byte, 1<<20)
	full := false
	for i := range 200 {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		_, err := w.js.Publish(ctx, bus.BaselineSubject(i%4), filler)
		cancel()
		if full = err != nil; full {
			break
		}
		if i == 10 {
			lctx, stop := context.WithTimeout(t.Context(), time.Second)
			w.load(lctx)
			stop()
		}
	}
	if !full {
		t.Fatal("a disk of 48 MB took 200 MB")
	}
	before := w.accepted.Load()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.load(ctx) })
	time.Sleep(2 * time.Second)
	w.servers[0].kill()
	if err := mount("remount,size=1g"); err != nil {
		t.Errorf("grow the disk: %v", err)
	}
	w.servers[0].start()
	w.eventually("publish again", func(ctx context.Context) error {
		_, err := w.js.Publish(ctx, bus.BaselineSubject(0), []byte("[]"))
		return err
	})
	for _, c := range w.collectors {
		c.start()
	}
	time.Sleep(2 * time.Second)
	cancel()
	wg.Wait()
	t.Logf("%d events before the disk was full", before)
	w.verify()
}
