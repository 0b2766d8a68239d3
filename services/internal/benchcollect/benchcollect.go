// Package benchcollect measures the transport and the collector against what the
// parts under them can do, in one run on one machine, so that only ratios matter.
package benchcollect

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	publisher "github.com/latchkey-dev/latchkey/pkg/usage"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/collector"
	"github.com/latchkey-dev/latchkey/services/collector/rows"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

// Options say how much is measured.
type Options struct {
	// Events in frames, Singles as one JSON message each, Naive as one insert each.
	Events, Singles, Naive int
	// Dir is for data, removed afterwards; empty takes a temporary one.
	Dir string
	// ClickHouseURL is a server to measure against instead of the embedded engine.
	ClickHouseURL string
	// Progress is told what is going on; may be nil.
	Progress io.Writer
}

// Report is what one run measured. Rates are in events per second.
type Report struct {
	Events  int `json:"events"`
	Singles int `json:"singles"`
	// BareInsert is (a), BareFetch (b), Collector (c), CollectorSingles (d),
	// NaiveInsert (e) of the published figures.
	BareInsert       float64 `json:"bare_insert"`
	BareFetch        float64 `json:"bare_fetch_frames"`
	Collector        float64 `json:"collector_frames"`
	BareFetchSingles float64 `json:"bare_fetch_singles"`
	CollectorSingles float64 `json:"collector_singles"`
	NaiveInsert      float64 `json:"naive_insert"`
	PublishFrames    float64 `json:"publish_frames"`
	PublishSingles   float64 `json:"publish_singles"`
	BytesPerEvent    float64 `json:"frame_bytes_per_event"`
	// CollectorMemory is the peak of the heap that this process had from the
	// operating system while the collector ran, NATS included, in bytes.
	CollectorMemory uint64 `json:"peak_memory_bytes"`
}

type bench struct {
	opts   Options
	cfg    collector.Config
	report Report
	ns     *natsd.Server
	nc     *nats.Conn
	js     jetstream.JetStream
	url    func(database string) string
}

// Run measures. It takes a minute or two.
func Run(ctx context.Context, opts Options) (*Report, error) {
	b := &bench{opts: opts, report: Report{Events: opts.Events, Singles: opts.Singles}}
	if err := run.LoadFrom(&b.cfg, map[string]string{}); err != nil {
		return nil, err
	}
	stop, err := b.start(ctx)
	defer func() { stop() }()
	if err != nil {
		return nil, err
	}
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"publish in frames", b.publishFrames},
		{"(b) bare fetch of frames", b.fetchFrames},
		{"(a) bare columnar insert", b.bareInsert},
		{"(c) collector from frames", b.collectFrames},
		{"publish single messages", b.publishSingles},
		{"bare fetch of single messages", b.fetchSingles},
		{"(d) collector from single messages", b.collectSingles},
		{"(e) one insert a message", b.naive},
	} {
		b.tell("%s …\n", step.what)
		if err := step.do(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return &b.report, nil
}

func (b *bench) tell(format string, args ...any) {
	if b.opts.Progress != nil {
		fmt.Fprintf(b.opts.Progress, format, args...)
	}
}

func (b *bench) start(ctx context.Context) (stop func(), err error) {
	var stops []func()
	stop = func() {
		for i := len(stops) - 1; i >= 0; i-- {
			stops[i]()
		}
	}
	dir := b.opts.Dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "latchkey-bench-*"); err != nil {
			return stop, fmt.Errorf("make directory: %w", err)
		}
		stops = append(stops, func() { _ = os.RemoveAll(dir) })
	}
	if b.ns, err = natsd.Start(ctx, natsd.Options{DataDir: filepath.Join(dir, "nats"), Addr: "127.0.0.1:0"}); err != nil {
		return stop, err
	}
	stops = append(stops, b.ns.Shutdown)
	if b.nc, err = b.ns.Connect("bench"); err != nil {
		return stop, err
	}
	stops = append(stops, b.nc.Close)
	if b.js, err = jetstream.New(b.nc, jetstream.WithPublishAsyncMaxPending(4096)); err != nil {
		return stop, fmt.Errorf("open JetStream: %w", err)
	}
	if b.opts.ClickHouseURL != "" {
		b.url = func(string) string { return b.opts.ClickHouseURL }
		return stop, nil
	}
	e, err := engine.Start(ctx, engine.Config{
		DataDir: filepath.Join(dir, "clickhouse"), NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return stop, err
	}
	stops = append(stops, func() { _ = e.Close() })
	b.url = func(database string) string { return e.URL(database) }
	return stop, nil
}

