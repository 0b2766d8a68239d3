package bus_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
)

func publish(t *testing.T, js jetstream.JetStream, subject string, n int) {
	t.Helper()
	for i := range n {
		if _, err := js.PublishMsgAsync(&nats.Msg{Subject: subject, Data: fmt.Appendf(nil, "%d", i)}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-t.Context().Done():
		t.Fatal("publish did not complete")
	}
}

func TestEnsureKeepsPartitions(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 4})
	if err := bus.Ensure(t.Context(), js, bus.Config{Partitions: 16}); err != nil {
		t.Fatal(err)
	}
	if n, err := bus.PartitionCount(t.Context(), js); n != 4 || err != nil {
		t.Errorf("%d partitions, %v; want the 4 of the beginning", n, err)
	}
}

func TestRawSubjectGoesToThePartition(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 16})
	s, err := js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		key := fmt.Sprintf("key.%d", i)
		ack, err := js.Publish(t.Context(), usage.RawSubject+usage.SubjectToken(key), nil)
		if err != nil {
			t.Fatal(err)
		}
		m, err := s.GetMsg(t.Context(), ack.Sequence)
		if err != nil {
			t.Fatal(err)
		}
		if want := usage.Subject(usage.Partition(key, 16)); m.Subject != want {
			t.Errorf("%s went to %s, want %s", key, m.Subject, want)
		}
	}
}

// TestPartitionsMove has two replicas share the partitions; when one dies the
// other reads on from the last acknowledgment, each message in order.
func TestPartitionsMove(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 2})
	publish(t, js, "usage.v1.0", 500)

	var mu sync.Mutex
	acked, total := uint64(0), 0
	read := func(stopAfter int, done func()) func(context.Context, *bus.Partition) error {
		return func(ctx context.Context, p *bus.Partition) error {
			floor, err := p.AckFloor(ctx)
			if err != nil {
				return err
			}
			if err := p.Reset(ctx, floor+1); err != nil {
				return err
			}
			for n := 0; ; {
				msgs, err := p.Fetch(ctx, 10, 1<<20, time.Second)
				if err != nil {
					return err
				}
				if len(msgs) == 0 {
					continue
				}
				if msgs[0].Sequence != acked+1 {
					t.Errorf("first message is %d, want %d", msgs[0].Sequence, acked+1)
				}
				last := msgs[len(msgs)-1]
				if err := p.Ack(ctx, last); err != nil {
					return err
				}
				mu.Lock()
				acked = last.Sequence
				total += len(msgs)
				all := total >= 500
				mu.Unlock()
				if n += len(msgs); n >= stopAfter || all {
					done()
					<-ctx.Done()
					return nil
				}
			}
		}
	}
	first, stopFirst := context.WithCancel(t.Context())
	if err := bus.Partitions(first, js, bus.Collector, bus.Options{}, read(100, stopFirst)); err != nil {
		t.Fatal(err)
	}
	second, stopSecond := context.WithCancel(t.Context())
	if err := bus.Partitions(second, js, bus.Collector, bus.Options{}, read(1000, stopSecond)); err != nil {
		t.Fatal(err)
	}
	if total != 500 || acked != 500 {
		t.Errorf("read %d messages up to %d", total, acked)
	}
}

func TestFullStreamRefusesAndTrimMakesRoom(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 2, UsageMaxBytes: 64 << 10})
	var err error
	stored := 0
	for ; stored < 1000; stored++ {
		if _, err = js.Publish(t.Context(), "usage.v1.1", make([]byte, 1000)); err != nil {
			break
		}
	}
	if !bus.IsFull(err) {
		t.Fatalf("a full stream answered %v after %d messages", err, stored)
	}
	consume := func(service string) {
		ctx, cancel := context.WithCancel(t.Context())
		seen := 0
		if err := bus.Partitions(ctx, js, service, bus.Options{}, func(ctx context.Context, p *bus.Partition) error {
			if err := p.Reset(ctx, 1); err != nil {
				return err
			}
			for seen < stored {
				msgs, err := p.Fetch(ctx, 100, 1<<20, time.Second)
				if err != nil {
					return err
				}
				seen += len(msgs)
				if len(msgs) > 0 {
					if err := p.Ack(ctx, msgs[len(msgs)-1]); err != nil {
						return err
					}
				}
			}
			cancel()
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	consume(bus.Collector)
	if _, err := bus.Trim(t.Context(), js, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "usage.v1.1", make([]byte, 1000)); !bus.IsFull(err) {
		t.Fatalf("trimmed what the detector has not read: %v", err)
	}
	consume(bus.Detector)
	first, err := bus.Trim(t.Context(), js, 0)
	if err != nil || first != uint64(stored)+1 {
		t.Fatalf("trimmed to %d of %d, %v", first, stored, err)
	}
	if _, err := js.Publish(t.Context(), "usage.v1.1", make([]byte, 1000)); err != nil {
		t.Fatalf("publish after trimming: %v", err)
	}
}

// TestStaleAcknowledgment has a former owner acknowledge after the reset of its
// successor, whose own acknowledgments JetStream then ignores: it must notice.
func TestStaleAcknowledgment(t *testing.T) {
	t.Parallel()
	nc, js := natstest.Bus(t, bus.Config{Partitions: 1})
	publish(t, js, "usage.v1.0", 100)
	ctx, cancel := context.WithCancel(t.Context())
	rounds := 0
	if err := bus.Partitions(ctx, js, bus.Collector, bus.Options{}, func(ctx context.Context, p *bus.Partition) error {
		rounds++
		floor, err := p.AckFloor(ctx)
		if err != nil {
			return err
		}
		if err := p.Reset(ctx, floor+1); err != nil {
			return err
		}
		for {
			msgs, err := p.Fetch(ctx, 50, 1<<20, 300*time.Millisecond)
			if err != nil {
				return err
			}
			if len(msgs) == 0 { // and the floor is where it should be
				if floor, err = p.AckFloor(ctx); floor == 100 {
					cancel()
				}
				if err != nil || floor == 100 {
					return err
				}
				continue
			}
			if rounds == 1 {
				// As if many deliveries before ours had been acknowledged.
				if _, err := nc.Request("$JS.ACK.USAGE.collector-0.1.10.5000.1.0", []byte("+ACK"), time.Second); err != nil {
					return err
				}
			}
			if err := p.Ack(ctx, msgs[len(msgs)-1]); err != nil {
				return err
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	if rounds < 2 {
		t.Errorf("taken %d times, the first reader should have noticed", rounds)
	}
}

// TestUnknownPartitionIsRefused: nobody would read what it holds.
func TestUnknownPartitionIsRefused(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 4})
	for _, subject := range []string{"usage.v1.4", "usage.v1.01", "usage.v1.x"} {
		if _, err := js.Publish(t.Context(), subject, nil); err == nil {
			t.Errorf("%s was accepted", subject)
		}
	}
}

func TestLagCountsEvents(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 1})
	for range 3 {
		if _, err := js.Publish(t.Context(), "usage.v1.0", []byte(`[{"id":"a"},{"id":"b"}]`)); err != nil {
			t.Fatal(err)
		}
	}
	s, err := js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Consumer(t.Context(), bus.ConsumerName(bus.Collector, 0))
	if err != nil {
		t.Fatal(err)
	}
	lag, err := bus.ReadLag(t.Context(), s, c.CachedInfo())
	if err != nil || lag.Messages != 3 || lag.Events != 6 || lag.Age <= 0 {
		t.Errorf("%+v, %v; want 3 messages of 6 events", lag, err)
	}
}
