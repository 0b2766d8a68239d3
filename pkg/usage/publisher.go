package usage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Options of a [Publisher]. The zero value is good.
type Options struct {
	// Partitions of the USAGE stream; 0 asks the stream when the publisher is
	// made, which needs a connection then.
	Partitions int
	// MaxEvents in a frame, 200 if 0.
	MaxEvents int
	// MaxBytes of a frame, 256 KiB if 0; one event alone may be larger.
	MaxBytes int
	// MaxDelay is how long an event waits for company, 20 ms if 0.
	MaxDelay time.Duration
	// Queue is how many events may wait to be sent, 65,536 if 0. Beyond it
	// Enqueue drops and counts.
	Queue int
	// Window is how many frames may wait for their acknowledgment, 1,024 if 0.
	Window int
	// AckTimeout is how long one is waited for, 5 s if 0.
	AckTimeout time.Duration
	// Mode is [usage.ModeHistory] for imports, else empty.
	Mode string
	// OnUnsent is given the frames of queued events that could not be stored (no
	// connection, stream full, no answer in time), once each and in order; then
	// they are the caller's. Without it they are sent again until Close, and the
	// queue fills behind them.
	OnUnsent func(Frame)
}

func (o Options) withDefaults(maxPayload int64) Options {
	o.MaxEvents = cmp.Or(o.MaxEvents, 200)
	o.MaxBytes = cmp.Or(o.MaxBytes, 256<<10)
	if maxPayload > 8<<10 {
		o.MaxBytes = min(o.MaxBytes, int(maxPayload)-4<<10)
	}
	o.MaxDelay = cmp.Or(o.MaxDelay, 20*time.Millisecond)
	o.Queue = cmp.Or(o.Queue, 1<<16)
	o.Window = cmp.Or(o.Window, 1024)
	o.AckTimeout = cmp.Or(o.AckTimeout, 5*time.Second)
	return o
}

// Stats counts since the publisher was made.
type Stats struct {
	// Queued events wait for being stored right now.
	Queued int64
	// Enqueued were taken by Enqueue, Dropped were not, for the queue was full.
	Enqueued, Dropped int64
	// Events and Frames were stored, by Enqueue, Publish or PublishFrames.
	Events, Frames int64
	// Unsent events were handed to OnUnsent, or were left when Close gave up.
	Unsent int64
	// Retries is how often a frame was sent again.
	Retries int64
}

// Publisher sends events to the USAGE stream. It is safe for concurrent use and
// does not own the connection.
type Publisher struct {
	js   jetstream.JetStream
	opts Options

	prefix     string
	frameCount atomic.Uint64
	frameSize  atomic.Int64

	parts     []part
	free      chan *batch
	allocated atomic.Int64
	batches   int64
	ready     chan work
	inflight  chan flight

	flushing sync.Mutex
	closing  sync.RWMutex
	closed   bool
	stop     context.CancelFunc
	ctx      context.Context
	done     sync.WaitGroup

	queued, enqueued, dropped, events, framesSent, unsent, retries atomic.Int64
}

// part is where the events of one partition gather.
type part struct {
	mu    sync.Mutex
	batch *batch
	_     [40]byte // its own cache line
}

type batch struct {
	partition int
	since     time.Time
	events    []usage.Event
}

// work is a batch to be sent, or a marker that Flush waits for.
type work struct {
	batch *batch
	mark  chan struct{}
}

// flight is a frame on its way, or a marker.
type flight struct {
	frame  Frame
	future jetstream.PubAckFuture
	err    error
	mark   chan struct{}
}

// New makes a publisher over a connection.
func New(ctx context.Context, nc *nats.Conn, opts Options) (*Publisher, error) {
	opts = opts.withDefaults(nc.MaxPayload())
	js, err := jetstream.New(nc,
		jetstream.WithPublishAsyncMaxPending(2*opts.Window),
		jetstream.WithPublishAsyncTimeout(opts.AckTimeout))
	if err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	if opts.Partitions == 0 {
		if opts.Partitions, err = partitions(ctx, js); err != nil {
			return nil, err
		}
	}
	p := &Publisher{
		js: js, opts: opts, prefix: randomPrefix(), parts: make([]part, opts.Partitions),
		// Each partition may hold one that is not full.
		batches: int64(max(opts.Queue/opts.MaxEvents, 1) + opts.Partitions),
	}
	p.free = make(chan *batch, p.batches)
	p.ready = make(chan work, p.batches+1)
	p.inflight = make(chan flight, opts.Window)
	p.frameSize.Store(4096)
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.done.Go(p.send)
	p.done.Go(p.confirm)
	p.done.Go(p.tick)
	return p, nil
}

