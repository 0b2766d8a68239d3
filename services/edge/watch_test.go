package edge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// watched runs a watch until the test ends.
func watched(t testing.TB, js jetstream.JetStream) *edge.Keyset {
	t.Helper()
	set := edge.NewKeyset()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := set.Watch(ctx, js, edge.WatchOptions{Poll: 20 * time.Millisecond}); !errors.Is(err, context.Canceled) {
			t.Errorf("watch ended with %v", err)
		}
	})
	t.Cleanup(wg.Wait)
	t.Cleanup(cancel)
	return set
}

func has(set *edge.Keyset, id string, active bool) func() bool {
	return func() bool {
		k := set.ByID(id)
		return k != nil && k.Active(time.Now()) == active
	}
}

func TestWatchSurvivesARestartOfNATS(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	_, js := srv.connect()
	a, _ := newKey(t, "key_a", "org_1")
	b, _ := newKey(t, "key_b", "org_1")
	publishKey(t, js, a)
	_, watchJS := srv.connect()
	set := watched(t, watchJS)
	eventually(t, "first load", has(set, "key_a", true))
	for round := range 3 {
		srv.srv.Shutdown()
		synced := set.Synced()
		if !has(set, "key_a", round == 0)() {
			t.Fatal("the set forgot a key while NATS was away")
		}
		srv.start()
		_, js := srv.connect()
		a.Status = key.Revoked
		b.ID = fmt.Sprint("key_b", round)
		_, js2 := srv.connect()
		publishKey(t, js, a)
		publishKey(t, js2, b)
		eventually(t, "revocation after the restart", has(set, "key_a", false))
		eventually(t, "new key after the restart", has(set, b.ID, round == 0))
		eventually(t, "proof", func() bool { return set.Synced().After(synced) })
		b, _ = newKey(t, "key_b", "org_1")
		b.Status = key.Suspended
	}
}

// TestWatchReadsOnlyWhatIsLast starts on a stream with a long history.
func TestWatchReadsOnlyWhatIsLast(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 1})
	for i := range 50 {
		for k := range 20 {
			rec, _ := newKey(t, fmt.Sprint("key_", k), "org_1")
			if i < 49 {
				rec.Status = key.Suspended
			}
			publishKey(t, js, rec)
		}
	}
	set := watched(t, js)
	<-set.Loaded()
	for k := range 20 {
		if !has(set, fmt.Sprint("key_", k), true)() {
			t.Errorf("key %d is not in its last state", k)
		}
	}
	if n := set.Stats().Changes; n != 20 {
		t.Errorf("%d messages were read for 20 keys", n)
	}
}

func TestWatchRefusesWhatItCannotRead(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 1})
	rec, _ := newKey(t, "key_1", "org_1")
	publishKey(t, js, rec)
	set := watched(t, js)
	eventually(t, "key", has(set, "key_1", true))
	for _, body := range []string{"not JSON", `{"record":{"id":"key_other","hash":"00"}}`, `{"record":{"id":"key_1","hash":"xyz"}}`} {
		if _, err := js.Publish(t.Context(), bus.KeySubject("key_1"), []byte(body)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "quarantine", has(set, "key_1", false))
		publishKey(t, js, rec)
		eventually(t, "recovery", has(set, "key_1", true))
	}
}