// traffic makes n events as a few edges see them: 2,000 keys, 40 routes.
func traffic(n int, from int, at time.Time) []usage.Event {
	r := rand.New(rand.NewPCG(1, uint64(from)))
	events := make([]usage.Event, n)
	for i := range events {
		key := r.IntN(2000)
		events[i] = usage.Event{
			Time: at.Add(time.Duration(from+i) * 50 * time.Microsecond), OrgID: fmt.Sprintf("org_%04d", key%100),
			KeyID: fmt.Sprintf("key_01J9Z8XKQ2%04d", key), SourceIP: netip.AddrFrom4([4]byte{203, 0, byte(key), byte(r.IntN(4))}),
			Method: "GET", Route: fmt.Sprintf("/v1/devices/{id}/resource-%d", r.IntN(40)), Status: 200, Scope: "devices:read", Decision: usage.Allow,
			UserAgent: "terraform/1.9.5", LatencyUS: uint32(200 + r.IntN(20000)), RequestBytes: uint64(r.IntN(2000)), ResponseBytes: uint64(r.IntN(20000)),
			Gateway: "edge-1",
		}
	}
	return events
}

const chunk = 20_000

// chunks calls fn with all events, some at a time.
func chunks(n int, fn func(from int, events []usage.Event) error) error {
	at := time.Now().Add(-time.Hour).UTC()
	for from := 0; from < n; from += chunk {
		if err := fn(from, traffic(min(chunk, n-from), from, at)); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) fresh(ctx context.Context) error {
	for _, s := range []string{bus.Usage} {
		if err := b.js.DeleteStream(ctx, s); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
			return fmt.Errorf("delete stream: %w", err)
		}
	}
	_ = b.js.DeleteKeyValue(ctx, bus.Intents)
	return bus.Ensure(ctx, b.js, bus.Config{})
}

func (b *bench) publishFrames(ctx context.Context) error {
	if err := b.fresh(ctx); err != nil {
		return err
	}
	p, err := publisher.New(ctx, b.nc, publisher.Options{Partitions: bus.DefaultPartitions})
	if err != nil {
		return err
	}
	var busy time.Duration
	err = chunks(b.opts.Events, func(_ int, events []usage.Event) error {
		began := time.Now()
		defer func() { busy += time.Since(began) }()
		return p.Publish(ctx, events)
	})
	if cerr := p.Close(ctx); err == nil {
		err = cerr
	}
	b.report.PublishFrames = float64(b.opts.Events) / busy.Seconds()
	if info, ierr := b.js.Stream(ctx, bus.Usage); ierr == nil {
		b.report.BytesPerEvent = float64(info.CachedInfo().State.Bytes) / float64(b.opts.Events)
	}
	return err
}

// fetch reads all partitions without looking at what it gets.
func (b *bench) fetch(ctx context.Context, want int) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var read atomic.Int64
	var once sync.Once
	var began, ended time.Time
	err := bus.Partitions(ctx, b.js, bus.Detector, bus.Options{}, func(ctx context.Context, p *bus.Partition) error {
		once.Do(func() { began = time.Now() })
		if err := p.Reset(ctx, 1); err != nil {
			return err
		}
		for {
			msgs, err := p.Fetch(ctx, 4096, 2<<20, time.Second)
			if err != nil {
				return err
			}
			if len(msgs) == 0 {
				continue
			}
			if err := p.Ack(ctx, msgs[len(msgs)-1]); err != nil {
				return err
			}
			if read.Add(int64(len(msgs))) >= int64(want) {
				ended = time.Now()
				cancel()
			}
		}
	})
	return ended.Sub(began), err
}

