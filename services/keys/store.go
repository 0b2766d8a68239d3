package keys

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// actor is who makes a change, for the audit.
type actor struct {
	id string
	ip netip.Addr
}

// system is the actor of what policies do.
var system = actor{id: "system"}

func caller(ctx context.Context) actor {
	p := api.From(ctx)
	return actor{id: p.KeyID, ip: p.IP}
}

var (
	errNoKey = errors.New("key not found")
	// errRace says that somebody else changed the key since it was read.
	errRace = errors.New("key was changed meanwhile")
	// errNothing stops a change that would change nothing.
	errNothing = errors.New("nothing to change")
)

// maxRaces is how often a change is tried anew on the record that a race left.
const maxRaces = 16

// records reads and writes the records on stream KEYS. A write names the sequence
// that it read, so of two writers one fails and tries again on what the other left.
type records struct {
	nc     *nats.Conn
	js     jetstream.JetStream
	stream jetstream.Stream
	set    *api.Keyset
	ids    *ids
	now    func() time.Time
}

// stored is a record and the sequence of its message, 0 for a new key.
type stored struct {
	key.Record
	seq uint64
}

// read is the record as the stream has it now; errNoKey if there is none.
func (s *records) read(ctx context.Context, id string) (stored, error) {
	if !validKeyID(id) {
		return stored{}, errNoKey
	}
	change, seq, err := s.lastChange(ctx, id)
	if err != nil && !errors.Is(err, errNoKey) {
		return stored{}, err
	}
	// In a cluster a follower may answer that has not heard of our own write yet.
	if record, known := s.set.At(id); known > seq {
		return stored{Record: record, seq: known}, nil
	}
	return stored{Record: change.Record, seq: seq}, err
}

func (s *records) lastChange(ctx context.Context, id string) (change key.Change, seq uint64, err error) {
	if !s.nc.IsConnected() {
		return change, 0, fmt.Errorf("read key %s: %w", id, nats.ErrDisconnected)
	}
	msg, err := s.stream.GetLastMsgForSubject(ctx, bus.KeySubject(id))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return change, 0, errNoKey
	}
	if err != nil {
		return change, 0, fmt.Errorf("read key %s: %w", id, err)
	}
	if err := json.Unmarshal(msg.Data, &change); err != nil {
		return change, 0, fmt.Errorf("decode key %s: %w", id, err)
	}
	return change, msg.Sequence, nil
}

// validKeyID keeps what a path may hold from becoming subject wildcards.
func validKeyID(id string) bool {
	if id == "" || len(id) > 128 {
		return false
	}
	for _, c := range []byte(id) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			return false
		}
	}
	return true
}

// write is one record to store, over the one that was read.
type write struct {
	before stored
	after  key.Record
	typ    string
	reason string
}

// commitTimeout is how long a change waits for NATS.
const commitTimeout = 5 * time.Second

// commit stores the writes, all or none of them. errRace means that none was
// stored because a record is not the one that was read.
func (s *records) commit(ctx context.Context, by actor, writes ...write) error {
	if !s.nc.IsConnected() {
		// The client would keep the messages and send them when it is back, long
		// after the caller was told that the change failed.
		return fmt.Errorf("publish keys: %w", nats.ErrDisconnected)
	}
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	changes := make([]key.Change, len(writes))
	msgs := make([]*nats.Msg, len(writes))
	for i, w := range writes {
		now := s.now().UTC()
		changes[i] = key.Change{
			ID: s.ids.next("evt", now), Type: w.typ, Time: now, Actor: by.id, ActorIP: by.ip, Reason: w.reason, Record: w.after,
		}
		if w.before.seq != 0 {
			changes[i].Before = &w.before.Record
		}
		body, err := json.Marshal(changes[i])
		if err != nil {
			return fmt.Errorf("encode key %s: %w", w.after.ID, err)
		}
		msgs[i] = nats.NewMsg(bus.KeySubject(w.after.ID))
		msgs[i].Data = body
		msgs[i].Header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(w.before.seq, 10))
		msgs[i].Header.Set(jetstream.MsgIDHeader, changes[i].ID)
	}
	last, err := s.publish(ctx, msgs, changes[0].ID)
	if err != nil {
		// The answer may have been lost and the change stored all the same.
		stored, seq, readErr := s.lastChange(ctx, changes[len(changes)-1].Record.ID)
		if readErr != nil || stored.ID != changes[len(changes)-1].ID {
			return err
		}
		last = seq
	}
	for i, c := range changes {
		s.set.Apply(last-uint64(len(changes)-1-i), c.Record)
	}
	return nil
}

// publish stores the messages as one atomic batch (ADR-50) and returns the
// sequence of the last.
func (s *records) publish(ctx context.Context, msgs []*nats.Msg, batch string) (uint64, error) {
	if len(msgs) == 1 {
		ack, err := s.js.PublishMsg(ctx, msgs[0])
		if err != nil {
			return 0, publishError(err)
		}
		return ack.Sequence, nil
	}
	for i, m := range msgs {
		m.Header.Set("Nats-Batch-Id", batch)
		m.Header.Set("Nats-Batch-Sequence", strconv.Itoa(i+1))
		if i < len(msgs)-1 {
			if err := s.nc.PublishMsg(m); err != nil {
				return 0, fmt.Errorf("publish keys: %w", err)
			}
		}
	}
	commit := msgs[len(msgs)-1]
	commit.Header.Set("Nats-Batch-Commit", "1")
	reply, err := s.nc.RequestMsgWithContext(ctx, commit)
	if err != nil {
		return 0, fmt.Errorf("publish keys: %w", err)
	}
	var ack struct {
		Error *jetstream.APIError `json:"error"`
		Seq   uint64              `json:"seq"`
	}
	if err := json.Unmarshal(reply.Data, &ack); err != nil {
		return 0, fmt.Errorf("read answer of NATS: %w", err)
	}
	if ack.Error != nil {
		return 0, publishError(ack.Error)
	}
	return ack.Seq, nil
}

func publishError(err error) error {
	var apiErr *jetstream.APIError
	if errors.As(err, &apiErr) && (apiErr.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || apiErr.ErrorCode == wrongLastSequenceConstant) {
		return errRace
	}
	return fmt.Errorf("publish keys: %w", err)
}

// wrongLastSequenceConstant is what the server also says of a sequence that is
// not the last, where it does not name the last one.
const wrongLastSequenceConstant jetstream.ErrorCode = 10164

// change reads a key, lets edit change a copy of its record, and stores it; when
// somebody else was faster it begins anew. edit returns errNothing to leave the
// record as it is, or a problem to answer with.
func (s *records) change(ctx context.Context, by actor, id, typ string, edit func(r *key.Record) (reason string, err error)) (key.Record, error) {
	for range maxRaces {
		before, err := s.read(ctx, id)
		if err != nil {
			return key.Record{}, err
		}
		after := before.Record
		reason, err := edit(&after)
		if errors.Is(err, errNothing) {
			return before.Record, nil
		}
		if err != nil {
			return key.Record{}, err
		}
		err = s.commit(ctx, by, write{before: before, after: after, typ: typ, reason: reason})
		if !errors.Is(err, errRace) {
			return after, err
		}
	}
	return key.Record{}, errRace
}
