package collector_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	publisher "github.com/latchkey-dev/latchkey/pkg/usage"
	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/baseline"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/collector"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

func TestMain(m *testing.M) { enginetest.Main(m) }

// house is a NATS server, a database and what a test asks of them.
type house struct {
	t   *testing.T
	nc  *nats.Conn
	js  jetstream.JetStream
	bus bus.Config
	url string
	db  *store.Store
	// registry holds the metrics of the collector that was started last.
	registry *prometheus.Registry
}

func newHouse(t *testing.T, cfg bus.Config) *house {
	t.Helper()
	e := enginetest.Start(t)
	nc, js := natstest.Bus(t, cfg)
	h := &house{t: t, nc: nc, js: js, bus: cfg, url: "clickhouse://" + e.NativeAddr() + "/" + enginetest.Database(t, e)}
	var err error
	if h.db, err = store.Open(t.Context(), h.url); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.db.Close() })
	return h
}

func (h *house) config() collector.Config {
	var cfg collector.Config
	if err := run.LoadFrom(&cfg, map[string]string{"LATCHKEY_CLICKHOUSE_URL": h.url, "LATCHKEY_COLLECTOR_FLUSH_INTERVAL": "50ms"}); err != nil {
		h.t.Fatal(err)
	}
	return cfg
}

// collect runs a collector until the returned function is called.
func (h *house) collect(cfg collector.Config) (stop func()) {
	h.t.Helper()
	h.registry = prometheus.NewRegistry()
	ctx, cancel := context.WithCancel(context.Background())
	c, err := collector.New(ctx, cfg, run.Deps{
		NATS: h.nc, Metrics: h.registry, Bus: h.bus,
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	})
	if err != nil {
		h.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("collector: %v", err)
		}
	}
	h.t.Cleanup(stop)
	return stop
}

func (h *house) count(query string) uint64 {
	var n uint64
	if err := h.db.Conn.QueryRow(h.t.Context(), query).Scan(&n); err != nil {
		return 0 // not migrated yet, or away
	}
	return n
}

