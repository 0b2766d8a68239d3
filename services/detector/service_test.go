package detector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/baseline"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

const partitions = 4

var layout = bus.Config{Partitions: partitions}

// traffic is a month of keys that each live on one network and use two routes
// every hour; in the last days, every third is used from elsewhere for something
// else, and a source tries keys that are none.
func traffic(keys, days int) []usage.Event {
	rnd := rand.New(rand.NewPCG(1, 2))
	start := time.Date(2026, 9, 7, 0, 0, 0, 0, time.UTC)
	var events []usage.Event
	add := func(k int, at time.Time, ip netip.Addr, route, reason string) {
		ev := usage.Event{
			ID: fmt.Sprintf("ev-%d", len(events)), Time: at, OrgID: "org_" + strconv.Itoa(k%3), KeyID: fmt.Sprintf("key_%d", k),
			SourceIP: ip, Method: "GET", Route: route, Status: 200, Decision: usage.Allow,
		}
		if reason != "" {
			ev.Decision, ev.DenyReason, ev.Status = usage.Deny, reason, 401
		}
		events = append(events, ev)
	}
	for hour := range days * 24 {
		at := start.Add(time.Duration(hour) * time.Hour)
		for k := range keys {
			home := netip.AddrFrom4([4]byte{81, byte(k), 7, byte(1 + rnd.IntN(3))})
			for range 1 + rnd.IntN(2) {
				add(k, at.Add(time.Duration(rnd.IntN(3600))*time.Second), home, "/v1/readings", "")
			}
			if k%3 == 0 && hour == days*24-20-k {
				add(k, at, netip.AddrFrom4([4]byte{203, 0, 113, byte(k)}), "/v1/users", "")
			}
		}
		if hour == days*24-10 {
			for k := range 60 {
				add(1000+k, at, netip.MustParseAddr("198.51.100.66"), "/v1/readings", usage.DenyInvalidKey)
			}
		}
	}
	slices.SortStableFunc(events, func(a, b usage.Event) int { return a.Time.Compare(b.Time) })
	return events
}

