package detector

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/baseline"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// A snapshot makes all that a partition learned up to a sequence durable at one
// stroke: the changed profiles go into a journal, the commit record then names
// the sequence and the journal, and only after that is each profile written under
// its own name and the message acknowledged. Whoever takes over reads the
// profiles, lays the journal of the last commit over them, and reads USAGE on
// from the sequence behind it. So nothing is learned twice or not at all, which
// matters also for what belongs to no key, the refused sources.
//
// A former owner who does not know that he is one fails at the commit record or
// at a profile, for all are written by compare-and-set.
type snapshot struct {
	began    time.Time
	last     *bus.Message
	commit   commit
	revision uint64 // of the commit record before
	items    []item
	rows     []baseline.Row
	raised   []publication
	// stale are the owners whose journals are of no use once this one is written.
	stale []string
}

// item is a value of bucket baselines that is written anew.
type item struct {
	entry    *entry // nil for the sources
	token    string
	value    []byte // packed with s2 once it is stored or written
	revision uint64
}

// result is what became of a snapshot.
type result struct {
	err       error
	commit    uint64
	revisions []uint64 // of the items
}

// inlineJournal is how large a journal may be to travel in the commit record,
// and how large its parts are if it is larger.
const inlineJournal = 256 << 10

// rowsPerSnapshot bounds the rows for analysts; the rest comes with the next one.
const (
	rowsPerSnapshot = 200
	rowsPerMessage  = 50
)

// unsaved reports whether there is anything to write down.
func (w *worker) unsaved() bool {
	if len(w.dirty) > 0 || w.last != nil && w.last.Sequence > w.saved || w.stopping && len(w.due) > 0 {
		return true
	}
	// Rows become due by the clock. The oldest is first.
	return len(w.due) > 0 && time.Since(w.due[0].rowAt) >= w.s.cfg.BaselineInterval
}

// save begins a snapshot of everything up to the last message.
func (w *worker) save(ctx context.Context) {
	snap := &snapshot{began: time.Now(), last: w.last, revision: w.commit, raised: w.raised, stale: w.stale}
	if w.last != nil {
		w.saved = w.last.Sequence
	}
	snap.commit = commit{sequence: w.saved, owner: w.owner}
	snap.rows = w.takeRows(snap.began, !w.stopping)
	for _, e := range w.dirty {
		e.dirty = false
		snap.items = append(snap.items, item{e, keyToken(e.keyID), encodeProfile(&e.profile, w.engine.Encode(e.keyID)), e.revision})
	}
	if w.refused {
		snap.items = append(snap.items, item{nil, nameSources, w.engine.EncodeSources(), w.sources})
	}
	w.dirty, w.refused, w.raised, w.stale = nil, false, nil, nil
	w.pending, w.snapshot = snap, make(chan result, 1)
	go func(out chan<- result) { out <- w.s.write(ctx, w.p.Number, snap) }(w.snapshot)
}

// takeRows are the rows for analysts that are due now; all, if they are not
// to be spread over time.
func (w *worker) takeRows(now time.Time, spread bool) []baseline.Row {
	var rows []baseline.Row
	later := w.due[:0]
	for _, e := range w.due {
		if spread && (len(rows) >= rowsPerSnapshot || now.Sub(e.rowAt) < w.s.cfg.BaselineInterval) {
			later = append(later, e)
			continue
		}
		e.due, e.rowAt, e.row = false, now, e.sequence
		if row, known := w.engine.Baseline(e.keyID); known {
			row.Partition, row.Sequence = w.p.Number, e.sequence
			rows = append(rows, row)
		}
	}
	w.due = later
	return rows
}

