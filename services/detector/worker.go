package detector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// Limits of one fetch.
const (
	fetchCount = 1000
	fetchBytes = 4 << 20
	// fetchWait is how long a fetch waits while there is something to settle or to
	// write down, idleWait while there is not.
	fetchWait = 200 * time.Millisecond
	idleWait  = time.Second
)

// worker owns one partition: an engine with the baselines of its keys. All is
// for the goroutine of own, but for inbox.
type worker struct {
	s       *Service
	p       *bus.Partition
	log     *slog.Logger
	engine  *anomaly.Engine
	decoder usage.Decoder
	// owner names this tenure of the partition, for its part of the journal.
	owner string

	entries map[string]*entry // by key id
	alerts  map[string]string // alert id → key id
	// dirty are the keys with news since the last snapshot, due those whose row for
	// analysts is behind.
	dirty []*entry
	due   []*entry

	commit  uint64 // revision of the commit record
	sources uint64 // revision of the sources
	refused bool   // the sources have news
	last    *bus.Message
	saved   uint64 // sequence of the last snapshot begun

	stale []string // owners of journals that the next snapshot makes useless

	raised   []publication
	snapshot chan result // of the snapshot being written, nil if none
	pending  *snapshot
	stopping bool
	nextSave time.Time

	mu         sync.Mutex
	judged     []string // alert ids with a new verdict
	rotated    []string // key ids that were just made by a rotation
	rebudgeted []string // key ids with a new budget, "" for all
}

// entry is a key of a worker.
type entry struct {
	profile
	keyID    string
	revision uint64 // in the bucket, 0 if not there
	// includes is the sequence up to which the restored profile has learned. It
	// lies behind the commit's after a rebuild only, for keys that were not rebuilt.
	includes uint64
	rowAt    time.Time
	dirty    bool
	due      bool
}

// publication is an alert on its way into JetStream.
type publication struct {
	msg *nats.Msg
	ack jetstream.PubAckFuture
	// stored is when JetStream had the event, zero for history.
	stored time.Time
}

// own works on a partition until ctx is done or the partition is lost.
func (s *Service) own(ctx context.Context, p *bus.Partition) error {
	w := &worker{
		s: s, p: p, log: s.log.With("partition", p.Number), engine: s.newEngine(), owner: strconv.FormatInt(time.Now().UnixNano(), 36),
		entries: map[string]*entry{}, alerts: map[string]string{},
	}
	s.mu.Lock()
	s.workers[p.Number] = w
	s.mu.Unlock()
	s.metrics.partitions.Inc()
	defer w.leave()
	from, err := w.restore(ctx)
	if err != nil {
		return err
	}
	if err := p.Reset(ctx, from); err != nil {
		return err
	}
	// A snapshot that was begun is written to its end when the service stops.
	writing, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	err = w.work(ctx, writing)
	if ctx.Err() != nil && !errors.Is(err, bus.ErrLost) {
		time.AfterFunc(stopTimeout, cancel)
		return w.stop(writing)
	}
	return err
}

// stopTimeout is how long a stopping service may take to write down what it knows.
const stopTimeout = 3 * time.Second

func (w *worker) leave() {
	w.s.mu.Lock()
	if w.s.workers[w.p.Number] == w {
		delete(w.s.workers, w.p.Number)
	}
	w.s.mu.Unlock()
	w.s.metrics.partitions.Dec()
	w.s.metrics.keys.Sub(float64(len(w.entries)))
}

func (w *worker) work(ctx, writing context.Context) error {
	for {
		wait := idleWait
		if w.pending != nil || len(w.raised) > 0 || w.unsaved() {
			wait = fetchWait
		}
		msgs, err := w.p.Fetch(ctx, fetchCount, fetchBytes, wait)
		if err != nil {
			return err
		}
		touched := time.Now()
		for _, m := range msgs {
			if err := w.message(ctx, m); err != nil {
				return err
			}
			w.last = m
			if time.Since(touched) > time.Second {
				w.p.Touch()
				touched = time.Now()
			}
		}
		w.listen(ctx)
		if err := w.settle(ctx); err != nil {
			return err
		}
		if w.pending == nil && time.Now().After(w.nextSave) && w.unsaved() {
			w.save(writing)
		}
	}
}

