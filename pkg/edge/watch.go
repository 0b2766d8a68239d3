package edge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Stream and subjects that carry the keys.
const (
	keyStream  = "KEYS"
	keySubject = "keys."
)

// WatchOptions tune [Keyset.Watch]; the zero value is good.
type WatchOptions struct {
	// Log is told of trouble; nil is silent.
	Log *slog.Logger
	// Poll is how often the watch proves that it has missed nothing, 2 s by
	// default. [Keyset.Synced] is at most this old while NATS answers.
	Poll time.Duration
	// Clock is the time, time.Now by default.
	Clock func() time.Time
}

func (o *WatchOptions) defaults() {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Poll <= 0 {
		o.Poll = 2 * time.Second
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
}

// feed is what a Keyset knows of where its records come from.
type feed struct {
	loaded  chan struct{} // closed once the first load is complete
	once    sync.Once
	synced  atomic.Int64 // unix nanoseconds of the last proof, 0 before the first
	bad     atomic.Uint64
	changes atomic.Uint64

	// What follows belongs to the goroutine of Watch.
	origin time.Time // when the stream was created
	reach  uint64    // highest sequence of it that was ever seen
	// realigned says that the stream is another and its load not yet complete.
	realigned bool
}

func (f *feed) init() { f.loaded = make(chan struct{}) }

// Loaded is closed once the set has held every key of the stream for the first time.
func (s *Keyset) Loaded() <-chan struct{} { return s.feed.loaded }

// Synced is the last moment at which the set was proven to hold every change
// that the stream had; the zero time before the first load. It grows old while
// NATS is away.
func (s *Keyset) Synced() time.Time {
	ns := s.feed.synced.Load()
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

// MarkSynced says that the set is complete at t. [Keyset.Watch] calls it; a
// program that fills its set with [Keyset.Apply] calls it itself.
func (s *Keyset) MarkSynced(t time.Time) {
	s.feed.synced.Store(t.UnixNano())
	s.feed.once.Do(func() { close(s.feed.loaded) })
}

// Stats of what the watch has read.
type Stats struct {
	Keys    int
	Changes uint64 // messages that were news
	Bad     uint64 // messages that could not be read; their keys are refused
}

// Stats counts what the watch has read so far.
func (s *Keyset) Stats() Stats {
	return Stats{Keys: s.Len(), Changes: s.feed.changes.Load(), Bad: s.feed.bad.Load()}
}

// Watch fills the set from the stream KEYS and follows it until ctx is done. It
// survives the restart and the loss of NATS: meanwhile the set answers with what
// it knows, and [Keyset.Synced] says how old that is. The stream may be created
// after Watch has begun. The error is that of ctx.
func (s *Keyset) Watch(ctx context.Context, js jetstream.JetStream, opts WatchOptions) error {
	opts.defaults()
	for {
		err := s.follow(ctx, js, opts)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		opts.Log.Warn("watch of the keys ended, beginning it again", "error", err, "synced", s.Synced())
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(opts.Poll, time.Second)):
		}
	}
}

// session is one consumer's life: from the last record of every key to now.
// Changes are applied where they are delivered, since reading one takes less time
// than handing it to another goroutine.
type session struct {
	set    *Keyset
	opts   WatchOptions
	origin time.Time // when the stream was created: another one is another history
	target uint64    // last sequence of the stream before the consumer was made

	// mu is held while a message is applied: an ordered consumer that begins anew
	// may deliver before the handler of its last delivery has returned.
	mu      sync.Mutex
	reader  changeReader
	seen    uint64 // highest sequence applied
	drained bool   // a message said that nothing was left behind it
	ended   bool   // what comes now is of another history perhaps
}

// progress is the highest sequence applied, and whether there was ever none left.
func (ses *session) progress() (seen uint64, drained bool) {
	ses.mu.Lock()
	defer ses.mu.Unlock()
	return ses.seen, ses.drained
}

func (ses *session) end() {
	ses.mu.Lock()
	defer ses.mu.Unlock()
	ses.ended = true
}

var errStuck = errors.New("the stream has messages that its consumer does not deliver")

// follow runs one consumer until it is of no more use.
func (s *Keyset) follow(ctx context.Context, js jetstream.JetStream, opts WatchOptions) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	info, err := streamInfo(ctx, js)
	if err != nil {
		return err
	}
	ses := &session{
		set: s, opts: opts,
		origin: info.Created, target: info.State.LastSeq, drained: info.State.Msgs == 0,
	}
	defer ses.end()
	s.align(info)
	s.expect(info.State.NumSubjects)
	cons, err := js.OrderedConsumer(ctx, keyStream, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{keySubject + "*"},
		DeliverPolicy:  jetstream.DeliverLastPerSubjectPolicy,
	})
	if err != nil {
		return fmt.Errorf("create consumer of the keys: %w", err)
	}
	cc, err := cons.Consume(ses.take,
		jetstream.PullMaxMessages(2000),
		jetstream.ConsumeErrHandler(func(_ jetstream.ConsumeContext, err error) {
			opts.Log.Debug("consumer of the keys", "error", err)
		}))
	if err != nil {
		return fmt.Errorf("consume the keys: %w", err)
	}
	defer cc.Stop()
	return ses.prove(ctx, js)
}