// await returns once a query counts to want; the test's own deadline is the limit.
func (h *house) await(query string, want uint64) {
	h.t.Helper()
	deadline := time.Now().Add(40 * time.Second)
	for {
		n := h.count(query)
		if n == want {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s: %d, want %d", query, n, want)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// settled waits until the collector has acknowledged everything in USAGE.
func (h *house) settled() {
	h.t.Helper()
	s, err := h.js.Stream(h.t.Context(), bus.Usage)
	if err != nil {
		h.t.Fatal(err)
	}
	deadline := time.Now().Add(60 * time.Second)
	for {
		waiting := uint64(0)
		for info := range s.ListConsumers(h.t.Context()).Info() {
			if info.Name[:3] == bus.Collector[:3] {
				waiting += info.NumPending + uint64(info.NumAckPending)
			}
		}
		if waiting == 0 {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%d messages are not stored", waiting)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// verify compares the events, the rollups and what was accepted.
func (h *house) verify(want int) {
	h.t.Helper()
	h.settled()
	for query, n := range map[string]uint64{
		"SELECT count() FROM usage_events":                     uint64(want),
		"SELECT uniqExact(id, key_id, time) FROM usage_events": uint64(want),
		"SELECT sum(events) FROM usage_hourly":                 uint64(want),
		"SELECT sum(events) FROM key_last_used":                uint64(want),
	} {
		if got := h.count(query); got != n {
			h.t.Errorf("%s: %d, want %d", query, got, n)
		}
	}
}

func (h *house) publisher(opts publisher.Options) *publisher.Publisher {
	h.t.Helper()
	p, err := publisher.New(h.t.Context(), h.nc, opts)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = p.Close(context.Background()) })
	return p
}

func events(n int, at time.Time) []usage.Event {
	out := make([]usage.Event, n)
	for i := range out {
		out[i] = usage.Event{
			ID: fmt.Sprintf("ev-%d", i), Time: at.Add(time.Duration(i) * time.Millisecond).UTC(), OrgID: "org_acme", KeyID: fmt.Sprintf("key_%d", i%23),
			SourceIP: netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), Method: "GET", Route: fmt.Sprintf("/v1/devices/%d", i%7),
			Status: 200, Decision: usage.Allow, UserAgent: "curl/8", LatencyUS: uint32(i), RequestBytes: 1, ResponseBytes: 2, Gateway: "edge-1",
		}
	}
	return out
}

var anHourAgo = time.Now().Add(-time.Hour)

func TestStoresEveryEventOnce(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{})
	p := h.publisher(publisher.Options{})
	evs := events(20_000, anHourAgo)
	if err := p.Publish(t.Context(), evs); err != nil {
		t.Fatal(err)
	}
	stop := h.collect(h.config())
	h.verify(len(evs))
	var got struct {
		ip     netip.Addr
		route  string
		ns     int64
		lat    uint32
		stream string
	}
	if err := h.db.Conn.QueryRow(t.Context(), `SELECT source_ip, route, toUnixTimestamp64Nano(time), latency_us, stream
FROM usage_events WHERE id = 'ev-17'`).Scan(&got.ip, &got.route, &got.ns, &got.lat, &got.stream); err != nil {
		t.Fatal(err)
	}
	want := evs[17]
	if got.ip.Unmap() != want.SourceIP || got.route != want.Route || got.ns != want.Time.UnixNano() || got.lat != want.LatencyUS {
		t.Errorf("stored %+v, sent %+v", got, want)
	}

	// The same events again, by the same way and after a restart.
	if err := p.Publish(t.Context(), evs[:5000]); err != nil {
		t.Fatal(err)
	}
	h.verify(len(evs))
	stop()
	if err := p.Publish(t.Context(), evs[4000:9000]); err != nil {
		t.Fatal(err)
	}
	h.collect(h.config())
	h.verify(len(evs))
}

func TestDuplicatesWithinABatchAndMonths(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{Partitions: 1})
	// Three months in one batch, each event twice.
	var evs []usage.Event
	for m := range 3 {
		evs = append(evs, events(100, time.Date(2026, time.Month(6+m), 10, 0, 0, 0, 0, time.UTC))...)
	}
	p := h.publisher(publisher.Options{Mode: usage.ModeHistory})
	if err := p.Publish(t.Context(), append(evs, evs...)); err != nil {
		t.Fatal(err)
	}
	h.collect(h.config())
	h.verify(300)
	if n := h.count("SELECT count() FROM usage_events WHERE history"); n != 300 {
		t.Errorf("%d rows are marked as history", n)
	}
}

func TestPoison(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{Partitions: 2})
	line := func(i int) string {
		ev := events(i+1, anHourAgo)[i]
		return string(ev.AppendJSON(nil))
	}
	send := func(subject, contentType, body string) {
		t.Helper()
		if _, err := h.js.PublishMsg(t.Context(), &nats.Msg{Subject: subject, Header: nats.Header{"Content-Type": {contentType}}, Data: []byte(body)}); err != nil {
			t.Fatal(err)
		}
	}
	send("usage.v1.0", "application/json", "poison first")
	send("usage.raw.key_0", usage.ContentTypeNDJSON, line(0)+"\n{broken\n"+line(23)+"\n")
	send("usage.raw.key_1", usage.ContentTypeJSON, "["+line(1)+`,{"id":"x"},`+line(24)+"]")
	send("usage.raw.key_2", "text/html", "<html>")
	send("usage.raw.key_3", usage.ContentTypeProtobuf, "\xff\xff\xff")
	send("usage.v1.1", usage.ContentTypeJSON, "")
	// Keys of both partitions in one message: those that do not belong are put right.
	send("usage.raw.key_4", usage.ContentTypeJSON, "["+line(4)+","+line(5)+","+line(6)+","+line(7)+"]")
	h.collect(h.config())
	h.await("SELECT count() FROM usage_events", 8)
	h.verify(8)
	dead, err := h.js.Stream(t.Context(), bus.Dead)
	if err != nil {
		t.Fatal(err)
	}
	state := dead.CachedInfo().State
	if state.Msgs != 6 {
		t.Errorf("%d dead letters, want 6", state.Msgs)
	}
	for seq := state.FirstSeq; seq <= state.LastSeq; seq++ {
		m, err := dead.GetMsg(t.Context(), seq)
		if err != nil || m.Header.Get(bus.HeaderReason) == "" {
			t.Errorf("dead letter %d: %v, %v", seq, m, err)
		}
	}
}

