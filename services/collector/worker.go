package collector

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	publisher "github.com/latchkey-dev/latchkey/pkg/usage"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/collector/rows"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

const (
	// fetchMessages and fetchBytes bound one request to JetStream.
	fetchMessages = 4096
	fetchBytes    = 2 << 20
	// smallRows is a batch of a partition that is not behind; a larger one waits
	// for one of the few large blocks.
	smallRows = 4096
	// finishWithin is how long a batch that is being inserted may take on shutdown.
	finishWithin = 3 * time.Second
)

// worker stores the events of one partition while this process owns it.
type worker struct {
	c      *Service
	p      *bus.Partition
	log    *slog.Logger
	stream string

	decoder usage.Decoder
	seen    *seen
	intents intents
	batch   batch
	small   *rows.Block
	large   *rows.Block // lent, nil most of the time
	queue   []*bus.Message
	hashes  []uint64
	// flushed is when a batch was last stored, full whether it ended because it was full.
	flushed time.Time
	full    bool
}

// own stores a partition until it is lost or ctx is done.
func (c *Service) own(ctx context.Context, p *bus.Partition) error {
	w := &worker{
		c: c, p: p, log: c.log.With("partition", p.Number), small: rows.New(),
		stream: c.stream, intents: intents{kv: c.intentKV, key: strconv.Itoa(p.Number)},
	}
	defer w.giveBack()
	watch, stopWatching := context.WithCancel(ctx)
	defer every(lagInterval, func() { w.measureLag(watch) })()
	defer stopWatching()
	intent, err := w.begin(ctx)
	if err != nil {
		return err
	}
	for {
		if err := w.collect(ctx, intent); err != nil {
			return err
		}
		resumed := intent
		intent = Intent{}
		if w.batch.messages == 0 {
			continue
		}
		if err := w.finish(ctx, resumed); err != nil {
			return err
		}
	}
}

// begin puts the consumer where the partition was left. The intent it returns
// is of a batch that may or may not be stored, and is to be cut alike.
func (w *worker) begin(ctx context.Context) (Intent, error) {
	intent, err := w.intents.load(ctx)
	if err != nil {
		return Intent{}, err
	}
	floor, err := w.p.AckFloor(ctx)
	if err != nil {
		return Intent{}, err
	}
	if err := w.ask(ctx, "recall stored events", func(ctx context.Context) (err error) {
		w.seen, err = w.recall(ctx)
		return err
	}); err != nil {
		return Intent{}, err
	}
	start := floor + 1
	if intent.Last > floor {
		start = intent.First
		w.log.Info("resuming a batch", "first", intent.First, "last", intent.Last)
	} else {
		intent = Intent{}
	}
	return intent, w.p.Reset(ctx, start)
}

// collect fills the batch: up to the intent's last message exactly, or else
// until it is large enough or old enough.
func (w *worker) collect(ctx context.Context, intent Intent) error {
	w.giveBack()
	w.batch.reset(w.small)
	limit, behindBefore := smallRows, w.full
	w.full = false
	for {
		if len(w.queue) == 0 {
			wait := 5 * time.Second
			if w.batch.messages > 0 && intent.Last == 0 {
				wait = max(time.Until(w.due(behindBefore)), 0)
			}
			msgs, err := w.p.Fetch(ctx, fetchMessages, fetchBytes, wait)
			if err != nil {
				return err
			}
			if len(msgs) == 0 {
				if intent.Last > 0 && w.incomplete(ctx) {
					continue
				}
				return nil
			}
			w.queue = msgs
		}
		if w.batch.messages == 0 && w.large == nil && behind(w.queue) {
			if err := w.borrow(ctx); err != nil {
				return err
			}
			limit = w.c.cfg.BatchRows
		}
		for len(w.queue) > 0 {
			m := w.queue[0]
			if intent.Last > 0 && m.Sequence > intent.Last {
				return nil
			}
			w.queue = w.queue[1:]
			w.take(m)
			full := w.batch.rows+len(w.batch.suspects) >= limit || w.batch.bytes >= w.c.cfg.BatchBytes
			if intent.Last > 0 && m.Sequence == intent.Last || intent.Last == 0 && full {
				w.full = full && limit > smallRows
				return nil
			}
		}
	}
}

