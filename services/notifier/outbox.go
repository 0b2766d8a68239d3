package notifier

import (
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/services/internal/delivery"
)

// outbox holds what is to be told in a bucket, so that intent comes before the
// attempt and a crash at any moment neither forgets nor repeats. An attempt is
// claimed by compare-and-set, which is also what keeps two notifiers apart.
type outbox struct {
	kv      jetstream.KeyValue
	log     *slog.Logger
	now     func() time.Time
	workers int
	lease   time.Duration
	backoff func(attempt int) time.Duration
	give    time.Duration // up after
	// attempt makes one attempt at a claimed delivery.
	attempt func(context.Context, *delivery.Delivery) outcome
	// done is told of every attempt's end.
	done func(*delivery.Delivery, outcome)
	// closeWindow is called when an owner's hour is over, see storm.go.
	closeWindow func(ctx context.Context, bucketKey string) error
}

// add records an intent; created is false if it was recorded before.
func (o *outbox) add(ctx context.Context, bucketKey string, d *delivery.Delivery) (created bool, err error) {
	data, err := json.Marshal(d)
	if err != nil {
		return false, fmt.Errorf("encode delivery: %w", err)
	}
	_, err = o.kv.Create(ctx, bucketKey, data)
	if errors.Is(err, jetstream.ErrKeyExists) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("record delivery: %w", err)
	}
	return true, nil
}

// get reads a delivery; nil if there is none.
func (o *outbox) get(ctx context.Context, bucketKey string) (*delivery.Delivery, uint64, error) {
	entry, err := o.kv.Get(ctx, bucketKey)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read delivery: %w", err)
	}
	var d delivery.Delivery
	if err := json.Unmarshal(entry.Value(), &d); err != nil {
		return nil, 0, fmt.Errorf("decode delivery: %w", err)
	}
	return &d, entry.Revision(), nil
}

// run attempts what is due until ctx is done, then waits for the attempts in
// flight; they end by their own time-outs or when hard is done.
func (o *outbox) run(ctx, hard context.Context) error {
	watcher, err := o.kv.WatchAll(ctx, jetstream.IgnoreDeletes())
	if err != nil {
		return fmt.Errorf("watch deliveries: %w", err)
	}
	defer func() { _ = watcher.Stop() }()
	var (
		q        = newSchedule()
		timer    = time.NewTimer(time.Hour)
		slots    = make(chan struct{}, o.workers)
		finished = make(chan string, o.workers)
		inFlight = map[string]bool{}
		wg       sync.WaitGroup
	)
	defer wg.Wait()
	defer timer.Stop()
	for {
		for len(inFlight) < o.workers {
			bucketKey, ok := q.pop(o.now(), inFlight)
			if !ok {
				break
			}
			inFlight[bucketKey] = true
			slots <- struct{}{}
			wg.Go(func() {
				o.handle(hard, bucketKey)
				<-slots
				finished <- bucketKey
			})
		}
		timer.Reset(q.wait(o.now()))
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case bucketKey := <-finished:
			delete(inFlight, bucketKey)
		case entry, ok := <-watcher.Updates():
			if !ok {
				if ctx.Err() != nil {
					return nil
				}
				return errors.New("watch deliveries: the watch ended")
			}
			if entry != nil {
				q.update(entry.Key(), dueTime(entry))
			}
		}
	}
}

// dueTime is when an entry wants to be handled; zero is never.
func dueTime(entry jetstream.KeyValueEntry) time.Time {
	if strings.HasPrefix(entry.Key(), ownerPrefix) {
		var w window
		switch err := json.Unmarshal(entry.Value(), &w); {
		case err != nil:
			return time.Time{}
		case w.Closing != nil:
			return entry.Created()
		case w.held() > 0:
			return w.End
		}
		return time.Time{}
	}
	var d delivery.Delivery
	if json.Unmarshal(entry.Value(), &d) != nil || d.State != delivery.Pending {
		return time.Time{}
	}
	if due := d.Due(); !due.IsZero() {
		return due
	}
	return d.CreatedAt
}

// handle makes what is due of one entry happen and records it.
func (o *outbox) handle(ctx context.Context, bucketKey string) {
	var err error
	if strings.HasPrefix(bucketKey, ownerPrefix) {
		err = o.closeWindow(ctx, bucketKey)
	} else {
		err = o.deliver(ctx, bucketKey)
	}
	if err != nil && ctx.Err() == nil {
		o.log.Error("cannot handle a delivery now", "delivery", bucketKey, "error", err)
	}
}