// finish takes note of a written snapshot and acknowledges what it includes.
func (w *worker) finish(ctx context.Context, r result) error {
	snap := w.pending
	w.pending = nil
	took := time.Since(snap.began)
	w.nextSave = snap.began.Add(max(w.s.cfg.SnapshotInterval, 10*took))
	if r.err != nil {
		w.s.metrics.snapshots.WithLabelValues("error").Observe(took.Seconds())
		return fmt.Errorf("write snapshot: %w", r.err)
	}
	w.s.metrics.snapshots.WithLabelValues("ok").Observe(took.Seconds())
	w.s.metrics.profiles.Add(float64(len(snap.items)))
	w.commit = r.commit
	for i, it := range snap.items {
		if it.entry == nil {
			w.sources = r.revisions[i]
		} else {
			it.entry.revision = r.revisions[i]
		}
	}
	if snap.last == nil {
		return nil
	}
	return w.p.Ack(ctx, snap.last)
}

// write makes a snapshot durable. Alerts and rows come first: repeated after a
// crash they do no harm, left out they would.
func (s *Service) write(ctx context.Context, partition int, snap *snapshot) (r result) {
	for _, p := range snap.raised {
		if r.err = s.deliver(ctx, p); r.err != nil {
			return r
		}
	}
	if r.err = s.publishRows(ctx, partition, snap.rows); r.err != nil {
		return r
	}
	for i := range snap.items {
		snap.items[i].value = s2.Encode(nil, snap.items[i].value)
	}
	prefix := strconv.Itoa(partition) + "."
	if r.err = s.writeJournal(ctx, prefix, snap); r.err != nil {
		return r
	}
	if r.commit, r.err = s.compareAndSet(ctx, prefix+nameCommit, snap.commit.encode(), snap.revision); r.err != nil {
		return r
	}
	if r.revisions, r.err = s.writeItems(ctx, prefix, snap.items); r.err != nil {
		return r
	}
	if snap.commit.parts > 0 {
		snap.stale = append(snap.stale, snap.commit.owner)
	}
	for _, owner := range snap.stale {
		r.err = errors.Join(r.err, s.purgeJournal(ctx, prefix, owner))
	}
	return r
}

func (s *Service) publishRows(ctx context.Context, partition int, rows []baseline.Row) error {
	for len(rows) > 0 {
		part := rows[:min(rowsPerMessage, len(rows))]
		rows = rows[len(part):]
		body, err := json.Marshal(part)
		if err != nil {
			return fmt.Errorf("encode baseline rows: %w", err)
		}
		msg := nats.NewMsg(bus.BaselineSubject(partition))
		msg.Data = body
		msg.Header.Set("Content-Type", usage.ContentTypeJSON)
		if _, err := s.js.PublishMsg(ctx, msg); err != nil {
			return fmt.Errorf("publish baseline rows: %w", err)
		}
	}
	return nil
}

// writeJournal puts the items into the commit record or, where they are too
// large, into parts that the record then counts.
func (s *Service) writeJournal(ctx context.Context, prefix string, snap *snapshot) error {
	var part []byte
	flush := func() error {
		name := fmt.Sprintf("%s%s.%s.%d", prefix, nameJournal, snap.commit.owner, snap.commit.parts)
		if _, err := s.states.Put(ctx, name, part); err != nil {
			return fmt.Errorf("write journal: %w", err)
		}
		snap.commit.parts++
		part = nil
		return nil
	}
	for _, it := range snap.items {
		record := appendText(appendText(nil, it.token), string(it.value))
		if len(part) > 0 && len(part)+len(record) > inlineJournal {
			if err := flush(); err != nil {
				return err
			}
		}
		part = append(part, record...)
	}
	if snap.commit.parts == 0 {
		snap.commit.inline = part
		return nil
	}
	return flush()
}

func (s *Service) purgeJournal(ctx context.Context, prefix, owner string) error {
	stream, err := s.js.Stream(ctx, "KV_"+bus.Baselines)
	if err == nil {
		err = stream.Purge(ctx, jetstream.WithPurgeSubject(fmt.Sprintf("$KV.%s.%s%s.%s.>", bus.Baselines, prefix, nameJournal, owner)))
	}
	if err != nil {
		return fmt.Errorf("clear journal: %w", err)
	}
	return nil
}

// putWindow is how many profiles of one snapshot wait for their acknowledgement.
const putWindow = 128

