package edge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/pkg/usage"
	schema "github.com/latchkey-dev/latchkey/schemas/usage"
)

// outbox takes usage events from the request path and brings them to JetStream.
//
//	Enqueue → queue in memory → (flush interval) → frames in the store → JetStream
//
// Enqueue never waits. Every flush interval the queue becomes frames, one or
// more a partition, which are written to the store and then published in order;
// the store forgets a frame once JetStream has acknowledged it. So with a spool
// on disk a process that is killed loses what it took since the last flush and
// nothing else, whether NATS was there or not.
type outbox struct {
	opts    outboxOptions
	pack    packer
	store   store
	nc      *nats.Conn
	js      jetstream.JetStream
	log     *slog.Logger
	metrics *metrics
	tally   *tally

	mu     sync.Mutex
	queue  []schema.Event
	closed bool

	flushMu sync.Mutex
	spare   []schema.Event // the other half of the queue, empty
	full    chan struct{}  // the queue is half full: flush now
	fresh   chan struct{}  // the store has a new frame

	stopFlush, stopSend context.CancelFunc
	flushing, sending   sync.WaitGroup
	once                sync.Once
	closeErr            error
}

// packer makes frames of events.
type packer interface {
	Pack(events []schema.Event) []usage.Frame
}

type outboxOptions struct {
	queue    int           // events in memory at most
	interval time.Duration // between flushes
	dir      string        // of the spool, "" for none
	maxBytes int64         // of the spool, or of the frames in memory without one
	window   int           // frames on their way at once
	timeout  time.Duration // for an acknowledgment
}

// Reasons for which events are dropped.
const (
	dropQueueFull = "queue_full"  // more came than a flush interval can hold
	dropSpoolFull = "spool_full"  // NATS was away for longer than the spool lasts
	dropSpoolBad  = "spool_error" // the disk refuses, or returned something else than was written
	dropCrash     = "crash"       // taken by a process that was killed before its next flush
	dropShutdown  = "shutdown"    // no spool, and NATS was away when the edge stopped
)

var dropReasons = []string{dropQueueFull, dropSpoolFull, dropSpoolBad, dropCrash, dropShutdown}

// openOutbox starts an outbox; close stops it.
func openOutbox(nc *nats.Conn, pack packer, opts outboxOptions, log *slog.Logger, m *metrics) (*outbox, error) {
	js, err := jetstream.New(nc,
		jetstream.WithPublishAsyncMaxPending(2*opts.window), jetstream.WithPublishAsyncTimeout(opts.timeout))
	if err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	o := &outbox{
		opts: opts, pack: pack, nc: nc, js: js, log: log, metrics: m,
		queue: make([]schema.Event, 0, min(1024, opts.queue)), spare: make([]schema.Event, 0, min(1024, opts.queue)),
		full: make(chan struct{}, 1), fresh: make(chan struct{}, 1),
	}
	if err := o.openStore(); err != nil {
		return nil, err
	}
	m.backlog = o.store.backlog
	var flush, send context.Context
	flush, o.stopFlush = context.WithCancel(context.Background())
	send, o.stopSend = context.WithCancel(context.Background())
	o.flushing.Go(func() { o.flushLoop(flush) })
	o.sending.Go(func() { o.sendLoop(send) })
	return o, nil
}

func (o *outbox) openStore() error {
	if o.opts.dir == "" {
		o.store, o.tally = &memoryStore{max: o.opts.maxBytes}, newTally()
		return nil
	}
	spool, err := openSpool(o.opts.dir, o.opts.maxBytes, o.log)
	if err != nil {
		return err
	}
	if o.tally, err = openTally(filepath.Join(o.opts.dir, "tally")); err != nil {
		_ = spool.close()
		return err
	}
	o.store = spool
	if lost := o.tally.lost(); lost > 0 {
		o.log.Warn("the process before this one was killed with events that it had not written down", "events", lost)
		o.metrics.dropped(dropCrash, int(lost))
	}
	if events, bytes := spool.backlog(); events > 0 {
		o.log.Info("the spool holds events of an earlier process", "events", events, "bytes", bytes)
	}
	return nil
}

// Enqueue copies an event, or drops and counts it; it never waits for anything
// but the copies of others.
func (o *outbox) Enqueue(ev *schema.Event) bool {
	o.mu.Lock()
	if o.closed || len(o.queue) >= o.opts.queue {
		o.mu.Unlock()
		o.metrics.dropped(dropQueueFull, 1)
		return false
	}
	o.queue = append(o.queue, *ev)
	o.tally.taken.Add(1)
	half := len(o.queue) == o.opts.queue/2
	o.mu.Unlock()
	if half {
		poke(o.full)
	}
	return true
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (o *outbox) flushLoop(ctx context.Context) {
	tick := time.NewTicker(o.opts.interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			o.flush()
			return
		case <-tick.C:
		case <-o.full:
		}
		o.flush()
	}
}

// flush writes what is queued to the store.
func (o *outbox) flush() {
	o.flushMu.Lock()
	defer o.flushMu.Unlock()
	o.mu.Lock()
	events := o.queue
	o.queue = o.spare[:0]
	o.mu.Unlock()
	if len(events) == 0 {
		o.spare = events
		return
	}
	for _, f := range o.pack.Pack(events) {
		if err := o.store.append(f); err != nil {
			o.refused(f, err)
		}
		o.tally.settled.Add(uint64(f.Events))
	}
	clear(events) // their texts may be of large requests
	o.spare = events[:0]
	poke(o.fresh)
}