func (o *outbox) deliver(ctx context.Context, bucketKey string) error {
	d, revision, err := o.get(ctx, bucketKey)
	if err != nil || d == nil || d.State != delivery.Pending || d.Due().After(o.now()) {
		return err
	}
	d.Attempts++
	d.LeaseUntil = o.now().Add(o.lease)
	claim, err := o.update(ctx, bucketKey, d, revision)
	if errors.Is(err, errTaken) {
		return nil // another notifier is at it
	}
	if err != nil {
		return err
	}
	result := o.tryWithin(ctx, d)
	o.settle(d, result)
	o.done(d, result)
	return o.record(ctx, bucketKey, d, claim)
}

// tryWithin makes an attempt that ends before its lease does.
func (o *outbox) tryWithin(ctx context.Context, d *delivery.Delivery) outcome {
	ctx, cancel := context.WithTimeout(ctx, o.lease*9/10)
	defer cancel()
	return o.attempt(ctx, d)
}

// settle writes an attempt's outcome into its delivery.
func (o *outbox) settle(d *delivery.Delivery, result outcome) {
	now := o.now()
	d.LeaseUntil, d.Answer = time.Time{}, headerText(result.answer)
	switch {
	case result.sent:
		d.State, d.SentAt = delivery.Sent, &now
	case result.refused:
		d.State = delivery.Refused
	case now.Sub(d.CreatedAt) > o.give:
		d.State = delivery.Abandoned
	default:
		d.NextAttemptAt = now.Add(o.backoff(d.Attempts))
	}
	if d.State != delivery.Pending {
		d.Payload = nil
	}
}

// record writes the outcome; it does not give up while the process lives, for
// an outcome that is not recorded is an attempt made again.
func (o *outbox) record(ctx context.Context, bucketKey string, d *delivery.Delivery, claim uint64) error {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		_, err := o.update(ctx, bucketKey, d, claim)
		if err == nil || errors.Is(err, errTaken) {
			return nil // taken: the write before got through, its answer did not
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// errTaken tells that an entry changed since it was read.
var errTaken = errors.New("changed by another")

func (o *outbox) update(ctx context.Context, bucketKey string, v any, revision uint64) (uint64, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("encode delivery: %w", err)
	}
	next, err := o.kv.Update(ctx, bucketKey, data, revision)
	if errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
		return 0, errTaken
	}
	if err != nil {
		return 0, fmt.Errorf("record delivery: %w", err)
	}
	return next, nil
}

// schedule orders entries by the time that they are due.
type schedule struct {
	items []scheduled
	due   map[string]time.Time
}

type scheduled struct {
	bucketKey string
	due       time.Time
}

func newSchedule() *schedule { return &schedule{due: make(map[string]time.Time)} }

func (s *schedule) Len() int           { return len(s.items) }
func (s *schedule) Less(i, j int) bool { return s.items[i].due.Before(s.items[j].due) }
func (s *schedule) Swap(i, j int)      { s.items[i], s.items[j] = s.items[j], s.items[i] }
func (s *schedule) Push(x any)         { s.items = append(s.items, x.(scheduled)) }
func (s *schedule) Pop() any {
	last := s.items[len(s.items)-1]
	s.items = s.items[:len(s.items)-1]
	return last
}

// update sets when an entry is due; zero forgets it. What stood for it before
// stays in the heap and is skipped when it comes up.
func (s *schedule) update(bucketKey string, due time.Time) {
	if due.IsZero() {
		delete(s.due, bucketKey)
		return
	}
	s.due[bucketKey] = due
	heap.Push(s, scheduled{bucketKey, due})
}

// pop gives an entry that is due and not busy, and forgets it: its next change
// schedules it anew. A busy one is looked at again a moment later.
func (s *schedule) pop(now time.Time, busy map[string]bool) (string, bool) {
	for len(s.items) > 0 && !s.items[0].due.After(now) {
		next := heap.Pop(s).(scheduled)
		if due, ok := s.due[next.bucketKey]; !ok || !due.Equal(next.due) {
			continue
		}
		if busy[next.bucketKey] {
			s.update(next.bucketKey, now.Add(20*time.Millisecond))
			continue
		}
		// Should handling fail without a change of the entry, look again.
		s.update(next.bucketKey, now.Add(5*time.Second))
		return next.bucketKey, true
	}
	return "", false
}

// wait is how long nothing is due.
func (s *schedule) wait(now time.Time) time.Duration {
	if len(s.items) == 0 {
		return time.Hour
	}
	return max(0, s.items[0].due.Sub(now))
}
