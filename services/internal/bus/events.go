package bus

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	publisher "github.com/latchkey-dev/latchkey/pkg/usage"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// EventID is the id of an event that came without one: where it lies in USAGE.
func EventID(sequence uint64, index int) string {
	return "usage:" + strconv.FormatUint(sequence, 10) + ":" + strconv.Itoa(index)
}

// History tells whether the message is history that was imported: learned from
// and stored, but nobody is mailed.
func (m *Message) History() bool { return m.Header.Get(usage.HeaderMode) == usage.ModeHistory }

// ContentType is that of the message.
func (m *Message) ContentType() string { return m.Header.Get("Content-Type") }

// Events decodes a message of USAGE as [usage.Decode] does, and gives each event
// an id ([EventID]) that has none. Its time is judged by when the message was
// stored, so that every reader at any time comes to the same result.
func (m *Message) Events(d *usage.Decoder, fn func(i int, ev *usage.Event, err error)) error {
	return d.Decode(m.ContentType(), m.Data, m.Time, func(i int, ev *usage.Event, err error) {
		if err == nil && ev.ID == "" {
			ev.ID = EventID(m.Sequence, i)
		}
		fn(i, ev, err)
	})
}

// Columns reads the message as [usage.Decoder.Columns] does; its time is judged as in Events.
func (m *Message) Columns(d *usage.Decoder) (*usage.Columns, bool) {
	return d.Columns(m.ContentType(), m.Data, m.Time)
}

// Misplaced is an event that came in a message of another partition than its key's.
type Misplaced struct {
	Index int
	Event usage.Event
}

// rerouteEvents is how many events one message of Reroute holds at most: of
// the largest, fewer bytes than any server's limit for a message.
const rerouteEvents = 200

// Reroute publishes events that do not belong on the partition of their message
// to the right ones, those of a partition together and in order. Collector and
// detector both ignore such events and call this before they acknowledge the
// message; the message ids follow from sequence and index, so each event arrives
// once.
func Reroute(ctx context.Context, js jetstream.JetStream, m *Message, partitions int, events []Misplaced) error {
	lists := make([][]*usage.Event, partitions)
	for i := range events {
		ev := &events[i].Event
		n := usage.Partition(ev.KeyID, partitions)
		lists[n] = append(lists[n], ev)
	}
	for n, list := range lists {
		for part := 0; len(list) > 0; part++ {
			head := list[:min(len(list), rerouteEvents)]
			list = list[len(head):]
			msg := MisplacedMessage(m, usage.Subject(n), head)
			id := fmt.Sprintf("reroute:%d:%d:%d", m.Sequence, n, part)
			if _, err := js.PublishMsg(ctx, msg, jetstream.WithMsgID(id)); err != nil {
				return fmt.Errorf("reroute events of message %d to partition %d: %w", m.Sequence, n, err)
			}
		}
	}
	return nil
}

// MisplacedMessage is some of the events of a message, with the ids that they
// were given, for another subject.
func MisplacedMessage(m *Message, subject string, events []*usage.Event) *nats.Msg {
	msg := &nats.Msg{
		Subject: subject, Data: usage.AppendBatchOf(nil, events),
		Header: nats.Header{"Content-Type": {usage.ContentTypeProtobuf}, publisher.HeaderEvents: {strconv.Itoa(len(events))}},
	}
	if m.History() {
		msg.Header.Set(usage.HeaderMode, usage.ModeHistory)
	}
	return msg
}

// IsFull tells whether a publish was refused because the stream is full.
func IsFull(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && api.ErrorCode == 10077
}