// writeItems writes each item under its own name, many at once.
func (s *Service) writeItems(ctx context.Context, prefix string, items []item) ([]uint64, error) {
	revisions := make([]uint64, len(items))
	acks := make([]jetstream.PubAckFuture, len(items))
	land := func(i int) error {
		select {
		case ack := <-acks[i].Ok():
			revisions[i] = ack.Sequence
			return nil
		case err := <-acks[i].Err():
			return fmt.Errorf("write profile: %w", lost(err))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for i, it := range items {
		if i >= putWindow {
			if err := land(i - putWindow); err != nil {
				return nil, err
			}
		}
		var err error
		if acks[i], err = s.writes.PublishMsgAsync(setMessage(prefix+it.token, it.value, it.revision)); err != nil {
			return nil, fmt.Errorf("write profile: %w", err)
		}
	}
	for i := max(0, len(items)-putWindow); i < len(items); i++ {
		if err := land(i); err != nil {
			return nil, err
		}
	}
	return revisions, nil
}

// setMessage writes a name of bucket baselines if its revision is still that one.
func setMessage(name string, value []byte, revision uint64) *nats.Msg {
	msg := nats.NewMsg("$KV." + bus.Baselines + "." + name)
	msg.Data = value
	msg.Header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(revision, 10))
	return msg
}

func (s *Service) compareAndSet(ctx context.Context, name string, value []byte, revision uint64) (uint64, error) {
	ack, err := s.js.PublishMsg(ctx, setMessage(name, value, revision))
	if err != nil {
		return 0, fmt.Errorf("commit snapshot: %w", lost(err))
	}
	return ack.Sequence, nil
}

// lost marks the error of a compare-and-set that another owner was ahead of.
func lost(err error) error {
	var api *jetstream.APIError
	if errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
		return fmt.Errorf("%w: another owner wrote: %w", bus.ErrLost, err)
	}
	return err
}

// commit is the record under nameCommit.
type commit struct {
	// sequence is that of the last message that the snapshot includes.
	sequence uint64
	owner    string
	// parts is how many parts the journal has, 0 if it is inline.
	parts  int
	inline []byte
}

const commitVersion = 1

var errCommitVersion = errors.New("decode commit record: of another version")

func (c commit) encode() []byte {
	b := binary.AppendUvarint([]byte{commitVersion}, c.sequence)
	b = appendText(b, c.owner)
	b = binary.AppendUvarint(b, uint64(c.parts))
	return append(b, c.inline...)
}

func decodeCommit(b []byte) (commit, error) {
	if len(b) == 0 || b[0] != commitVersion {
		return commit{}, errCommitVersion
	}
	r := reader{data: b[1:]}
	c := commit{sequence: r.number(), owner: r.text(), parts: int(r.number())}
	c.inline = r.data
	if r.bad {
		return commit{}, errors.New("decode commit record: cut short")
	}
	return c, nil
}

// stored is what bucket baselines holds of a partition.
type stored struct {
	values map[string]*item // by token
	commit commit
	// revision is that of the commit record, 0 if there is none.
	revision uint64
	// unreadable says that the commit record is of another version, due that a rebuild
	// of the partition is.
	unreadable, due bool
	journals        map[string][][]byte // parts by owner
}

// restore reads the partition's state and returns the sequence to read USAGE from.
func (w *worker) restore(ctx context.Context) (uint64, error) {
	st, err := w.s.readState(ctx, w.p.Number)
	if err != nil {
		return 0, err
	}
	fresh, err := st.overlay()
	if err != nil {
		return 0, err
	}
	unreadable := 0
	for token, it := range st.values {
		if token == nameSources {
			w.restoreSources(it, fresh[token])
		} else if !w.restoreKey(token, it, fresh[token]) {
			unreadable++
		}
	}
	if err := w.repair(ctx, st, unreadable); err != nil {
		return 0, err
	}
	for _, owner := range slices.Sorted(maps.Keys(st.journals)) {
		if owner == st.commit.owner || !beingRebuilt(owner) {
			w.stale = append(w.stale, owner)
		}
	}
	w.commit = st.revision
	w.saved = st.commit.sequence
	if st.revision == 0 || st.unreadable {
		if w.saved, err = w.p.AckFloor(ctx); err != nil {
			return 0, err
		}
	}
	w.log.Debug("partition restored", "keys", len(w.entries), "sequence", w.saved, "journal", len(fresh))
	return w.saved + 1, nil
}