// partitions is how many partitions the stream was made with.
func partitions(ctx context.Context, js jetstream.JetStream) (int, error) {
	s, err := js.Stream(ctx, "USAGE")
	if err != nil {
		return 0, fmt.Errorf("look up stream USAGE: %w", err)
	}
	n, err := strconv.Atoi(s.CachedInfo().Config.Metadata["latchkey.partitions"])
	if err != nil || n < 1 {
		return 0, errors.New("stream USAGE does not tell its partitions")
	}
	return n, nil
}

// Enqueue takes an event to be sent soon, or says false and counts it: the
// queue is full, or the publisher is closed. It never waits. The event must be
// normalized and valid; it is copied.
func (p *Publisher) Enqueue(ev *usage.Event) bool {
	i := usage.Partition(ev.KeyID, len(p.parts))
	pt := &p.parts[i]
	pt.mu.Lock()
	defer pt.mu.Unlock()
	if pt.batch == nil {
		if pt.batch = p.takeBatch(); pt.batch == nil {
			p.dropped.Add(1)
			return false
		}
		pt.batch.partition, pt.batch.since = i, time.Now()
	}
	p.enqueued.Add(1)
	p.queued.Add(1)
	pt.batch.events = append(pt.batch.events, *ev)
	if len(pt.batch.events) == p.opts.MaxEvents {
		p.hand(pt)
	}
	return true
}

// takeBatch is an empty batch, nil if all are in use or the publisher is closed.
func (p *Publisher) takeBatch() *batch {
	if p.ctx.Err() != nil {
		return nil
	}
	select {
	case b := <-p.free:
		return b
	default:
	}
	if p.allocated.Add(1) > p.batches {
		p.allocated.Add(-1)
		return nil
	}
	return &batch{events: make([]usage.Event, 0, p.opts.MaxEvents)}
}

// hand gives the batch of a locked part to the sender; there is room for all.
func (p *Publisher) hand(pt *part) {
	p.ready <- work{batch: pt.batch}
	pt.batch = nil
}

func (p *Publisher) tick() {
	ticker := time.NewTicker(max(p.opts.MaxDelay/2, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case now := <-ticker.C:
			p.handOlder(now.Add(-p.opts.MaxDelay / 2))
		}
	}
}

func (p *Publisher) handOlder(than time.Time) {
	for i := range p.parts {
		pt := &p.parts[i]
		pt.mu.Lock()
		if pt.batch != nil && !pt.batch.since.After(than) {
			p.hand(pt)
		}
		pt.mu.Unlock()
	}
}

func (p *Publisher) send() {
	defer close(p.inflight)
	var frames []Frame
	var list []*usage.Event
	for w := range p.ready {
		if w.mark != nil {
			p.inflight <- flight{mark: w.mark}
			continue
		}
		for i := range w.batch.events {
			list = append(list, &w.batch.events[i])
		}
		giveIDs([][]*usage.Event{list})
		frames = p.frames(frames[:0], w.batch.partition, list)
		list = list[:0]
		clear(w.batch.events)
		w.batch.events = w.batch.events[:0]
		p.free <- w.batch
		for i := range frames {
			f := flight{frame: frames[i]}
			f.future, f.err = p.js.PublishMsgAsync(frames[i].message())
			p.inflight <- f
		}
	}
}

func (p *Publisher) confirm() {
	for f := range p.inflight {
		if f.mark != nil {
			close(f.mark)
			continue
		}
		err := f.err
		if err == nil {
			err = await(p.ctx, f.future)
		}
		if err != nil && p.opts.OnUnsent == nil {
			err = p.untilStored(f.frame, err)
		}
		p.queued.Add(-int64(f.frame.Events))
		if err == nil {
			p.sent(f.frame)
			continue
		}
		p.unsent.Add(int64(f.frame.Events))
		if p.opts.OnUnsent != nil {
			p.opts.OnUnsent(f.frame)
		}
	}
}

