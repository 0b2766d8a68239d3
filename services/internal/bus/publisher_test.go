package bus_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	publisher "github.com/latchkey-dev/latchkey/pkg/usage"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
)

func event(i int) usage.Event {
	return usage.Event{
		Time: time.Now().UTC(), OrgID: "org_acme", KeyID: fmt.Sprintf("key_%d", i%40), SourceIP: netip.MustParseAddr("203.0.113.7"),
		Method: "GET", Route: "/v1/devices", Status: 200, Decision: usage.Allow,
	}
}

// stored reads every event of USAGE, by id, and fails on one that is there twice.
func stored(t *testing.T, js jetstream.JetStream) map[string]usage.Event {
	t.Helper()
	s, err := js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	info := s.CachedInfo().State
	events := map[string]usage.Event{}
	for seq := info.FirstSeq; seq <= info.LastSeq; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		if err := usage.Decode(m.Header.Get("Content-Type"), m.Data, time.Now(), func(i int, ev *usage.Event, err error) {
			if err != nil {
				t.Errorf("message %d, event %d: %v", seq, i, err)
				return
			}
			if _, twice := events[ev.ID]; twice || ev.ID == "" {
				t.Errorf("id %q is there twice", ev.ID)
			}
			if m.Subject != usage.Subject(usage.Partition(ev.KeyID, 16)) {
				t.Errorf("key %s on %s", ev.KeyID, m.Subject)
			}
			events[ev.ID] = *ev
		}); err != nil {
			t.Fatal(err)
		}
	}
	return events
}

func TestPublisher(t *testing.T) {
	t.Parallel()
	nc, js := natstest.Bus(t, bus.Config{})
	p, err := publisher.New(t.Context(), nc, publisher.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5000 {
		ev := event(i)
		if !p.Enqueue(&ev) {
			t.Fatalf("event %d was dropped: %+v", i, p.Stats())
		}
	}
	if err := p.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	batch := make([]usage.Event, 700)
	for i := range batch {
		batch[i] = event(i)
	}
	if err := p.Publish(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	late := event(1)
	p.Enqueue(&late)
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p.Enqueue(&late) {
		t.Error("a closed publisher took an event")
	}
	if got := len(stored(t, js)); got != 5701 {
		t.Errorf("%d events stored, want 5701", got)
	}
	if s := p.Stats(); s.Events != 5701 || s.Queued != 0 || s.Frames > 200 {
		t.Errorf("stats %+v", s)
	}
}

func TestPublisherWithoutServer(t *testing.T) {
	t.Parallel()
	server := natstest.Start(t)
	nc := natstest.Connect(t, server)
	unsent := make(chan publisher.Frame, 100)
	p, err := publisher.New(t.Context(), nc, publisher.Options{
		Partitions: 16, AckTimeout: 100 * time.Millisecond, MaxEvents: 10, Queue: 100,
		OnUnsent: func(f publisher.Frame) { unsent <- f },
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 25 {
		ev := event(i * 40)
		p.Enqueue(&ev)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	close(unsent)
	n := 0
	for f := range unsent {
		n += f.Events
	}
	if n != 25 {
		t.Errorf("%d events came back, want 25", n)
	}
}

func TestPublisherAndAFullStream(t *testing.T) {
	t.Parallel()
	nc, _ := natstest.Bus(t, bus.Config{UsageMaxBytes: 4 << 10})
	p, err := publisher.New(t.Context(), nc, publisher.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close(context.Background())
	for i := range 1000 {
		if err = p.Publish(t.Context(), []usage.Event{event(i)}); err != nil {
			break
		}
	}
	if !errors.Is(err, publisher.ErrFull) {
		t.Errorf("got %v, want ErrFull", err)
	}
}

func TestEnqueueDoesNotAllocate(t *testing.T) {
	server := natstest.Start(t)
	nc := natstest.Connect(t, server)
	p, err := publisher.New(t.Context(), nc, publisher.Options{Partitions: 16, MaxEvents: 5000, MaxDelay: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	defer p.Close(ctx)
	ev := event(1)
	if n := testing.AllocsPerRun(1000, func() { p.Enqueue(&ev) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