func (b *bench) messages(ctx context.Context) (int, error) {
	s, err := b.js.Stream(ctx, bus.Usage)
	if err != nil {
		return 0, fmt.Errorf("look up stream: %w", err)
	}
	return int(s.CachedInfo().State.Msgs), nil
}

func (b *bench) fetchFrames(ctx context.Context) error {
	n, err := b.messages(ctx)
	if err != nil {
		return err
	}
	took, err := b.fetch(ctx, n)
	b.report.BareFetch = float64(b.opts.Events) / took.Seconds()
	return err
}

func (b *bench) fetchSingles(ctx context.Context) error {
	took, err := b.fetch(ctx, b.opts.Singles)
	b.report.BareFetchSingles = float64(b.opts.Singles) / took.Seconds()
	return err
}

func (b *bench) database(ctx context.Context, name string) (*store.Store, error) {
	db, err := store.Open(ctx, b.url(name))
	if err != nil {
		return nil, err
	}
	if _, err := db.Migrate(ctx); err != nil {
		_ = db.Close()
		return nil, err
	}
	return db, nil
}

// calm waits until what the steps before left behind is done, merges and dirty
// pages, so that no step pays for another.
func (b *bench) calm(ctx context.Context, db *store.Store) error {
	for range 300 {
		var merges uint64
		if err := db.Conn.QueryRow(ctx, "SELECT count() FROM system.merges").Scan(&merges); err != nil {
			return fmt.Errorf("count merges: %w", err)
		}
		if merges == 0 {
			break
		}
		pause(ctx, 100*time.Millisecond)
	}
	syscall.Sync()
	return ctx.Err()
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// bareInsert writes the same rows into the same tables, from blocks that are
// made beforehand, as large and as many at once as the collector's inserts.
func (b *bench) bareInsert(ctx context.Context) error {
	db, err := b.database(ctx, "bare")
	if err != nil {
		return err
	}
	defer db.Close()
	blocks, err := b.blocks()
	if err != nil {
		return err
	}
	type job struct {
		block *rows.Block
		token string
	}
	jobs := make(chan job)
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	for range b.cfg.Inserters {
		wg.Go(func() {
			in := db.Inserter()
			defer in.Close()
			for j := range jobs {
				if err := in.Insert(ctx, "usage_events", j.block.Input(), collector.InsertSettings(j.token)...); err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	if err := b.calm(ctx, db); err != nil {
		return err
	}
	began, n := time.Now(), 0
	for i := 0; n < b.opts.Events; i++ {
		block := blocks[i%len(blocks)]
		jobs <- job{block, fmt.Sprint("bench:", i)}
		n += block.Len()
	}
	close(jobs)
	wg.Wait()
	b.report.BareInsert = float64(n) / time.Since(began).Seconds()
	if p := failed.Load(); p != nil {
		return *p
	}
	return nil
}

// blocks makes some blocks of the rows, in the order in which they were published;
// they are inserted again and again. That the collector has them by partition, and
// sorts them, is its own doing.
func (b *bench) blocks() ([]*rows.Block, error) {
	var blocks []*rows.Block
	n := 0
	err := chunks(min(b.opts.Events, 8*b.cfg.BatchRows), func(_ int, events []usage.Event) error {
		for i := range events {
			if n%b.cfg.BatchRows == 0 {
				blocks = append(blocks, rows.New())
			}
			events[i].ID = usage.UUID([16]byte{6: 0x70, 8: 0x80, 12: byte(n >> 24), 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)})
			blocks[len(blocks)-1].Add(&events[i], &rows.Place{
				Stream: "bench", Partition: uint16(usage.Partition(events[i].KeyID, bus.DefaultPartitions)),
				Sequence: uint64(n / 200), Index: uint32(n % 200), IngestedAt: time.Now(),
			})
			n++
		}
		return nil
	})
	return blocks, err
}

// collect runs the collector until it has stored n events.
func (b *bench) collect(ctx context.Context, database string, n int) (time.Duration, error) {
	db, err := b.database(ctx, database)
	if err != nil {
		return 0, err
	}
	defer db.Close()
	if err := b.calm(ctx, db); err != nil {
		return 0, err
	}
	cfg := b.cfg
	cfg.Store.URL = b.url(database)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reg := prometheus.NewRegistry()
	c, err := collector.New(ctx, cfg, run.Deps{NATS: b.nc, Log: slog.New(slog.DiscardHandler), Metrics: reg})
	if err != nil {
		return 0, err
	}
	done := make(chan error, 1)
	debug.FreeOSMemory() // what the other steps left does not count
	began := time.Now()
	go func() { done <- c.Run(ctx) }()
	for stored(reg) < float64(n) {
		select {
		case err := <-done:
			return 0, err
		case <-time.After(50 * time.Millisecond):
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		b.report.CollectorMemory = max(b.report.CollectorMemory, m.Sys-m.HeapReleased)
	}
	took := time.Since(began)
	cancel()
	if err := <-done; err != nil {
		return 0, err
	}
	var have uint64
	if err := db.Conn.QueryRow(context.WithoutCancel(ctx), "SELECT count() FROM usage_events").Scan(&have); err != nil {
		return 0, fmt.Errorf("count rows: %w", err)
	}
	if have != uint64(n) {
		return 0, fmt.Errorf("%d rows are stored, want %d", have, n)
	}
	return took, nil
}

func stored(reg *prometheus.Registry) float64 {
	families, err := reg.Gather()
	if err != nil {
		return 0
	}
	for _, f := range families {
		if f.GetName() != "latchkey_collector_events_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == "stored" {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func (b *bench) collectFrames(ctx context.Context) error {
	took, err := b.collect(ctx, "frames", b.opts.Events)
	b.report.Collector = float64(b.opts.Events) / took.Seconds()
	return err
}

func (b *bench) collectSingles(ctx context.Context) error {
	took, err := b.collect(ctx, "singles", b.opts.Singles)
	b.report.CollectorSingles = float64(b.opts.Singles) / took.Seconds()
	return err
}

func (b *bench) publishSingles(ctx context.Context) error {
	if err := b.fresh(ctx); err != nil {
		return err
	}
	var busy time.Duration
	err := chunks(b.opts.Singles, func(from int, events []usage.Event) error {
		for i := range events {
			events[i].ID = fmt.Sprintf("0198a6c0-0000-7000-8000-%012d", from+i)
		}
		began := time.Now()
		for i := range events {
			ev := &events[i]
			m := &nats.Msg{
				Subject: usage.Subject(usage.Partition(ev.KeyID, bus.DefaultPartitions)),
				Header:  nats.Header{"Content-Type": {usage.ContentTypeJSON}}, Data: ev.AppendJSON(nil),
			}
			if _, err := b.js.PublishMsgAsync(m, jetstream.WithStallWait(time.Minute)); err != nil {
				return fmt.Errorf("publish: %w", err)
			}
		}
		select {
		case <-b.js.PublishAsyncComplete():
		case <-ctx.Done():
			return ctx.Err()
		}
		busy += time.Since(began)
		return nil
	})
	b.report.PublishSingles = float64(b.opts.Singles) / busy.Seconds()
	return err
}

func (b *bench) naive(ctx context.Context) error {
	db, err := b.database(ctx, "naive")
	if err != nil {
		return err
	}
	defer db.Close()
	if err := b.calm(ctx, db); err != nil {
		return err
	}
	in := db.Inserter()
	defer in.Close()
	block := rows.New()
	began := time.Now()
	err = chunks(b.opts.Naive, func(from int, events []usage.Event) error {
		for i := range events {
			block.Reset()
			block.Add(&events[i], &rows.Place{Stream: "bench", Sequence: uint64(from + i), IngestedAt: time.Now()})
			if err := in.Insert(ctx, "usage_events", block.Input()); err != nil {
				return err
			}
		}
		return nil
	})
	b.report.NaiveInsert = float64(b.opts.Naive) / time.Since(began).Seconds()
	return err
}
