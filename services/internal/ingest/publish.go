package ingest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Limits of a frame, the message that carries events of one partition.
const (
	frameEvents = 500
	frameBytes  = 256 << 10
)

// inFlight is how many frames may wait for JetStream's acknowledgement.
const inFlight = 64

// patience is how long a publisher waits for JetStream to take anything: a
// stream that is full takes events again once its readers have caught up.
const patience = 5 * time.Minute

// Publisher puts events on stream USAGE in frames, in order within a partition.
// It is not safe for concurrent use.
type Publisher struct {
	js         jetstream.JetStream
	partitions int
	live       bool
	frames     []frame
	flight     []flying
	last       map[int]uint64
	// Stored is called with the number of events of each frame that JetStream holds.
	Stored func(events int)
}

type frame struct {
	body   []byte
	events int
}

type flying struct {
	msg       *nats.Msg
	ack       jetstream.PubAckFuture
	partition int
	events    int
}

// NewPublisher publishes over js to a stream of that many partitions. Unless
// live, the events are marked as history: stored and learned from, and what
// they would have raised mails nobody.
func NewPublisher(js jetstream.JetStream, partitions int, live bool) *Publisher {
	return &Publisher{js: js, partitions: partitions, live: live, frames: make([]frame, partitions), last: map[int]uint64{}, Stored: func(int) {}}
}

// Add takes a valid event; it is stored at the latest when Flush returns.
func (p *Publisher) Add(ctx context.Context, ev *usage.Event) error {
	at := usage.Partition(ev.KeyID, p.partitions)
	f := &p.frames[at]
	f.body = ev.AppendProtobuf(f.body)
	f.events++
	if f.events < frameEvents && len(f.body) < frameBytes {
		return nil
	}
	return p.send(ctx, at)
}

// Flush returns once everything added is stored.
func (p *Publisher) Flush(ctx context.Context) error {
	for at := range p.frames {
		if p.frames[at].events == 0 {
			continue
		}
		if err := p.send(ctx, at); err != nil {
			return err
		}
	}
	for len(p.flight) > 0 {
		if err := p.land(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Last is the highest stream sequence stored in each partition.
func (p *Publisher) Last() map[int]uint64 { return p.last }

func (p *Publisher) send(ctx context.Context, at int) error {
	for len(p.flight) >= inFlight {
		if err := p.land(ctx); err != nil {
			return err
		}
	}
	f := p.frames[at]
	p.frames[at] = frame{}
	// The body's own hash as its id makes a second try harmless.
	sum := sha256.Sum256(f.body)
	msg := nats.NewMsg(usage.Subject(at))
	msg.Data = f.body
	msg.Header.Set("Content-Type", usage.ContentTypeProtobuf)
	msg.Header.Set(nats.MsgIdHdr, "imp-"+hex.EncodeToString(sum[:16]))
	if !p.live {
		msg.Header.Set(usage.HeaderMode, usage.ModeHistory)
	}
	ack, err := p.js.PublishMsgAsync(msg)
	if err != nil {
		return fmt.Errorf("publish events: %w", err)
	}
	p.flight = append(p.flight, flying{msg, ack, at, f.events})
	return nil
}

// land waits for the oldest frame in flight, publishing it again if it was lost.
func (p *Publisher) land(ctx context.Context) error {
	f := p.flight[0]
	p.flight = p.flight[1:]
	var ack *jetstream.PubAck
	select {
	case ack = <-f.ack.Ok():
	case err := <-f.ack.Err():
		if ack, err = p.again(ctx, f.msg, err); err != nil {
			return err
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p.last[f.partition] = max(p.last[f.partition], ack.Sequence)
	p.Stored(f.events)
	return nil
}

func (p *Publisher) again(ctx context.Context, msg *nats.Msg, why error) (*jetstream.PubAck, error) {
	deadline := time.Now().Add(patience)
	for delay := 50 * time.Millisecond; time.Now().Before(deadline); delay = min(2*delay, 2*time.Second) {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(delay):
		}
		once := nats.NewMsg(msg.Subject) // the reply subject of the first try must not go along
		once.Data, once.Header = msg.Data, msg.Header
		ack, err := p.js.PublishMsg(ctx, once)
		if err == nil {
			return ack, nil
		}
		why = err
	}
	return nil, fmt.Errorf("publish events: JetStream takes none for %s: %w", patience, why)
}

// ErrNoReader says that nobody reads what was published.
var ErrNoReader = errors.New("no collector is running")

// readerPatience is how long AwaitReaders waits for a reader to appear.
const readerPatience = 10 * time.Second

// AwaitReaders returns once the named consumers of a stream, one a partition,
// have acknowledged everything up to the sequences of [Publisher.Last], or with
// [ErrNoReader] if they have no reader. progress is called with how many
// partitions are through.
func AwaitReaders(ctx context.Context, js jetstream.JetStream, stream string, last map[int]uint64, consumer func(partition int) string, progress func(through int)) error {
	through := map[int]bool{}
	for seen := time.Now(); ; {
		for partition, sequence := range last {
			if through[partition] {
				continue
			}
			c, err := js.Consumer(ctx, stream, consumer(partition))
			if errors.Is(err, jetstream.ErrConsumerNotFound) {
				return fmt.Errorf("ask for the reader of partition %d: %w", partition, err)
			}
			if err != nil {
				break // NATS is away for a moment: ask again below
			}
			info := c.CachedInfo()
			if hasReader(info) {
				seen = time.Now()
			}
			if info.AckFloor.Stream >= sequence {
				through[partition] = true
				progress(len(through))
			}
		}
		if len(through) == len(last) {
			return nil
		}
		if time.Since(seen) > readerPatience {
			return ErrNoReader
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// hasReader reports whether somebody asks for messages or was given the consumer.
func hasReader(info *jetstream.ConsumerInfo) bool {
	return info.NumWaiting > 0 || len(info.PriorityGroups) > 0 && info.PriorityGroups[0].PinnedClientID != ""
}