// publish puts events on USAGE in frames of one partition, in order.
func publish(t testing.TB, js jetstream.JetStream, events []usage.Event, history bool) {
	t.Helper()
	frames, counts := make([][]byte, partitions), make([]int, partitions)
	send := func(p int) {
		if counts[p] == 0 {
			return
		}
		msg := nats.NewMsg(usage.Subject(p))
		msg.Header.Set("Content-Type", usage.ContentTypeProtobuf)
		if history {
			msg.Header.Set(usage.HeaderMode, usage.ModeHistory)
		}
		msg.Data = frames[p]
		if _, err := js.PublishMsg(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
		frames[p], counts[p] = nil, 0
	}
	for i := range events {
		p := usage.Partition(events[i].KeyID, partitions)
		frames[p] = events[i].AppendProtobuf(frames[p])
		if counts[p]++; counts[p] == 40 {
			send(p)
		}
	}
	for p := range partitions {
		send(p)
	}
}

// instance is one detector with a connection of its own.
type instance struct {
	*Service
	registry *prometheus.Registry
	nc       *nats.Conn
	stop     context.CancelFunc
	done     chan error
}

func testConfig(t testing.TB) Config {
	cfg := Config{SnapshotInterval: 20 * time.Millisecond, BaselineInterval: time.Hour}
	cfg.CacheDir = t.TempDir() // no geo data: prefixes only
	return cfg
}

func start(t testing.TB, server *natsd.Server) *instance {
	t.Helper()
	return startWith(t, server, testConfig(t))
}

func startWith(t testing.TB, server *natsd.Server, cfg Config) *instance {
	t.Helper()
	nc, err := server.Connect("detector")
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	registry := prometheus.NewRegistry()
	s, err := New(t.Context(), cfg, run.Deps{NATS: nc, Log: log, Metrics: registry, Bus: layout})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	in := &instance{Service: s, registry: registry, nc: nc, stop: cancel, done: make(chan error, 1)}
	go func() { in.done <- s.Run(ctx) }()
	t.Cleanup(func() { in.kill() })
	return in
}

// end stops a detector as a signal does.
func (in *instance) end(t testing.TB) {
	t.Helper()
	in.stop()
	if err := <-in.done; err != nil {
		t.Errorf("stop: %v", err)
	}
	in.done <- nil
	in.nc.Close()
}

// kill cuts the connection first, so that nothing can be written down any more.
func (in *instance) kill() {
	in.nc.Close()
	in.stop()
	in.done <- <-in.done
}

// caughtUp waits until the detector has acknowledged everything on USAGE.
func caughtUp(t testing.TB, js jetstream.JetStream) {
	t.Helper()
	readBy(t, js, bus.Detector)
}

func readBy(t testing.TB, js jetstream.JetStream, service string) {
	t.Helper()
	eventually(t, "the "+service+" has read everything", func() bool {
		s, err := js.Stream(t.Context(), bus.Usage)
		if err != nil {
			t.Fatal(err)
		}
		for p := range partitions {
			last, err := s.GetLastMsgForSubject(t.Context(), usage.Subject(p))
			if err != nil {
				continue
			}
			c, err := s.Consumer(t.Context(), bus.ConsumerName(service, p))
			if err != nil {
				t.Fatal(err)
			}
			if c.CachedInfo().AckFloor.Stream < last.Sequence {
				return false
			}
		}
		return true
	})
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in a minute: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// alerts reads everything on ALERTS, in order, without the clock's time.
func alerts(t testing.TB, js jetstream.JetStream) []string {
	t.Helper()
	var list []string
	eachMessage(t, js, bus.Alerts, func(m *jetstream.RawStreamMsg) {
		var a alert.Alert
		if err := json.Unmarshal(m.Data, &a); err != nil {
			t.Fatal(err)
		}
		if a.DetectedAt.IsZero() {
			t.Errorf("alert %s has no detected_at", a.ID)
		}
		a.DetectedAt = a.Time
		text, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, string(text))
	})
	slices.Sort(list) // partitions have no order among them
	return list
}

func eachAlert(t testing.TB, js jetstream.JetStream, fn func(id string, revision int)) {
	t.Helper()
	eachMessage(t, js, bus.Alerts, func(m *jetstream.RawStreamMsg) {
		var a alert.Alert
		if err := json.Unmarshal(m.Data, &a); err != nil {
			t.Fatal(err)
		}
		fn(a.ID, a.Revision)
	})
}

func eachMessage(t testing.TB, js jetstream.JetStream, stream string, fn func(*jetstream.RawStreamMsg)) {
	t.Helper()
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	for seq := s.CachedInfo().State.FirstSeq; seq != 0 && seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		fn(m)
	}
}