// Trim removes from USAGE what every service has consumed, once the stream
// holds more than tail bytes, which are kept for those who want to look back.
// It returns the first sequence that is left. Any number of processes may call it.
func Trim(ctx context.Context, js jetstream.JetStream, tail uint64) (uint64, error) {
	s, err := js.Stream(ctx, Usage)
	if err != nil {
		return 0, fmt.Errorf("look up stream %s: %w", Usage, err)
	}
	state := s.CachedInfo().State
	if state.Bytes <= tail || state.Msgs == 0 {
		return state.FirstSeq, nil
	}
	floor := state.LastSeq
	list := s.ListConsumers(ctx)
	for info := range list.Info() {
		f, err := consumed(ctx, s, info, state.LastSeq)
		if err != nil {
			return 0, err
		}
		floor = min(floor, f)
	}
	if err := list.Err(); err != nil {
		return 0, fmt.Errorf("list consumers of %s: %w", Usage, err)
	}
	if floor < state.FirstSeq {
		return state.FirstSeq, nil
	}
	if err := s.Purge(ctx, jetstream.WithPurgeSequence(floor+1)); err != nil {
		return 0, fmt.Errorf("trim stream %s to %d: %w", Usage, floor+1, err)
	}
	return floor + 1, nil
}

// consumed is the sequence up to which a consumer needs nothing any more. The
// floor of an idle partition stays behind, so the next message on its subject
// is looked for; last is a sequence that was stored before the consumer was asked.
func consumed(ctx context.Context, s jetstream.Stream, info *jetstream.ConsumerInfo, last uint64) (uint64, error) {
	floor := info.AckFloor.Stream
	if info.Config.AckPolicy == jetstream.AckNonePolicy || floor >= last {
		return last, nil
	}
	if info.NumPending > 0 || info.NumAckPending > 0 {
		return floor, nil
	}
	subject := info.Config.FilterSubject
	if subject == "" {
		return floor, nil
	}
	next, err := s.GetMsg(ctx, floor+1, jetstream.WithGetMsgSubject(subject))
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return last, nil
	case err != nil:
		return 0, fmt.Errorf("look for the next message of %s: %w", subject, err)
	}
	return next.Sequence - 1, nil
}

// Lag is what a consumer of USAGE has not acknowledged.
type Lag struct {
	Messages uint64
	// Events is estimated from how many the oldest message holds.
	Events uint64
	// Age is that of the oldest message.
	Age time.Duration
}

// ReadLag looks at the oldest message that waits for a consumer of USAGE.
func ReadLag(ctx context.Context, s jetstream.Stream, consumer *jetstream.ConsumerInfo) (Lag, error) {
	lag := Lag{Messages: consumer.NumPending + uint64(consumer.NumAckPending)}
	if lag.Messages == 0 {
		return lag, nil
	}
	lag.Events = lag.Messages
	m, err := s.GetMsg(ctx, consumer.AckFloor.Stream+1, jetstream.WithGetMsgSubject(consumer.Config.FilterSubject))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return lag, nil // acknowledged meanwhile
	}
	if err != nil {
		return lag, fmt.Errorf("look for the oldest message of %s: %w", consumer.Name, err)
	}
	lag.Events *= max(eventsIn(m), 1)
	lag.Age = max(0, time.Since(m.Time))
	return lag, nil
}

// eventsIn counts the events of a message whose publisher may have told.
func eventsIn(m *jetstream.RawStreamMsg) (n uint64) {
	if told, err := strconv.ParseUint(m.Header.Get(publisher.HeaderEvents), 10, 32); err == nil && told > 0 {
		return told
	}
	_ = usage.Decode(m.Header.Get("Content-Type"), m.Data, m.Time, func(int, *usage.Event, error) { n++ })
	return n
}

// Headers of a dead letter, which says why a message or one element of it could
// not be read and where it lay. Its body and Content-Type are those of the
// element, or of the message if there is no index.
const (
	HeaderReason   = "Latchkey-Reason"
	HeaderStream   = "Latchkey-Stream"
	HeaderSubject  = "Latchkey-Subject"
	HeaderSequence = "Latchkey-Sequence"
	HeaderIndex    = "Latchkey-Index"
)
