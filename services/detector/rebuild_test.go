package detector

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/collector"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

// collect runs a collector until it has stored all of USAGE, and returns where.
func collect(t testing.TB, server *natsd.Server, js jetstream.JetStream) *store.Store {
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
	db, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
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
	db := collect(t, server, js)

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
	var others []usage.Event // a partition is taken when a message comes
	for k := range 8 * partitions {
		ev := events[0]
		ev.ID, ev.KeyID = "", fmt.Sprintf("other_%d", k)
		others = append(others, ev)
	}
	publish(t, js, others, false)
	caughtUp(t, js)
	in.end(t)
	got := states(t, js)
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
	if len(got) != 11 || rebuilt.Keys != 72 || len(got) != len(want) {
		t.Errorf("%d keys were rebuilt, %d have a baseline, %d had", rebuilt.Keys, len(got), len(want))
	}
	if after := len(alerts(t, js)); after != before {
		t.Errorf("the rebuild raised %d alerts", after-before)
	}
}