// states are the engine's states of all keys, by token, as the bucket holds them.
func states(t testing.TB, js jetstream.JetStream) map[string]string {
	t.Helper()
	kv, err := js.KeyValue(t.Context(), bus.Baselines)
	if err != nil {
		t.Fatal(err)
	}
	s, out := &Service{states: kv}, map[string]string{}
	for p := range partitions {
		st, err := s.readState(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if len(st.journals) > 0 {
			t.Errorf("partition %d: journals are left behind: %v", p, slices.Collect(maps.Keys(st.journals)))
		}
		for token, it := range st.values {
			if token == nameSources {
				out[fmt.Sprint(token, p)] = string(it.value)
				continue
			}
			profile, state, err := decodeProfile(it.value)
			if err != nil {
				t.Fatal(err)
			}
			out[token] = fmt.Sprint(profile.sequence, profile.alerts) + string(state)
		}
	}
	return out
}

// same compares two runs.
func same(t testing.TB, js, undisturbed jetstream.JetStream) {
	t.Helper()
	got, want := alerts(t, js), alerts(t, undisturbed)
	if !slices.Equal(got, want) {
		t.Errorf("%d alerts, undisturbed %d", len(got), len(want))
		for i := range min(len(got), len(want)) {
			if got[i] != want[i] {
				t.Errorf("first difference:\n got %s\nwant %s", got[i], want[i])
				break
			}
		}
	}
	if len(want) == 0 {
		t.Error("the traffic raises no alert: the test tests nothing")
	}
	gotStates, wantStates := states(t, js), states(t, undisturbed)
	if len(wantStates) == 0 {
		t.Error("no state was kept")
	}
	for token, state := range wantStates {
		if gotStates[token] != state {
			t.Errorf("the baseline of %s differs (%d bytes, undisturbed %d)", token, len(gotStates[token]), len(state))
		}
	}
	if len(gotStates) != len(wantStates) {
		t.Errorf("%d baselines, undisturbed %d", len(gotStates), len(wantStates))
	}
}

// undisturbed is a run that nothing happens to, with the same messages as a run
// that publishes in so many parts.
func undisturbed(t testing.TB, events []usage.Event, parts int) jetstream.JetStream {
	t.Helper()
	server, js := serve(t)
	for i := range parts {
		publish(t, js, part(events, i, parts), false)
	}
	in := start(t, server)
	caughtUp(t, js)
	in.end(t)
	return js
}

// part is one of n equal parts.
func part(events []usage.Event, i, n int) []usage.Event {
	return events[len(events)*i/n : len(events)*(i+1)/n]
}

func serve(t testing.TB) (*natsd.Server, jetstream.JetStream) {
	t.Helper()
	server := natstest.Start(t)
	js, err := jetstream.New(natstest.Connect(t, server))
	if err != nil {
		t.Fatal(err)
	}
	if err := bus.Ensure(t.Context(), js, layout); err != nil {
		t.Fatal(err)
	}
	return server, js
}

func TestKillsChangeNothing(t *testing.T) {
	t.Parallel()
	events := traffic(12, 21)
	const kills = 4
	want := undisturbed(t, events, kills)
	server, js := serve(t)
	rnd := rand.New(rand.NewPCG(3, 4))
	for i := range kills {
		publish(t, js, part(events, i, kills), false)
		in := start(t, server)
		target := rnd.IntN(len(events) / kills)
		eventually(t, "the detector works", func() bool { return counted(in) >= float64(target) })
		in.kill()
	}
	in := start(t, server)
	caughtUp(t, js)
	in.end(t)
	same(t, js, want)
}

func TestRestartKeepsEverything(t *testing.T) {
	t.Parallel()
	events := traffic(12, 21)
	want := undisturbed(t, events, 2)
	server, js := serve(t)
	for i := range 2 {
		publish(t, js, part(events, i, 2), false)
		in := start(t, server)
		caughtUp(t, js)
		in.end(t)
	}
	same(t, js, want)
}

func TestReplicaTakesOver(t *testing.T) {
	t.Parallel()
	events := traffic(12, 21)
	want := undisturbed(t, events, 3)
	server, js := serve(t)
	first, second := start(t, server), start(t, server)
	publish(t, js, part(events, 0, 3), false)
	caughtUp(t, js)
	publish(t, js, part(events, 1, 3), false)
	first.kill()
	publish(t, js, part(events, 2, 3), false)
	caughtUp(t, js)
	second.end(t)
	same(t, js, want)
}

func TestMisplacedKeysArrive(t *testing.T) {
	t.Parallel()
	events := traffic(6, 3)
	want := undisturbed(t, events[:200], 1)
	server, js := serve(t)
	body, err := json.Marshal(events[:200])
	if err != nil {
		t.Fatal(err)
	}
	// One array of many keys on one key's subject.
	msg := &nats.Msg{Subject: usage.RawSubject + "key_1", Header: nats.Header{"Content-Type": {usage.ContentTypeJSON}}, Data: body}
	if _, err := js.PublishMsg(t.Context(), msg); err != nil {
		t.Fatal(err)
	}
	in := start(t, server)
	caughtUp(t, js) // the first message
	caughtUp(t, js) // those that it was split into, stored before it was acknowledged
	in.end(t)
	got, expected := states(t, js), states(t, want)
	for token, state := range expected {
		if _, a, _ := bytes.Cut([]byte(got[token]), []byte("]")); !bytes.HasSuffix([]byte(state), a) || len(a) == 0 {
			t.Errorf("the baseline of %s differs", token)
		}
	}
}

func TestPoisonCostsNothing(t *testing.T) {
	t.Parallel()
	events := traffic(6, 3)
	want := undisturbed(t, events, 1)
	server, js := serve(t)
	for _, poison := range []*nats.Msg{
		{Subject: usage.Subject(1), Data: []byte("\xff\xfe not usage")},
		{Subject: usage.Subject(2), Header: nats.Header{"Content-Type": {"image/png"}}, Data: []byte("x")},
		{Subject: usage.Subject(3), Header: nats.Header{"Content-Type": {usage.ContentTypeProtobuf}}, Data: []byte{0x0a, 0xff}},
		{Subject: usage.Subject(0)},
	} {
		if _, err := js.PublishMsg(t.Context(), poison); err != nil {
			t.Fatal(err)
		}
	}
	publish(t, js, events, false)
	in := start(t, server)
	caughtUp(t, js)
	in.end(t)
	got, expected := states(t, js), states(t, want)
	if len(got) != len(expected) || len(got) == 0 {
		t.Errorf("%d baselines, want %d", len(got), len(expected))
	}
}

func counted(in *instance) float64 {
	sum := 0.0
	families, _ := in.registry.Gather()
	for _, f := range families {
		if f.GetName() == "latchkey_detector_events_total" {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

func TestRotatedKeyInherits(t *testing.T) {
	t.Parallel()
	events := traffic(6, 21)
	server, js := serve(t)
	publish(t, js, events, true)
	in := start(t, server)
	caughtUp(t, js)
	var children []usage.Event
	early := events[len(events)-1] // the first child is used before its rotation is known
	early.ID, early.KeyID, early.Time = "early", "key_child_0", early.Time.Add(time.Second)
	publish(t, js, []usage.Event{early}, false)
	caughtUp(t, js)
	for k := range 6 {
		child := fmt.Sprintf("key_child_%d", k)
		change, err := json.Marshal(key.Change{Type: key.Rotated, Record: key.Record{ID: child, ParentKeyID: fmt.Sprintf("key_%d", k)}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := js.Publish(t.Context(), bus.KeySubject(child), change); err != nil {
			t.Fatal(err)
		}
		ev := events[len(events)-1]
		ev.ID, ev.KeyID, ev.Time = child, child, ev.Time.Add(time.Minute)
		children = append(children, ev)
	}
	eventually(t, "the rotations are known", func() bool {
		n := 0
		in.parents.Range(func(any, any) bool { n++; return true })
		return n == 6
	})
	publish(t, js, children, false)
	caughtUp(t, js)
	in.end(t)
	for k := range 6 {
		if row := rowOf(t, js, fmt.Sprintf("key_child_%d", k)); row.ParentKeyID != fmt.Sprintf("key_%d", k) || row.Events < 100 {
			t.Errorf("child %d: parent %q, %d events", k, row.ParentKeyID, row.Events)
		}
	}
}

// rowOf is the baseline of a key as an engine reads it from the bucket.
func rowOf(t testing.TB, js jetstream.JetStream, keyID string) baseline.Row {
	t.Helper()
	kv, err := js.KeyValue(t.Context(), bus.Baselines)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := kv.Get(t.Context(), strconv.Itoa(usage.Partition(keyID, partitions))+"."+keyToken(keyID))
	if err != nil {
		t.Fatalf("%s: %v", keyID, err)
	}
	_, state, err := decodeProfile(stored.Value())
	if err != nil {
		t.Fatal(err)
	}
	e := anomaly.New(anomaly.Options{})
	if err := e.Decode(keyID, state); err != nil {
		t.Fatal(err)
	}
	row, _ := e.Baseline(keyID)
	return row
}

func TestVerdictsReachTheEngineOnce(t *testing.T) {
	t.Parallel()
	server, js := serve(t)
	publish(t, js, traffic(12, 21), false)
	in := start(t, server)
	caughtUp(t, js)
	kv, err := js.KeyValue(t.Context(), bus.Verdicts)
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	eachAlert(t, js, func(id string, _ int) { ids[id] = true })
	for id := range ids {
		if _, err := kv.PutString(t.Context(), id, `{"verdict":"expected","actor":"key_admin","time":"2026-09-28T00:00:00Z"}`); err != nil {
			t.Fatal(err)
		}
	}
	given := func() (n int) {
		s := &Service{states: in.states}
		for p := range partitions {
			st, err := s.readState(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			for token, it := range st.values {
				if token == nameSources {
					continue
				}
				profile, _, err := decodeProfile(it.value)
				if err != nil {
					t.Fatal(err)
				}
				for _, a := range profile.alerts {
					if a.verdict == "expected" {
						n++
					}
				}
			}
		}
		return n
	}
	eventually(t, "every verdict is part of the state", func() bool { return given() == len(ids) })
	before := states(t, js)
	in.end(t)
	// A partition is taken when a message comes.
	var others []usage.Event
	for k := range 8 * partitions {
		ev := traffic(1, 1)[0]
		ev.ID, ev.KeyID = "", fmt.Sprintf("other_%d", k)
		others = append(others, ev)
	}
	publish(t, js, others, false)
	again := start(t, server)
	caughtUp(t, js)
	again.end(t)
	after := states(t, js)
	maps.DeleteFunc(after, func(token, _ string) bool { return strings.HasPrefix(token, "other_") })
	if !maps.Equal(before, after) {
		t.Error("a verdict was heard twice")
	}
}

func TestHistoryRaisesHistoricalAlerts(t *testing.T) {
	t.Parallel()
	server, js := serve(t)
	publish(t, js, traffic(12, 21), true)
	in := start(t, server)
	caughtUp(t, js)
	in.end(t)
	list := alerts(t, js)
	if len(list) == 0 {
		t.Fatal("no alert")
	}
	for _, a := range list {
		if !strings.Contains(a, `"historical":true`) {
			t.Errorf("not historical: %s", a)
		}
	}
}

func TestKeyTokens(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	for _, id := range []string{"key_1", "_key", "a.b", "a_b", "a:b", "sha256:00ff", "=", "__", "-"} {
		token := keyToken(id)
		if seen[token] != "" {
			t.Errorf("%q and %q have the token %q", id, seen[token], token)
		}
		seen[token] = id
		if usage.CheckIdentifier(id) == nil && keyOfToken(token) != id {
			t.Errorf("%q comes back as %q", id, keyOfToken(token))
		}
		if strings.ContainsAny(token, ".: ") || token[0] == '_' {
			t.Errorf("%q: token %q", id, token)
		}
	}
}

func TestJournalInParts(t *testing.T) {
	t.Parallel()
	_, js := serve(t)
	kv, err := js.KeyValue(t.Context(), bus.Baselines)
	if err != nil {
		t.Fatal(err)
	}
	s := &Service{js: js, writes: js, states: kv}
	snap := &snapshot{commit: commit{sequence: 7, owner: "me"}}
	for i := range 5 {
		snap.items = append(snap.items, item{token: fmt.Sprintf("key_%d", i), value: bytes.Repeat([]byte{byte(i)}, inlineJournal/2)})
	}
	if err := s.writeJournal(t.Context(), "0.", snap); err != nil {
		t.Fatal(err)
	}
	if _, err := s.compareAndSet(t.Context(), "0."+nameCommit, snap.commit.encode(), 0); err != nil {
		t.Fatal(err)
	}
	// The crash: no profile is written under its own name yet.
	st, err := s.readState(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := st.overlay()
	if err != nil || len(fresh) != 5 || len(st.values["key_4"].value) != inlineJournal/2 || st.commit.parts < 3 {
		t.Errorf("%d values, %d parts, %v", len(fresh), st.commit.parts, err)
	}
	if _, err := s.compareAndSet(t.Context(), "0."+nameCommit, snap.commit.encode(), 0); !errors.Is(err, bus.ErrLost) {
		t.Errorf("a former owner's commit: %v", err)
	}
	if err := s.purgeJournal(t.Context(), "0.", "me"); err != nil {
		t.Fatal(err)
	}
	if st, err = s.readState(t.Context(), 0); err != nil || len(st.journals) != 0 {
		t.Errorf("%d journals, %v", len(st.journals), err)
	}
}

func FuzzDecodeProfile(f *testing.F) {
	f.Add(s2.Encode(nil, encodeProfile(&profile{sequence: 3, alerts: []told{{"alrt_1", "expected"}}}, []byte("state"))))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, state, err := decodeProfile(data)
		if err != nil {
			return
		}
		again, stateAgain, err := decodeProfile(s2.Encode(nil, encodeProfile(&p, state)))
		if err != nil || fmt.Sprint(p) != fmt.Sprint(again) || !bytes.Equal(state, stateAgain) {
			t.Fatalf("%+v became %+v: %v", p, again, err)
		}
	})
}

func TestHealthAndMetrics(t *testing.T) {
	t.Parallel()
	nc, _ := natstest.Bus(t, layout)
	cfg := testConfig(t)
	cfg.Addr = "127.0.0.1:0"
	s, err := New(t.Context(), cfg, run.Deps{NATS: nc, Log: slog.New(slog.DiscardHandler), Metrics: run.NewRegistry(), Bus: layout})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	get := func(path string) (int, string) {
		res, err := http.Get("http://" + s.Addr() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	eventually(t, "the detector is ready", func() bool { code, _ := get("/-/ready"); return code == http.StatusOK })
	if code, body := get("/metrics"); code != http.StatusOK || !strings.Contains(body, `latchkey_detector_events_total{mode="live"} 0`) {
		t.Errorf("%d %s", code, body)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// rows are the last rows for analysts, by key.
func rows(t testing.TB, js jetstream.JetStream) map[string]baseline.Row {
	t.Helper()
	out := map[string]baseline.Row{}
	eachMessage(t, js, bus.BaselineRows, func(m *jetstream.RawStreamMsg) {
		var list []baseline.Row
		if err := json.Unmarshal(m.Data, &list); err != nil {
			t.Fatal(err)
		}
		for _, row := range list {
			out[row.KeyID] = row
		}
	})
	return out
}

func TestRowsFollowTheBaselines(t *testing.T) {
	t.Parallel()
	events := traffic(6, 21)
	server, js := serve(t)
	for i := range 3 {
		publish(t, js, part(events, i, 3), false)
		in := start(t, server)
		caughtUp(t, js)
		if i == 1 {
			in.kill() // rows are an hour apart here: this one leaves some behind
			if err := start(t, server).publishStale(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			continue
		}
		in.end(t)
	}
	got := rows(t, js)
	for k := range 6 {
		id := fmt.Sprintf("key_%d", k)
		want := rowOf(t, js, id)
		want.Partition, want.Sequence = got[id].Partition, got[id].Sequence
		a, _ := json.Marshal(got[id])
		b, _ := json.Marshal(want)
		if string(a) != string(b) || want.Sequence == 0 || want.Partition != usage.Partition(id, partitions) {
			t.Errorf("%s: row\n%s\nbaseline\n%s", id, a, b)
		}
	}
}