// untilStored sends a frame until it is stored or the publisher gives up.
func (p *Publisher) untilStored(frame Frame, err error) error {
	for err != nil && p.ctx.Err() == nil {
		if err = p.again(p.ctx, frame, err); errors.Is(err, ErrFull) {
			select {
			case <-p.ctx.Done():
			case <-time.After(500 * time.Millisecond):
			}
			err = errNotSent
		}
	}
	return err
}

func (p *Publisher) sent(f Frame) {
	p.events.Add(int64(f.Events))
	p.framesSent.Add(1)
}

// Publish sends events and returns once JetStream has stored all of them. Those
// without an id are given one, in place, so that after an error the same slice
// can be published again without doubling anything. A full stream is [ErrFull];
// other refusals are tried again until ctx is done.
//
// Partitions are packed and sent side by side, each in its order.
func (p *Publisher) Publish(ctx context.Context, events []usage.Event) error {
	lists := p.sort(events)
	giveIDs(lists)
	// Twice the processors: while one waits for its answers another packs.
	workers := min(2*runtime.GOMAXPROCS(0), len(lists), len(events)/p.opts.MaxEvents+1)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var failed error
	var once sync.Once
	var next atomic.Int64
	var wg sync.WaitGroup
	work := func() {
		for n := int(next.Add(1)) - 1; n < len(lists); n = int(next.Add(1)) - 1 {
			if err := p.publishPartition(ctx, n, lists[n], p.opts.Window/workers); err != nil {
				once.Do(func() { failed = err }) // the others follow from it
				stop()
				return
			}
		}
	}
	for range workers - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	return failed
}

// publishPartition packs and sends events of one partition, at most window
// frames at once.
func (p *Publisher) publishPartition(ctx context.Context, partition int, events []*usage.Event, window int) error {
	var frames []Frame
	for part := range slices.Chunk(events, p.opts.MaxEvents*max(window, 1)) {
		frames = p.frames(frames[:0], partition, part)
		if err := p.PublishFrames(ctx, frames); err != nil {
			return err
		}
	}
	return nil
}

// Flush returns once everything enqueued before was stored or given up.
func (p *Publisher) Flush(ctx context.Context) error {
	p.closing.RLock()
	defer p.closing.RUnlock()
	if p.closed {
		return nil
	}
	return p.flush(ctx)
}

func (p *Publisher) flush(ctx context.Context) error {
	p.flushing.Lock() // the queue has room for one marker
	defer p.flushing.Unlock()
	p.handOlder(time.Now().Add(time.Hour))
	mark := make(chan struct{})
	select {
	case p.ready <- work{mark: mark}:
	case <-ctx.Done():
		return fmt.Errorf("flush: %w", ctx.Err())
	}
	select {
	case <-mark:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("flush: %w, %d events are not stored yet", ctx.Err(), p.queued.Load())
	}
}

// Close takes no more events, waits until what is queued is stored, at most
// until ctx is done, and hands the rest to OnUnsent. It may be called twice.
func (p *Publisher) Close(ctx context.Context) error {
	p.closing.Lock()
	defer p.closing.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	err := p.flush(ctx)
	p.stop()
	// Events of an Enqueue that overlapped: their part is handed over here, and
	// nothing is taken after it.
	p.handOlder(time.Now().Add(time.Hour))
	for i := range p.parts {
		p.parts[i].mu.Lock()
	}
	close(p.ready)
	for i := range p.parts {
		p.parts[i].mu.Unlock()
	}
	p.done.Wait()
	return err
}

// Partitions is how many partitions the stream has.
func (p *Publisher) Partitions() int { return len(p.parts) }

// Stats tells what happened so far.
func (p *Publisher) Stats() Stats {
	return Stats{
		Queued: p.queued.Load(), Enqueued: p.enqueued.Load(), Dropped: p.dropped.Load(),
		Events: p.events.Load(), Frames: p.framesSent.Load(), Unsent: p.unsent.Load(), Retries: p.retries.Load(),
	}
}