func (w *worker) restoreKey(token string, it *item, fromJournal bool) bool {
	keyID := keyOfToken(token)
	e := w.add(keyID)
	e.revision = it.revision
	p, state, err := decodeProfile(it.value)
	if err == nil && len(state) == 0 {
		return true // earlier versions kept a guessed key
	}
	if err == nil {
		err = w.engine.Decode(keyID, state)
	}
	if err != nil {
		return false
	}
	e.profile, e.includes = p, p.sequence
	for _, a := range p.alerts {
		w.alerts[a.id] = keyID
		w.judge(e, a.id)
	}
	if fromJournal {
		w.mark(e)
	}
	if e.row < e.sequence && !e.due {
		e.due = true
		w.due = append(w.due, e)
	}
	return true
}

func (w *worker) restoreSources(it *item, fromJournal bool) {
	w.sources, w.refused = it.revision, fromJournal
	state, err := s2.Decode(nil, it.value)
	if err == nil {
		err = w.engine.DecodeSources(state)
	}
	if err != nil {
		w.log.Warn("refused sources of another version are left out", "error", err)
	}
}

// readState reads everything that the bucket holds of a partition.
func (s *Service) readState(ctx context.Context, partition int) (*stored, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	prefix := strconv.Itoa(partition) + "."
	watch, err := s.states.Watch(ctx, prefix+">", jetstream.IgnoreDeletes())
	if err != nil {
		return nil, fmt.Errorf("read baselines: %w", err)
	}
	defer func() { _ = watch.Stop() }()
	st := &stored{values: map[string]*item{}, journals: map[string][][]byte{}}
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case update, open := <-watch.Updates():
			if !open {
				return nil, errors.New("read baselines: the watch ended")
			}
			if update == nil {
				return st, nil
			}
			if err := st.add(strings.TrimPrefix(update.Key(), prefix), update.Value(), update.Revision()); err != nil {
				return nil, err
			}
		}
	}
}

func (st *stored) add(token string, value []byte, revision uint64) (err error) {
	switch token {
	case nameCommit:
		st.revision = revision
		st.commit, err = decodeCommit(value)
		if st.unreadable = errors.Is(err, errCommitVersion); st.unreadable {
			return nil
		}
		return err
	case nameRebuild:
		st.due = true
		return nil
	}
	if rest, isPart := strings.CutPrefix(token, nameJournal+"."); isPart {
		owner, _, _ := strings.Cut(rest, ".")
		st.journals[owner] = append(st.journals[owner], value)
		return nil
	}
	st.values[token] = &item{token: token, value: value, revision: revision}
	return nil
}

// overlay lays the journal of the last commit over the values and returns which
// changed by it. A journal of which parts are missing was done with: its parts
// are cleared only after every item was written.
func (st *stored) overlay() (map[string]bool, error) {
	parts := [][]byte{st.commit.inline}
	if st.commit.parts > 0 {
		parts = st.journals[st.commit.owner]
		if len(parts) != st.commit.parts {
			return nil, nil
		}
	}
	fresh := map[string]bool{}
	for _, part := range parts {
		for r := (reader{data: part}); len(r.data) > 0; {
			token, value := r.text(), r.bytes()
			if r.bad {
				return nil, errors.New("read journal: cut short")
			}
			it := st.values[token]
			if it == nil {
				it = &item{token: token}
				st.values[token] = it
			}
			if string(it.value) != string(value) {
				it.value = value
				fresh[token] = true
			}
		}
	}
	return fresh, nil
}
