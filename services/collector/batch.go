package collector

import (
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/collector/rows"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// batch is what one intent covers: messages first to last of a partition, whole.
type batch struct {
	first, last uint64
	lastMessage *bus.Message
	messages    int
	bytes       int
	began       time.Time

	// months holds the rows by table partition, each inserted by itself. The
	// first one's rows are reused from batch to batch.
	months []month
	spare  *rows.Block
	// lo and hi bound the month that was added to last.
	lo, hi int64
	at     int

	suspects  []suspect
	dead      []dead
	misplaced []misplaced
	rows      int
	events    int
}

type month struct {
	number int // 202611
	block  *rows.Block
}

// suspect is an event that may be stored already.
type suspect struct {
	ev usage.Event
	at rows.Place
}

// dead is what could not be read, with the reason.
type dead struct {
	message *bus.Message
	// index of the element, -1 for the message as a whole.
	index       int
	contentType string
	data        []byte
	reason      error
}

type misplaced struct {
	message *bus.Message
	events  []bus.Misplaced
}

// dead is the letter that keeps the events when they cannot be sent on. They have
// their ids, so that replaying it doubles nothing.
func (m misplaced) dead(reason error) dead {
	list := make([]*usage.Event, len(m.events))
	for i := range m.events {
		list[i] = &m.events[i].Event
	}
	msg := bus.MisplacedMessage(m.message, m.message.Subject, list)
	return dead{m.message, -1, usage.ContentTypeProtobuf, msg.Data, reason}
}

func (b *batch) reset(r *rows.Block) {
	r.Reset()
	if cap(b.suspects) > 2*smallRows {
		b.suspects = nil // each partition would keep that of its largest batch
	}
	*b = batch{
		spare: r, months: b.months[:0], suspects: b.suspects[:0], dead: b.dead[:0], misplaced: b.misplaced[:0],
		at: -1,
	}
}

// add puts an event into the rows of its month.
func (b *batch) add(ev *usage.Event, at *rows.Place) {
	b.block(ev.Time.UnixNano()).Add(ev, at)
	b.rows++
}

// block is the one of the month that a time in Unix nanoseconds is in.
func (b *batch) block(ns int64) *rows.Block {
	if b.at < 0 || ns < b.lo || ns >= b.hi {
		b.turn(ns)
	}
	return b.months[b.at].block
}

func (b *batch) turn(ns int64) {
	number, lo, hi := monthAt(ns)
	b.lo, b.hi = lo, hi
	for i := range b.months {
		if b.months[i].number == number {
			b.at = i
			return
		}
	}
	r := b.spare
	if len(b.months) > 0 {
		r = rows.New()
	}
	b.months = append(b.months, month{number, r})
	b.at = len(b.months) - 1
}

// monthAt is the number of the month that a time is in, 202611, and from when
// (included) to when (not included) it lasts; times are in Unix nanoseconds.
func monthAt(ns int64) (number int, lo, hi int64) {
	y, m, _ := time.Unix(0, ns).UTC().Date()
	start := time.Date(y, m, 1, 0, 0, 0, 0, time.UTC)
	return y*100 + int(m), start.UnixNano(), start.AddDate(0, 1, 0).UnixNano()
}
