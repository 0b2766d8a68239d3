package detector

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/collector"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

// collect runs a collector until it has stored all of USAGE, and returns the URL where.
func collect(t testing.TB, server *natsd.Server, js jetstream.JetStream) string {
	t.Helper()
	e := enginetest.Start(t)
	url := fmt.Sprintf("clickhouse://%s/%s", e.NativeAddr(), enginetest.Database(t, e))
	nc, err := server.Connect("collector")
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	var cfg collector.Config
	if err := run.LoadFrom(&cfg, map[string]string{"LATCHKEY_CLICKHOUSE_URL": url, "LATCHKEY_COLLECTOR_FLUSH_INTERVAL": "50ms"}); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	c, err := collector.New(t.Context(), cfg, run.Deps{NATS: nc, Log: log, Metrics: run.NewRegistry(), Bus: layout})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	readBy(t, js, bus.Collector)
	cancel()
	if err := <-done; err != nil {
		t.Errorf("stop the collector: %v", err)
	}
	return url
}

// others is an event of each of many further keys, since a partition is taken when a
// message comes.
func others(name string, like usage.Event) (events []usage.Event) {
	for k := range 8 * partitions {
		like.ID, like.KeyID = "", fmt.Sprintf("other_%s%d", name, k)
		events = append(events, like)
	}
	return events
}

func TestRebuildEqualsWhatWasLearned(t *testing.T) {
	t.Parallel()
	events := traffic(12, 21)
	server, js := serve(t)
	publish(t, js, events, true)
	in := start(t, server)
	caughtUp(t, js)
	in.end(t)
	want := states(t, js)
	db, err := store.Open(t.Context(), collect(t, server, js))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })

	// The state is lost, and made anew.
	stream, err := js.Stream(t.Context(), "KV_"+bus.Baselines)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	in = start(t, server)
	rebuilt, err := in.Rebuild(t.Context(), db.Conn, time.Unix(0, 0), func(int64) {})
	if err != nil {
		t.Fatal(err)
	}
	if rebuilt.Events != int64(len(events)) {
		t.Errorf("%d events of %d", rebuilt.Events, len(events))
	}
	before := len(alerts(t, js))
	publish(t, js, others("", events[0]), false)
	caughtUp(t, js)
	in.end(t)
	got := states(t, js)
	sameKnown(t, got, want)
	if len(got) != 11 || rebuilt.Keys != 13 || len(got) != len(want) {
		t.Errorf("%d keys were rebuilt, %d have a baseline, %d had", rebuilt.Keys, len(got), len(want))
	}
	if after := len(alerts(t, js)); after != before {
		t.Errorf("the rebuild raised %d alerts", after-before)
	}
}

// sameKnown compares the baselines of the keys of the traffic, and leaves no others.
func sameKnown(t testing.TB, got, want map[string]string) {
	t.Helper()
	for _, m := range []map[string]string{got, want} {
		maps.DeleteFunc(m, func(token, _ string) bool {
			// Guessing is seen across keys, in the order of arrival: it is not rebuilt.
			return strings.HasPrefix(token, "other_") || strings.HasPrefix(token, nameSources) || strings.HasPrefix(token, "key_10")
		})
	}
	for token := range want {
		if got[token] != want[token] {
			t.Errorf("the rebuilt baseline of %s differs", token)
		}
	}
}

// TestUnreadableBaselinesAreRebuilt starts a detector on what a later version wrote.
func TestUnreadableBaselinesAreRebuilt(t *testing.T) {
	t.Parallel()
	events := traffic(12, 21)
	server, js := serve(t)
	publish(t, js, events, true)
	in := start(t, server)
	caughtUp(t, js)
	in.end(t)
	want := states(t, js)
	cfg := testConfig(t)
	cfg.ClickHouseURL = collect(t, server, js)
	ofLaterVersion(t, js)
	before := len(alerts(t, js))

	in = startWith(t, server, cfg)
	publish(t, js, others("a", events[0]), false)
	eventually(t, "the baselines are rebuilt", func() bool {
		return testutil.ToFloat64(in.metrics.repairs.WithLabelValues("ok")) > 0 && testutil.ToFloat64(in.metrics.unread) == 0
	})
	publish(t, js, others("b", events[0]), false)
	caughtUp(t, js)
	in.end(t)
	got := states(t, js)
	sameKnown(t, got, want)
	if len(got) != 11 || len(got) != len(want) {
		t.Errorf("%d baselines, want the %d that there were", len(got), len(want))
	}
	if after := len(alerts(t, js)); after != before {
		t.Errorf("%d alerts were raised", after-before)
	}

	in = startWith(t, server, cfg)
	publish(t, js, others("c", events[0]), false)
	caughtUp(t, js)
	in.end(t)
	if n := testutil.ToFloat64(in.metrics.repairs.WithLabelValues("ok")); n != 0 {
		t.Error("what was rebuilt is rebuilt at every start")
	}
}

// ofLaterVersion makes everything in the bucket unreadable, and adds a key of which
// ClickHouse knows nothing.
func ofLaterVersion(t testing.TB, js jetstream.JetStream) {
	t.Helper()
	kv, err := js.KeyValue(t.Context(), bus.Baselines)
	if err != nil {
		t.Fatal(err)
	}
	s := &Service{states: kv}
	put := func(name string, value []byte) {
		if _, err := kv.Put(t.Context(), name, value); err != nil {
			t.Fatal(err)
		}
	}
	for p := range partitions {
		st, err := s.readState(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		prefix := strconv.Itoa(p) + "."
		put(prefix+nameCommit, append([]byte{commitVersion + 1}, st.commit.encode()[1:]...))
		for token, it := range st.values {
			if token == nameSources {
				continue
			}
			profile, state, err := decodeProfile(it.value)
			if err != nil {
				t.Fatal(err)
			}
			state[0] = 250
			value := s2.Encode(nil, encodeProfile(&profile, state))
			put(prefix+token, value)
			put(prefix+"gone", value)
		}
	}
}