// due is when the batch is inserted if no more messages are there. One that is
// large already need not wait for company, and keep its block from others: it is
// enough that the partition inserts no more often than at each flush interval. What
// is left when a partition has caught up waits for nothing.
func (w *worker) due(behindBefore bool) time.Time {
	switch {
	case behindBefore:
		return w.flushed
	case w.batch.rows >= smallRows:
		return w.flushed.Add(w.c.cfg.FlushInterval)
	}
	return w.batch.began.Add(w.c.cfg.FlushInterval)
}

// incomplete tells whether messages of an interrupted batch are still to come.
// They are not if somebody purged the stream; then what is left must do.
func (w *worker) incomplete(ctx context.Context) bool {
	info, err := w.p.Info(ctx)
	return err != nil || info.NumPending > 0 || info.NumAckPending > w.batch.messages
}

// behind tells whether more waits, here and in JetStream, than a small batch holds.
func behind(queue []*bus.Message) bool {
	events := uint64(0)
	for _, m := range queue {
		n, err := strconv.ParseUint(m.Header.Get(publisher.HeaderEvents), 10, 32)
		if err != nil || n == 0 {
			n = 1 + uint64(len(m.Data))/1024
		}
		events += n
	}
	perMessage := max(events/uint64(len(queue)), 1)
	return events+queue[len(queue)-1].Pending*perMessage > smallRows
}

// borrow waits for a large block, and keeps the partition meanwhile.
func (w *worker) borrow(ctx context.Context) error {
	for w.large == nil {
		select {
		case w.large = <-w.c.large:
		case <-time.After(2 * time.Second):
			w.p.Touch()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	w.batch.reset(w.large)
	w.large.Grow(w.c.cfg.BatchRows)
	return nil
}

func (w *worker) giveBack() {
	if w.large != nil {
		w.c.large <- w.large
		w.large = nil
	}
}

// take decodes one message into the batch.
func (w *worker) take(m *bus.Message) {
	b := &w.batch
	if b.messages == 0 {
		b.first, b.began = m.Sequence, time.Now()
	}
	b.last, b.lastMessage = m.Sequence, m
	b.messages++
	b.bytes += len(m.Data)
	at := rows.Place{
		Stream: w.stream, Partition: uint16(w.p.Number), Sequence: m.Sequence,
		IngestedAt: m.Time, History: m.History(),
	}
	if w.takeColumns(m, &at) {
		return
	}
	var elsewhere []bus.Misplaced
	err := m.Events(&w.decoder, func(i int, ev *usage.Event, err error) {
		b.events++
		if err != nil {
			data, contentType := w.decoder.Element()
			b.dead = append(b.dead, dead{m, i, contentType, data, err})
			return
		}
		if usage.Partition(ev.KeyID, w.p.Count) != w.p.Number {
			elsewhere = append(elsewhere, bus.Misplaced{Index: i, Event: *ev})
			return
		}
		at.Index = uint32(i)
		if w.seen.testAndAdd(ev) {
			b.suspects = append(b.suspects, suspect{*ev, at})
			return
		}
		b.add(ev, &at)
	})
	if err != nil {
		b.dead = append(b.dead, dead{m, -1, m.ContentType(), m.Data, err})
	}
	if len(elsewhere) > 0 {
		b.misplaced = append(b.misplaced, misplaced{m, elsewhere})
	}
}

// finish stores the batch and acknowledges it. A shutdown lets it end if that
// does not take long; else the successor repeats it.
func (w *worker) finish(ctx context.Context, resumed Intent) error {
	ctx, cancel := graceful(ctx, finishWithin)
	defer cancel()
	b := &w.batch
	began := time.Now()
	if err := w.intents.store(ctx, Intent{
		First: b.first, Last: b.last, Owner: w.c.owner, Time: resumed.since(began), Revision: resumed.Revision,
		Rows: b.rows + len(b.suspects), Events: b.events,
	}); err != nil {
		return err
	}
	duplicates, err := w.settle(ctx)
	if err != nil {
		return err
	}
	if err := w.insert(ctx, resumed); err != nil {
		return err
	}
	rerouted, err := w.putAside(ctx)
	if err != nil {
		return err
	}
	if err := w.p.Ack(ctx, b.lastMessage); err != nil {
		return fmt.Errorf("%w: %w", bus.ErrLost, err)
	}
	w.flushed = time.Now()
	w.c.metrics.stored(b, duplicates, rerouted, time.Since(began))
	w.log.Debug("batch stored", "first", b.first, "last", b.last, "rows", b.rows, "duplicates", duplicates,
		"dead", len(b.dead), "took", time.Since(began))
	return nil
}

// graceful is a context that outlives ctx by d.
func graceful(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(d, cancel)
		context.AfterFunc(out, func() { t.Stop() })
	})
	return out, func() { stop(); cancel() }
}