// TestTwoCollectors share the partitions; when one stops, the other takes over.
func TestTwoCollectors(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{Partitions: 4})
	p := h.publisher(publisher.Options{})
	stop := h.collect(h.config())
	h.collect(h.config())
	evs := events(6000, anHourAgo)
	for i := 0; i < len(evs); i += 500 {
		if err := p.Publish(t.Context(), evs[i:i+500]); err != nil {
			t.Fatal(err)
		}
		if i == 3000 {
			stop()
		}
	}
	h.verify(len(evs))
}

func TestSmallerTables(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{Partitions: 1})
	send := func(subject string, v any) {
		t.Helper()
		body, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.js.Publish(t.Context(), subject, body); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now().UTC()
	a := alert.Alert{
		ID: "alrt_1", Time: now, DetectedAt: now, OrgID: "org_a", KeyID: "key_1", Triggers: []string{alert.NewIPRange}, Severity: alert.High,
		Score: 9.1, Summary: "A key did something new.", SourceIP: netip.MustParseAddr("203.0.113.7"), Country: "NL", ASN: 1136,
		Evidence: []alert.Evidence{{Trigger: alert.NewIPRange, Observed: "here", Usual: "there", PValue: 1e-6}}, EventID: "ev", Revision: 1,
	}
	send(bus.AlertSubject(a.OrgID, a.KeyID), a)
	a.Revision, a.Score = 2, 9.5
	send(bus.AlertSubject(a.OrgID, a.KeyID), a)
	rec := key.Record{ID: "key_1", OrgID: "org_a", Name: "one", Hash: "deadbeef", Status: key.Active, CreatedAt: now, Scopes: []string{"a:b"}, ExpiresAt: &now}
	send(bus.KeySubject(rec.ID), key.Change{ID: "evt_1", Type: key.Created, Time: now, Actor: "system", Record: rec})
	before := rec
	rec.Status = key.Revoked
	send(bus.KeySubject(rec.ID), key.Change{ID: "evt_2", Type: key.RevokedEv, Time: now, Actor: "key_0", Record: rec, Before: &before})
	send("audit.org.org_a", key.AuditEvent{ID: "evt_3", Type: "org.created", Time: now, Actor: "key_0", OrgID: "org_a", Kind: "org", Subject: "org_a"})
	send(bus.BaselineSubject(0), []baseline.Row{{KeyID: "key_1", OrgID: "org_a", UpdatedAt: now, Events: 5, Networks: []baseline.Share{{Value: "203.0.113.0/24", Share: 1}}}})
	send("alerts.org_a.key_1", "no alert")
	h.collect(h.config())
	for query, want := range map[string]uint64{
		"SELECT count() FROM alerts WHERE revision = 2 AND score = 9.5 AND evidence[1].usual = 'there'": 1,
		"SELECT count() FROM alerts": 1,
		"SELECT count() FROM api_keys WHERE status = 'revoked' AND key_id = 'key_1'":   1,
		"SELECT count() FROM audit_log":                                                3,
		"SELECT count() FROM key_baselines WHERE networks[1].value = '203.0.113.0/24'": 1,
	} {
		h.await(query, want)
	}
	if n := h.count("SELECT count() FROM audit_log WHERE position(concat(before, after), 'deadbeef') > 0"); n != 0 {
		t.Error("the hash of a secret came into ClickHouse")
	}
	dead, err := h.js.Stream(t.Context(), bus.Dead)
	if err != nil || dead.CachedInfo().State.Msgs != 1 {
		t.Errorf("dead letters: %+v, %v", dead.CachedInfo().State, err)
	}
}