// stop writes down everything when the service stops, so that the next owner
// has nothing to read again.
func (w *worker) stop(ctx context.Context) error {
	w.stopping = true
	for range 2 { // the snapshot on its way, then one of what came since
		if w.pending != nil {
			if err := w.finish(ctx, <-w.snapshot); err != nil {
				return err
			}
		}
		if w.unsaved() {
			w.save(ctx)
		}
	}
	if w.pending != nil {
		return w.finish(ctx, <-w.snapshot)
	}
	return nil
}

// message learns from one message. Whatever is in it, the partition goes on.
func (w *worker) message(ctx context.Context, m *bus.Message) error {
	misplaced, err := w.observe(ctx, m)
	if err != nil {
		w.s.metrics.panics.Inc()
		w.log.Error("a message was given up", "sequence", m.Sequence, "error", err)
		w.s.deadLetter(ctx, m, err.Error())
	}
	if len(misplaced) == 0 {
		return nil
	}
	w.s.metrics.misplaced.Add(float64(len(misplaced)))
	err = bus.Reroute(ctx, w.s.js, m, w.p.Count, misplaced)
	if bus.IsFull(err) {
		// The stream only gets room by what we acknowledge. The collector sends
		// them on too, or keeps them as a dead letter.
		w.log.Warn("events of another partition are left to the collector", "sequence", m.Sequence, "events", len(misplaced), "error", err)
		return nil
	}
	return err
}

func (w *worker) observe(ctx context.Context, m *bus.Message) (misplaced []bus.Misplaced, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
		}
	}()
	history := m.History()
	learned := 0
	decodeErr := m.Events(&w.decoder, func(i int, ev *usage.Event, bad error) {
		switch {
		case bad != nil:
			w.s.metrics.refused.Inc()
			return
		case usage.Partition(ev.KeyID, w.p.Count) != w.p.Number:
			misplaced = append(misplaced, bus.Misplaced{Index: i, Event: *ev})
			return
		}
		learned++
		w.event(ctx, m, ev, history)
	})
	if decodeErr != nil {
		w.s.metrics.refused.Inc()
	}
	w.s.metrics.events.WithLabelValues(modeOf(history)).Add(float64(learned))
	return misplaced, nil
}

func (w *worker) event(ctx context.Context, m *bus.Message, ev *usage.Event, history bool) {
	e := w.entries[ev.KeyID]
	if e == nil {
		w.inherit(ctx, ev.KeyID)
	} else if m.Sequence <= e.includes {
		return
	}
	alerts := w.engine.Observe(ev, history)
	if ev.Decision == usage.Deny {
		w.refused = true
	}
	if e == nil {
		if !w.engine.Knows(ev.KeyID) {
			return // a guessed key: it counts for its source, and must not fill the bucket
		}
		e = w.add(ev.KeyID)
	}
	e.sequence = m.Sequence
	w.mark(e)
	for i := range alerts {
		e.raised(alerts[i].ID)
		w.alerts[alerts[i].ID] = ev.KeyID
		w.publish(&alerts[i], m)
	}
}

func (w *worker) add(keyID string) *entry {
	e := &entry{keyID: keyID}
	w.entries[keyID] = e
	w.s.metrics.keys.Inc()
	return e
}

func (w *worker) mark(e *entry) {
	if !e.dirty {
		e.dirty = true
		w.dirty = append(w.dirty, e)
	}
	if !e.due {
		e.due = true
		w.due = append(w.due, e)
	}
}

// inherit gives a key that is seen for the first time the baseline of the key
// that it was rotated from, which another partition may hold.
func (w *worker) inherit(ctx context.Context, keyID string) {
	value, rotated := w.s.parents.Load(keyID)
	if !rotated {
		return
	}
	parent := value.(string)
	if w.entries[parent] != nil {
		w.engine.Inherit(keyID, parent)
		return
	}
	name := strconv.Itoa(usage.Partition(parent, w.p.Count)) + "." + keyToken(parent)
	stored, err := w.s.states.Get(ctx, name)
	if err != nil {
		if !errors.Is(err, jetstream.ErrKeyNotFound) {
			w.log.Warn("a rotated key starts without its parent's baseline", "key", keyID, "error", err)
		}
		return
	}
	_, state, err := decodeProfile(stored.Value())
	if err == nil {
		err = w.engine.Decode(parent, state)
	}
	if err != nil {
		w.log.Warn("a rotated key starts without its parent's baseline", "key", keyID, "error", err)
		return
	}
	w.engine.Inherit(keyID, parent)
	w.engine.Forget(parent)
}