// settle decides on the suspects: those that are stored already, in ClickHouse
// or earlier in this batch, are left out, the others join the rows. The outcome
// is the same whenever it is asked, for only this partition stores these keys.
func (w *worker) settle(ctx context.Context) (duplicates int, err error) {
	b := &w.batch
	if len(b.suspects) == 0 {
		return 0, nil
	}
	var stored map[identity]bool
	if err := w.ask(ctx, "look for duplicates", func(ctx context.Context) (err error) {
		stored, err = w.storedAlready(ctx, b, b.suspects)
		return err
	}); err != nil {
		return 0, err
	}
	b.markOwn(stored)
	for i := range b.suspects {
		s := &b.suspects[i]
		id := identityOf(&s.ev)
		if stored[id] {
			duplicates++
			continue
		}
		stored[id] = true
		b.add(&s.ev, &s.at)
	}
	return duplicates, nil
}

// markOwn adds those suspects that are among the batch's own rows.
func (b *batch) markOwn(stored map[identity]bool) {
	wanted := make(map[string][]identity, len(b.suspects))
	for i := range b.suspects {
		id := identityOf(&b.suspects[i].ev)
		wanted[id.id] = append(wanted[id.id], id)
	}
	for _, m := range b.months {
		r := m.block
		for i := range r.Len() {
			for _, id := range wanted[string(r.ID(i))] {
				if id.ns == r.Nanoseconds(i) && id.key == r.KeyID(i) {
					stored[id] = true
				}
			}
		}
	}
}

// tokenBatches is after how many other batches a deduplication token may be forgotten:
// tables remember those of 20,000 blocks (see the migrations), of which a batch
// makes one a month that it has events of.
const tokenBatches = 1500

// insert writes the rows month by month until ClickHouse has them.
//
// A batch that may be there already is inserted once more with its token all the
// same: ClickHouse may have died when the table had the block and a rollup had
// not, and then only the repeated insert brings it there. Afterwards the rows are
// counted, for ClickHouse notes a token just before the block becomes visible,
// and may die in between.
func (w *worker) insert(ctx context.Context, intent Intent) error {
	b := &w.batch
	var have map[int]uint64
	if intent.Last > 0 {
		var later uint64
		if err := w.untilDone(ctx, "ask how old the batch is", func(ctx context.Context) (err error) {
			later, err = w.intents.later(ctx, intent.Revision)
			return err
		}); err != nil {
			return err
		}
		if later > tokenBatches {
			var err error
			if have, err = w.storedRows(ctx); err != nil {
				return err
			}
		}
	}
	for _, m := range b.months {
		if have[m.number] > 0 {
			continue
		}
		m.block.Sort()
		token := fmt.Sprintf("%s:%d:%d-%d:%d", w.stream, w.p.Number, b.first, b.last, m.number)
		for try := 1; ; try++ {
			attempts := 0
			if err := w.untilDone(ctx, "insert events", func(ctx context.Context) error {
				attempts++
				return w.insertBlock(ctx, m.block, token, w.c.patience(attempts))
			}); err != nil {
				return err
			}
			if intent.Last == 0 && attempts == 1 && try == 1 {
				break
			}
			stored, err := w.storedRows(ctx)
			if err != nil {
				return err
			}
			if stored[m.number] >= uint64(m.block.Len()) {
				break
			}
			w.log.Warn("a block was taken for a repeated one and is not there; inserting it under another token",
				"first", b.first, "last", b.last, "stored", stored[m.number], "rows", m.block.Len())
			token = fmt.Sprintf("%s:%d:%d-%d:%d:%d", w.stream, w.p.Number, b.first, b.last, m.number, try)
		}
	}
	return nil
}

// storedRows counts the rows of the batch in ClickHouse by month. Each month is
// there as a whole or not at all.
func (w *worker) storedRows(ctx context.Context) (rows map[int]uint64, err error) {
	err = w.ask(ctx, "count the rows of the batch", func(ctx context.Context) (err error) {
		rows, err = w.countRows(ctx, &w.batch)
		return err
	})
	return rows, err
}