func streamInfo(ctx context.Context, js jetstream.JetStream) (*jetstream.StreamInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	stream, err := js.Stream(ctx, keyStream)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", keyStream, err)
	}
	return stream.CachedInfo(), nil
}

// take applies one message.
func (ses *session) take(m jetstream.Msg) {
	meta, err := m.Metadata()
	if err != nil {
		return
	}
	ses.mu.Lock()
	defer ses.mu.Unlock()
	if ses.ended {
		return
	}
	ses.apply(strings.TrimPrefix(m.Subject(), keySubject), meta.Sequence.Stream, m.Data())
	ses.seen = max(ses.seen, meta.Sequence.Stream)
	if meta.NumPending == 0 && !ses.drained {
		ses.drained = true
		ses.settle()
	}
}

func (ses *session) apply(id string, seq uint64, data []byte) {
	rec, err := ses.reader.read(data)
	if err == nil && rec.ID != id {
		err = fmt.Errorf("the record of %q came on the subject of %q", rec.ID, id)
	}
	news := false
	if err == nil {
		full := rec.full()
		news, err = ses.set.Apply(&full, seq)
	}
	if err != nil {
		ses.set.feed.bad.Add(1)
		ses.set.quarantine(id, seq)
		ses.opts.Log.Error("read key record, the key is refused until a good one comes",
			"key_id", id, "sequence", seq, "error", err)
	}
	if news {
		ses.set.feed.changes.Add(1)
	}
}

// settle ends the first load as soon as it is complete, without waiting for the
// next poll.
func (ses *session) settle() {
	select {
	case <-ses.set.feed.loaded:
	default:
		ses.set.settle()
		ses.set.MarkSynced(ses.opts.Clock())
	}
}

// align prepares the set for a stream that may not be the one it was filled
// from: created anew, or put back from a backup, it numbers its messages from
// below, and all of them would look old. The keys stay as they are until their
// records come again; those that the new history does not know are dropped by
// [Keyset.dropForgotten]. A revoked key stays revoked through all that.
func (s *Keyset) align(info *jetstream.StreamInfo) {
	f := &s.feed
	if !f.origin.IsZero() && (!f.origin.Equal(info.Created) || info.State.LastSeq < f.reach) {
		s.mu.Lock()
		for id, k := range s.byID {
			again := *k
			again.seq = 0
			s.byID[id] = &again
			s.insert(&again)
		}
		s.mu.Unlock()
		f.reach, f.realigned = 0, true
	}
	f.origin = info.Created
	f.reach = max(f.reach, info.State.LastSeq)
}

// dropForgotten takes away the keys that a new history of the stream does not know.
func (s *Keyset) dropForgotten() {
	if !s.feed.realigned {
		return
	}
	s.feed.realigned = false
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, k := range s.byID {
		if k.seq != 0 || k.state == stateRevoked {
			continue
		}
		gone := *k
		gone.state = stateGone
		s.insert(&gone)
		delete(s.byID, id)
	}
}

// prove asks the stream again and again how far it is, and says that the set is
// in step once everything up to there was applied. A consumer that stands still
// behind the stream, or a stream that is another than before, ends the session.
func (ses *session) prove(ctx context.Context, js jetstream.JetStream) error {
	tick := time.NewTicker(ses.opts.Poll)
	defer tick.Stop()
	if _, drained := ses.progress(); drained && ses.target == 0 {
		ses.settle()
	}
	var stuck int
	var before uint64
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		asked := ses.opts.Clock()
		info, err := streamInfo(ctx, js)
		switch {
		case err != nil:
			ses.opts.Log.Debug("ask how far the keys are", "error", err)
			continue
		case !info.Created.Equal(ses.origin):
			return fmt.Errorf("stream %s was created anew at %s", keyStream, info.Created)
		}
		// The last message can be gone (deleted, purged): what counts then is that
		// the consumer had nothing left when the stream stood at its target.
		reach, drained := ses.progress()
		if drained {
			reach = max(reach, ses.target)
		}
		switch {
		case info.State.LastSeq < reach:
			return fmt.Errorf("stream %s went back from %d to %d", keyStream, reach, info.State.LastSeq)
		case info.State.LastSeq == reach || info.State.Msgs == 0:
			stuck = 0
			if drained || info.State.Msgs == 0 {
				ses.set.dropForgotten()
				ses.set.MarkSynced(asked)
			}
		case reach == before:
			if stuck++; stuck >= 5 {
				return errStuck
			}
		default:
			stuck = 0
		}
		before = reach
		ses.set.feed.reach = max(ses.set.feed.reach, reach)
	}
}