// TestWatchOfAStreamMadeAnew: its sequences begin at 1 again and still count, a
// key that it does not know is gone, and a revoked one stays revoked.
func TestWatchOfAStreamMadeAnew(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 1})
	kept, _ := newKey(t, "key_kept", "org_1")
	lost, _ := newKey(t, "key_lost", "org_1")
	revoked, _ := newKey(t, "key_revoked", "org_1")
	for range 5 {
		publishKey(t, js, kept)
		publishKey(t, js, lost)
	}
	gone := revoked
	gone.Status = key.Revoked
	publishKey(t, js, gone)
	set := watched(t, js)
	eventually(t, "first load", has(set, "key_revoked", false))
	stream, err := js.Stream(t.Context(), bus.Keys)
	if err != nil {
		t.Fatal(err)
	}
	cfg := stream.CachedInfo().Config
	if err := js.DeleteStream(t.Context(), bus.Keys); err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	kept.Status = key.Suspended
	publishKey(t, js, kept)
	publishKey(t, js, revoked)
	eventually(t, "new history", has(set, "key_kept", false))
	eventually(t, "forgetting", func() bool { return set.ByID("key_lost") == nil })
	if !has(set, "key_revoked", false)() {
		t.Error("a stream made anew brought a revoked key back")
	}
}

func TestWatchOfAnEmptyStream(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 1})
	set := watched(t, js)
	<-set.Loaded()
	rec, _ := newKey(t, "key_1", "org_1")
	publishKey(t, js, rec)
	eventually(t, "key", has(set, "key_1", true))
}

// TestRevocationReachesThreeEdges measures from the write of a revocation to the
// refusal by three edges, over TCP, with 20,000 keys loaded, or a million in the
// long form.
func TestRevocationReachesThreeEdges(t *testing.T) {
	long := os.Getenv("LATCHKEY_TEST_LONG") == "1"
	keys, rounds := 5_000, 40
	if long {
		keys, rounds = 1_000_000, 300
	} else {
		t.Parallel()
	}
	srv := newServer(t)
	_, js := srv.connect()
	fillKeys(t, js, keys)
	type node struct {
		*Service
		stop context.CancelFunc
	}
	var edges []node
	began := time.Now()
	for i := range 3 {
		nc, _ := srv.connect()
		cfg := testConfig()
		cfg.Name = fmt.Sprint("edge-", i)
		s, err := New(t.Context(), cfg, run.Deps{NATS: nc, Metrics: prometheus.NewRegistry(), Bus: bus.Config{Partitions: 4}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		edges = append(edges, node{s, cancel})
	}
	for _, e := range edges {
		<-e.Loaded()
	}
	t.Logf("three edges loaded %d keys each in %s", keys, time.Since(began))
	tick := time.NewTicker(100 * time.Microsecond) // the measure's resolution
	defer tick.Stop()
	var took []time.Duration
	for round := range rounds {
		rec, secret := newKey(t, fmt.Sprint("key_revoked_", round), "org_1")
		publishKey(t, js, rec)
		for _, e := range edges {
			eventually(t, "the key", func() bool { return e.edge.Decide(secret, addr, edge.Need{}).Allowed() })
		}
		rec.Status = key.Revoked
		body, err := json.Marshal(key.Change{Type: key.RevokedEv, Record: rec})
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if _, err := js.Publish(t.Context(), bus.KeySubject(rec.ID), body); err != nil {
			t.Fatal(err)
		}
		for _, e := range edges {
			for deadline := start.Add(20 * time.Second); e.edge.Decide(secret, addr, edge.Need{}).Allowed(); {
				if time.Now().After(deadline) {
					t.Fatalf("round %d: the key is still allowed", round)
				}
				<-tick.C
			}
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	p99 := took[len(took)*99/100]
	t.Logf("write of a revocation to refusal on three edges, %d keys loaded: median %s, p99 %s, worst %s",
		keys, took[len(took)/2], p99, took[len(took)-1])
	if long && p99 > 100*time.Millisecond {
		t.Errorf("p99 is %s, 100 ms are promised", p99)
	}
}

// fillKeys publishes n active keys.
func fillKeys(t testing.TB, js jetstream.JetStream, n int) {
	t.Helper()
	for i := range n {
		if _, err := js.PublishAsync(bus.KeySubject(sampleID(i)), sampleChange(i, apikey.Sum(fmt.Sprint(i))), jetstream.WithStallWait(time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-t.Context().Done():
		t.Fatal("keys were not published")
	}
}
