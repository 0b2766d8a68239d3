package usage

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// ErrFull says that the USAGE stream is full: its consumers are behind, and it
// refuses rather than forgets. The events are not stored; try again later.
var ErrFull = errors.New("the usage stream is full")

// HeaderEvents tells how many events a message holds, for those who want to know
// how much waits without reading it.
const HeaderEvents = "Latchkey-Events"

// Frame is one message for the USAGE stream. It can be kept (on disk, say) and
// sent at any time by [Publisher.PublishFrames].
type Frame struct {
	Subject string
	// ID makes sending twice within two minutes harmless (Nats-Msg-Id).
	ID          string
	ContentType string
	// Mode is [usage.ModeHistory] or empty.
	Mode string
	Data []byte
	// Events is how many events it holds.
	Events int
}

func (f Frame) message() *nats.Msg {
	m := &nats.Msg{Subject: f.Subject, Data: f.Data, Header: nats.Header{
		"Content-Type":        {f.ContentType},
		jetstream.MsgIDHeader: {f.ID},
		HeaderEvents:          {strconv.Itoa(f.Events)},
	}}
	if f.Mode != "" {
		m.Header[usage.HeaderMode] = []string{f.Mode}
	}
	return m
}

// Pack makes frames of events of any keys, for a caller that keeps and sends them
// itself. Events without an id are given one, in place.
func (p *Publisher) Pack(events []usage.Event) []Frame {
	byPartition := p.sort(events)
	giveIDs(byPartition)
	var frames []Frame
	for n, evs := range byPartition {
		frames = p.frames(frames, n, evs)
	}
	return frames
}

// sort lists the events of each partition, in their order.
func (p *Publisher) sort(events []usage.Event) [][]*usage.Event {
	lists := make([][]*usage.Event, len(p.parts))
	for i := range events {
		n := usage.Partition(events[i].KeyID, len(p.parts))
		if lists[n] == nil {
			lists[n] = make([]*usage.Event, 0, 2*len(events)/len(p.parts)+1)
		}
		lists[n] = append(lists[n], &events[i])
	}
	return lists
}

// Message is the frame as it is sent.
func (f Frame) Message() *nats.Msg { return f.message() }

// frames packs events of one partition, more than one frame if they are too
// large for one. All must have ids.
func (p *Publisher) frames(dst []Frame, partition int, events []*usage.Event) []Frame {
	for len(events) > p.opts.MaxEvents {
		dst = p.frames(dst, partition, events[:p.opts.MaxEvents])
		events = events[p.opts.MaxEvents:]
	}
	if len(events) == 0 {
		return dst
	}
	data := usage.AppendBatchOf(make([]byte, 0, p.sizeHint()), events)
	if len(data) > p.opts.MaxBytes && len(events) > 1 {
		half := len(events) / 2
		return p.frames(p.frames(dst, partition, events[:half]), partition, events[half:])
	}
	p.frameSize.Store(int64(len(data)))
	return append(dst, Frame{
		Subject: usage.Subject(partition), ID: p.frameID(), ContentType: usage.ContentTypeProtobuf,
		Mode: p.opts.Mode, Data: data, Events: len(events),
	})
}

func (p *Publisher) sizeHint() int { return int(p.frameSize.Load()) * 5 / 4 }

// frameID is unique: a random prefix of the publisher and a number.
func (p *Publisher) frameID() string {
	return p.prefix + strconv.FormatUint(p.frameCount.Add(1), 16)
}

func randomPrefix() string {
	var b [9]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:]) + "-"
}

// giveIDs gives ids to the events that have none: UUIDs of version 7 that count
// up from a common base, one list behind the other, so that a frame can tell
// its own in a few bytes.
func giveIDs(lists [][]*usage.Event) {
	var base [16]byte
	var n uint64
	for _, events := range lists {
		for _, ev := range events {
			if ev.ID != "" {
				continue
			}
			if n == 0 {
				base = uuidBase(time.Now())
			}
			id := base
			binary.BigEndian.PutUint64(id[8:], binary.BigEndian.Uint64(base[8:])+n)
			ev.ID = usage.UUID(id)
			n++
		}
	}
}

// uuidBase is a UUID of version 7 with room to count up.
func uuidBase(now time.Time) (id [16]byte) {
	_, _ = rand.Read(id[6:]) // never fails
	ms := uint64(now.UnixMilli())
	binary.BigEndian.PutUint16(id[0:], uint16(ms>>32))
	binary.BigEndian.PutUint32(id[2:], uint32(ms))
	id[6] = id[6]&0x0f | 0x70
	id[8] = id[8]&0x1f | 0x80
	return id
}

// PublishFrames sends frames in order and returns once JetStream has stored all
// of them. What is refused for the moment (no connection, no leader) is sent
// again until ctx is done; a full stream is [ErrFull] at once. After an error
// all of them can be sent again.
func (p *Publisher) PublishFrames(ctx context.Context, frames []Frame) error {
	futures := make([]jetstream.PubAckFuture, len(frames))
	for i := range frames {
		f, err := p.js.PublishMsgAsync(frames[i].message())
		if err == nil {
			futures[i] = f
		}
	}
	for i, f := range futures {
		err := errNotSent
		if f != nil {
			err = await(ctx, f)
		}
		if err != nil {
			err = p.again(ctx, frames[i], err)
		}
		if err != nil {
			return fmt.Errorf("publish frame %d of %d: %w", i+1, len(frames), err)
		}
		p.sent(frames[i])
	}
	return nil
}

var errNotSent = errors.New("not sent")

func await(ctx context.Context, f jetstream.PubAckFuture) error {
	select {
	case <-f.Ok():
		return nil
	case err := <-f.Err():
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// again sends a frame until it is stored, ctx is done, or the answer is final.
func (p *Publisher) again(ctx context.Context, frame Frame, err error) error {
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		if isFull(err) {
			return fmt.Errorf("%w: %w", ErrFull, err)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w; last answer: %w", ctx.Err(), err)
		}
		select {
		case <-ctx.Done():
			continue
		case <-time.After(wait):
		}
		p.retries.Add(1)
		var f jetstream.PubAckFuture
		if f, err = p.js.PublishMsgAsync(frame.message()); err != nil {
			continue
		}
		if err = await(ctx, f); err == nil {
			return nil
		}
	}
}

// isFull reads JetStream's answer: maximum bytes or messages exceeded.
func isFull(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && (api.ErrorCode == 10077 || api.ErrorCode == 10047 || api.ErrorCode == 10023)
}