// TestManyDuplicatesOfManyKeys sends more keys again than one query may list.
func TestManyDuplicatesOfManyKeys(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{Partitions: 1})
	p := h.publisher(publisher.Options{})
	evs := events(4000, anHourAgo)
	for i := range evs {
		evs[i].KeyID = fmt.Sprintf("key_%d_%s", i, strings.Repeat("x", 110))
	}
	h.collect(h.config())
	for range 2 {
		if err := p.Publish(t.Context(), evs); err != nil {
			t.Fatal(err)
		}
		h.verify(len(evs))
	}
}

// wire is a way to ClickHouse that can be cut, and that can lose what comes back.
type wire struct {
	listener net.Listener
	down     atomic.Bool
	deaf     atomic.Bool
	mu       sync.Mutex
	conns    []net.Conn
}

func newWire(t *testing.T, target string) *wire {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{listener: l}
	t.Cleanup(func() { _ = l.Close(); w.cut() })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil || w.down.Load() {
				_ = client.Close()
				continue
			}
			w.mu.Lock()
			w.conns = append(w.conns, client, server)
			w.mu.Unlock()
			go func() { _, _ = io.Copy(server, client); _ = server.Close() }()
			go w.back(client, server)
		}
	}()
	return w
}

// back carries answers, until one is lost: then nothing comes any more, and the
// connection stays open.
func (w *wire) back(client, server net.Conn) {
	buf := make([]byte, 64<<10)
	lost := false
	for {
		n, err := server.Read(buf)
		if err != nil {
			if !lost {
				_ = client.Close()
			}
			return
		}
		if lost = lost || w.deaf.Load(); !lost {
			_, _ = client.Write(buf[:n])
		}
	}
}

func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.conns {
		_ = c.Close()
	}
	w.conns = nil
}

// through is a configuration whose way to ClickHouse is the wire.
func (h *house) through() (collector.Config, *wire) {
	u, err := url.Parse(h.url)
	if err != nil {
		h.t.Fatal(err)
	}
	w := newWire(h.t, u.Host)
	cfg := h.config()
	cfg.Store.URL = "clickhouse://" + w.listener.Addr().String() + u.Path
	return cfg, w
}

// TestLostAnswers loses the answers to inserts and to questions, without a word.
func TestLostAnswers(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{Partitions: 4})
	p := h.publisher(publisher.Options{})
	cfg, w := h.through()
	cfg.InsertTimeout = 2 * time.Second
	h.collect(cfg)
	evs := events(4000, anHourAgo)
	for i := 0; i < len(evs); i += 1000 {
		// Half of them come again, so that there is something to ask.
		if err := p.Publish(t.Context(), evs[max(0, i-500):i+1000]); err != nil {
			t.Fatal(err)
		}
		w.deaf.Store(true)
		time.Sleep(300 * time.Millisecond)
		w.deaf.Store(false)
	}
	h.verify(len(evs))
}

// TestLagWhileClickHouseIsAway: an owner that waits still tells how much does.
func TestLagWhileClickHouseIsAway(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{Partitions: 1})
	p := h.publisher(publisher.Options{})
	cfg, w := h.through()
	h.collect(cfg)
	if err := p.Publish(t.Context(), events(10, anHourAgo)); err != nil {
		t.Fatal(err)
	}
	h.await("SELECT count() FROM usage_events", 10)
	h.settled()
	w.down.Store(true)
	w.cut()
	evs := events(3000, anHourAgo.Add(time.Minute))
	for i := 0; i < len(evs); i += 200 {
		if err := p.Publish(t.Context(), evs[i:i+200]); err != nil {
			t.Fatal(err)
		}
	}
	h.awaitMetric("latchkey_collector_lag_events", func(v float64) bool { return v == 3000 })
	h.awaitMetric("latchkey_collector_lag_seconds", func(v float64) bool { return v > 2 })
	w.down.Store(false)
	h.await("SELECT count() FROM usage_events", 3010)
	h.awaitMetric("latchkey_collector_lag_events", func(v float64) bool { return v == 0 })
}