func (w *worker) insertBlock(ctx context.Context, r *rows.Block, token string, limit time.Duration) error {
	var in *store.Inserter
	for in == nil {
		wctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		var err error
		in, err = w.c.pool.Get(wctx)
		cancel()
		if err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
		w.p.Touch()
	}
	defer w.c.pool.Put(in)
	ictx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	err := in.Insert(ictx, "usage_events", r.Input(), InsertSettings(token)...)
	w.c.metrics.insert(r.Len(), time.Since(began), err)
	return err
}

// InsertSettings make an insert that is repeated harmless, for the table and for
// the views that it feeds, and keep a block in one piece.
func InsertSettings(token string) []store.Setting {
	return []store.Setting{
		{Name: "insert_deduplication_token", Value: token},
		{Name: "insert_deduplicate", Value: "1"},
		{Name: "deduplicate_blocks_in_dependent_materialized_views", Value: "1"},
		{Name: "async_insert", Value: "0"},
		{Name: "max_insert_block_size", Value: "1048576"},
		{Name: "min_insert_block_size_rows", Value: "1048576"},
		{Name: "max_insert_threads", Value: "1"},
	}
}

// putAside publishes what is not stored here: dead letters, and events of other
// partitions. Both have message ids, so that doing it again changes nothing.
func (w *worker) putAside(ctx context.Context) (rerouted int, err error) {
	b := &w.batch
	for i := range b.dead {
		if err := w.untilDone(ctx, "publish dead letter", func(ctx context.Context) error {
			return w.c.bury(ctx, bus.Usage, b.dead[i])
		}); err != nil {
			return 0, err
		}
	}
	for _, m := range b.misplaced {
		rerouted += len(m.events)
		if err := w.untilDone(ctx, "reroute events", func(ctx context.Context) error {
			err := bus.Reroute(ctx, w.c.js, m.message, w.p.Count, m.events)
			if !bus.IsFull(err) {
				return err
			}
			// The stream only gets room by what we acknowledge: waiting here
			// might wait for ever.
			return w.c.bury(ctx, bus.Usage, m.dead(err))
		}); err != nil {
			return 0, err
		}
	}
	return rerouted, nil
}

// untilDone tries again for ever, with growing pauses, and keeps the partition.
func (w *worker) untilDone(ctx context.Context, what string, try func(context.Context) error) error {
	return untilDone(ctx, w.log, what, w.p.Touch, w.c.metrics.retries.Inc, try)
}

// ask is untilDone for a question to ClickHouse, whose answer may never come.
func (w *worker) ask(ctx context.Context, what string, try func(context.Context) error) error {
	attempts := 0
	return w.untilDone(ctx, what, func(ctx context.Context) error {
		attempts++
		ctx, cancel := context.WithTimeout(ctx, w.c.patience(attempts))
		defer cancel()
		return try(ctx)
	})
}

// patience is how long an attempt may take: an answer that was lost is not waited
// for long, and a ClickHouse that is slow gets the time that it needs.
func (c *Service) patience(attempt int) time.Duration {
	return c.cfg.InsertTimeout << min(attempt-1, 5)
}

func untilDone(ctx context.Context, log *slog.Logger, what string, touch func(), count func(), try func(context.Context) error) error {
	stop := keepTouching(touch)
	defer stop()
	pause := 100 * time.Millisecond
	told := time.Time{}
	for {
		err := try(ctx)
		if err == nil || errors.Is(err, bus.ErrLost) {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		count()
		if time.Since(told) > 10*time.Second {
			told = time.Now()
			log.Warn("trying again until it works", "step", what, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, 3*time.Second)
	}
}

// keepTouching renews the claim on the partition while something takes long.
func keepTouching(touch func()) (stop func()) { return every(time.Second, touch) }

// every does something now and at each interval until stop is called, and has
// ended by then.
func every(interval time.Duration, do func()) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		t := time.NewTicker(interval)
		defer t.Stop()
		for {
			do()
			select {
			case <-done:
				return
			case <-t.C:
			}
		}
	}()
	return func() { close(done); <-ended }
}

// lagInterval is how often an owner looks how far behind it is.
const lagInterval = 3 * time.Second

// measureLag asks JetStream, for an owner that waits for ClickHouse does not see
// what comes meanwhile.
func (w *worker) measureLag(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lagInterval)
	defer cancel()
	info, err := w.p.Info(ctx)
	if err != nil {
		return // the next look may work
	}
	if lag, err := bus.ReadLag(ctx, w.c.usage, info); err == nil {
		w.c.metrics.lag(w.p.Number, lag)
	}
}