// publish sends an alert on its way at once; that it arrived is looked at before
// the message is acknowledged. Its id makes every repetition harmless.
func (w *worker) publish(a *alert.Alert, m *bus.Message) {
	a.DetectedAt = time.Now().UTC()
	body, err := json.Marshal(a)
	if err != nil {
		w.log.Error("an alert cannot be written", "alert", a.ID, "error", err) // no alert is like that
		return
	}
	if a.Revision == 1 {
		for _, t := range a.Triggers {
			w.s.metrics.alerts.WithLabelValues(t, modeOf(m.History())).Inc()
		}
	}
	msg := nats.NewMsg(bus.AlertSubject(a.OrgID, a.KeyID))
	msg.Data = body
	msg.Header.Set(nats.MsgIdHdr, a.ID+"."+strconv.Itoa(a.Revision))
	msg.Header.Set("Content-Type", usage.ContentTypeJSON)
	pub := publication{msg: msg}
	if !m.History() {
		pub.stored = m.Time
	}
	// A publish that cannot even begin is tried again when it is settled.
	pub.ack, _ = w.s.js.PublishMsgAsync(msg)
	w.raised = append(w.raised, pub)
}

// settle takes note of what JetStream answered meanwhile: alerts that arrived,
// and the snapshot that was being written.
func (w *worker) settle(ctx context.Context) error {
	w.raised = slices.DeleteFunc(w.raised, func(p publication) bool {
		if p.ack == nil {
			return false
		}
		select {
		case <-p.ack.Ok():
			w.s.metrics.arrived(p)
			return true
		default:
			return false
		}
	})
	if w.pending == nil {
		return nil
	}
	select {
	case r := <-w.snapshot:
		return w.finish(ctx, r)
	default:
		return nil
	}
}

func (m *metrics) arrived(p publication) {
	if !p.stored.IsZero() {
		m.latency.Observe(time.Since(p.stored).Seconds())
	}
}

// deliver waits until an alert is stored, for as long as it takes.
func (s *Service) deliver(ctx context.Context, p publication) error {
	if p.ack != nil {
		select {
		case <-p.ack.Ok():
			s.metrics.arrived(p)
			return nil
		case err := <-p.ack.Err():
			s.log.Debug("an alert is published again", "error", err)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for delay := 50 * time.Millisecond; ; delay = min(2*delay, 5*time.Second) {
		again := &nats.Msg{Subject: p.msg.Subject, Header: p.msg.Header, Data: p.msg.Data}
		_, err := s.js.PublishMsg(ctx, again)
		if err == nil {
			s.metrics.arrived(p)
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("publish alert: %w", errors.Join(ctx.Err(), err))
		case <-time.After(delay):
			s.log.Warn("an alert is not stored yet", "error", err)
		}
	}
}

// tell is called by the watchers of verdicts and of keys.
func (w *worker) tell(alertID, keyID string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if alertID != "" {
		w.judged = append(w.judged, alertID)
	}
	if keyID != "" {
		w.rotated = append(w.rotated, keyID)
	}
}

// rebudget is called by the watchers of keys and of organizations.
func (w *worker) rebudget(keyID string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rebudgeted = append(w.rebudgeted, keyID)
}

// listen does what the watchers told.
func (w *worker) listen(ctx context.Context) {
	w.mu.Lock()
	judged, rotated, rebudgeted := w.judged, w.rotated, w.rebudgeted
	w.judged, w.rotated, w.rebudgeted = nil, nil, nil
	w.mu.Unlock()
	for _, keyID := range rebudgeted {
		w.engine.Rebudget(keyID)
	}
	for _, id := range judged {
		if keyID, known := w.alerts[id]; known {
			w.judge(w.entries[keyID], id)
		}
	}
	for _, keyID := range rotated {
		// A key that was used before its rotation was known; the engine leaves one
		// alone that has lived on its own for long.
		if e := w.entries[keyID]; e != nil {
			w.inherit(ctx, keyID)
			w.mark(e)
		}
	}
}

// judge tells the engine the verdict on an alert, each once.
func (w *worker) judge(e *entry, alertID string) {
	v, given := w.s.verdictOf(alertID)
	if !given || e == nil {
		return
	}
	for i := range e.alerts {
		if e.alerts[i].id == alertID && e.alerts[i].verdict != v.Verdict {
			w.engine.Verdict(e.keyID, alertID, v.Verdict, v.Time)
			e.alerts[i].verdict = v.Verdict
			w.mark(e)
		}
	}
}