// awaitMetric returns once the metric of partition 0 is as it should be.
func (h *house) awaitMetric(name string, good func(float64) bool) {
	h.t.Helper()
	deadline := time.Now().Add(40 * time.Second)
	for {
		families, err := h.registry.Gather()
		if err != nil {
			h.t.Fatal(err)
		}
		value := math.NaN()
		for _, f := range families {
			if f.GetName() == name {
				value = f.GetMetric()[0].GetGauge().GetValue()
			}
		}
		if good(value) {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s stays at %v", name, value)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestLongHeaders has the longest headers that a server takes come with something
// unreadable: its dead letter has headers of its own.
func TestLongHeaders(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{Partitions: 1})
	long := strings.Repeat("x", 63<<10)
	for _, header := range []nats.Header{
		{"Content-Type": {long}},
		{"Content-Type": {"text/plain"}, usage.HeaderMode: {long}},
	} {
		size := int(h.nc.MaxPayload()) - len(long) - 200
		if _, err := h.js.PublishMsg(t.Context(), &nats.Msg{Subject: "usage.v1.0", Header: header, Data: make([]byte, size)}); err != nil {
			t.Fatal(err)
		}
	}
	p := h.publisher(publisher.Options{})
	if err := p.Publish(t.Context(), events(5, anHourAgo)); err != nil {
		t.Fatal(err)
	}
	h.collect(h.config())
	h.await("SELECT count() FROM usage_events", 5)
	h.settled()
	dead, err := h.js.Stream(t.Context(), bus.Dead)
	if err != nil || dead.CachedInfo().State.Msgs != 2 {
		t.Errorf("dead letters: %+v, %v", dead.CachedInfo().State, err)
	}
}

// TestMisplacedInAFullStream: what cannot be sent on is kept, nothing waits for it,
// and replaying it stores each event once, those without ids too.
func TestMisplacedInAFullStream(t *testing.T) {
	t.Parallel()
	h := newHouse(t, bus.Config{Partitions: 4, UsageMaxBytes: 100 << 10})
	var lines strings.Builder
	evs := events(200, anHourAgo)
	for i := range evs {
		evs[i].ID = ""
		lines.Write(evs[i].AppendJSON(nil))
		lines.WriteByte('\n')
	}
	message := &nats.Msg{Subject: "usage.v1.1", Header: nats.Header{"Content-Type": {usage.ContentTypeNDJSON}}, Data: []byte(lines.String())}
	for message.Data = []byte(lines.String()); ; message.Data = make([]byte, len(message.Data)/2) {
		if _, err := h.js.PublishMsg(t.Context(), message); err != nil && len(message.Data) < 100 {
			break
		}
	}
	h.collect(h.config())
	h.settled()
	dead, err := h.js.Stream(t.Context(), bus.Dead)
	if err != nil {
		t.Fatal(err)
	}
	var letter *jetstream.RawStreamMsg
	for seq := uint64(1); letter == nil; seq++ {
		m, err := dead.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		if m.Header.Get(bus.HeaderSequence) == "1" {
			letter = m
		}
	}
	stored := h.count("SELECT count() FROM usage_events")
	if stored == 0 || stored >= 200 {
		t.Errorf("%d events are stored, want those of partition 1", stored)
	}
	s, err := h.js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Purge(t.Context()); err != nil { // as Trim does, once everyone has read it
		t.Fatal(err)
	}
	if _, err := h.js.PublishMsg(t.Context(), &nats.Msg{
		Subject: letter.Header.Get(bus.HeaderSubject), Header: nats.Header{"Content-Type": letter.Header["Content-Type"]}, Data: letter.Data,
	}); err != nil {
		t.Fatal(err)
	}
	h.await("SELECT count() FROM usage_events", 200)
	h.verify(200)
}