func (o *outbox) refused(f frame, err error) {
	if errors.Is(err, errFull) {
		if o.metrics.dropped(dropSpoolFull, f.Events) {
			o.log.Error("the spool is full, events are dropped until NATS takes some", "bytes", o.opts.maxBytes)
		}
		return
	}
	if o.metrics.dropped(dropSpoolBad, f.Events) {
		o.log.Error("write spool, events are dropped", "error", err)
	}
}

// sent is a frame on its way.
type sent struct {
	frame  frame
	future jetstream.PubAckFuture
}

// sendLoop publishes the store's frames in order. Whenever one fails it begins
// again at the first that is not acknowledged: what arrived already is known to
// JetStream by its message id. It does so with one frame alone, because a stream
// that was full and takes messages again could otherwise take the last of many first.
func (o *outbox) sendLoop(ctx context.Context) {
	var flying []sent
	window, wait := o.opts.window, time.Duration(0)
	states := o.nc.StatusChanged(nats.CONNECTED, nats.RECONNECTING, nats.DISCONNECTED)
	defer o.nc.RemoveStatusListener(states)
	for {
		if wait > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			case <-states:
			}
		}
		stored := false
		err := o.fill(&flying, window)
		if err == nil {
			stored, err = o.settle(ctx, states, &flying, window)
		}
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			wait = 0
			if stored {
				window = o.opts.window
			}
			continue
		}
		o.log.Debug("publish usage events, trying again", "error", err)
		wait = min(max(2*wait, 20*time.Millisecond), 2*time.Second)
		o.metrics.retries.Inc()
		flying, window = flying[:0], 1
		o.store.rewind()
	}
}

var errAway = errors.New("NATS is away")

// fill publishes frames until the window is full or the store is empty.
func (o *outbox) fill(flying *[]sent, window int) error {
	for len(*flying) < window {
		if !o.nc.IsConnected() {
			return errAway
		}
		f, ok, err := o.store.next()
		if err != nil {
			o.unreadable(err)
			return err
		}
		if !ok {
			return nil
		}
		future, err := o.js.PublishMsgAsync(f.Message())
		if err != nil {
			return fmt.Errorf("publish frame: %w", err)
		}
		*flying = append(*flying, sent{f, future})
	}
	return nil
}

// unreadable gives up what the disk does not return: waiting would not bring it
// back, and everything behind it waits as well.
func (o *outbox) unreadable(err error) {
	spool, ok := o.store.(*diskSpool)
	if !ok {
		return
	}
	frames := spool.skip()
	o.metrics.dropped(dropSpoolBad, frames)
	o.log.Error("read spool, the rest of the segment is given up", "frames", frames, "error", err)
}

// settle waits for the first acknowledgment, or for something to publish. It
// reports whether a frame was stored.
func (o *outbox) settle(ctx context.Context, states <-chan nats.Status, flying *[]sent, window int) (bool, error) {
	if len(*flying) == 0 {
		select {
		case <-ctx.Done():
		case <-o.fresh:
		case <-states:
		}
		return false, nil
	}
	fresh := o.fresh
	if len(*flying) >= window {
		fresh = nil
	}
	first := (*flying)[0]
	select {
	case <-ctx.Done():
		return false, nil
	case <-fresh:
		return false, nil
	case s := <-states:
		if s != nats.CONNECTED {
			return false, errAway
		}
		return false, nil
	case err := <-first.future.Err():
		return false, fmt.Errorf("store frame: %w", err)
	case <-first.future.Ok():
	}
	o.store.release()
	o.metrics.published.Add(float64(first.frame.Events))
	*flying = append((*flying)[:0], (*flying)[1:]...)
	return true, nil
}

// drained reports whether everything that was taken is stored in JetStream.
func (o *outbox) drained() bool {
	o.flush()
	events, _ := o.store.backlog()
	return events == 0
}

// close takes no more events, writes down what is queued, and gives JetStream
// until ctx is done to take it. What is left waits on disk for the next start;
// without a disk it is dropped and counted. It may be called twice.
func (o *outbox) close(ctx context.Context) error {
	o.once.Do(func() { o.closeErr = o.shut(ctx) })
	return o.closeErr
}

func (o *outbox) shut(ctx context.Context) error {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.stopFlush()
	o.flushing.Wait()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for left, _ := o.store.backlog(); left > 0 && ctx.Err() == nil && o.nc.IsConnected(); left, _ = o.store.backlog() {
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	o.stopSend()
	o.sending.Wait()
	if left, _ := o.store.backlog(); left > 0 {
		if o.opts.dir == "" {
			o.metrics.dropped(dropShutdown, left)
			o.log.Error("stopped with events that NATS did not take, they are lost: set LATCHKEY_EDGE_SPOOL to keep them", "events", left)
		} else {
			o.log.Info("stopped with events in the spool, the next start sends them", "events", left)
		}
	}
	return errors.Join(o.store.close(), o.tally.unmap())
}
