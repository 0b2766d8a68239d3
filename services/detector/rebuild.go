package detector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"github.com/klauspost/compress/s2"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/baseline"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// Rebuilt is what a rebuild counted.
type Rebuilt struct {
	Events int64 `json:"events"`
	Keys   int   `json:"keys"`
}

// Rebuild makes the baselines anew from the events that ClickHouse holds since a
// time, through the same engine, and raises nothing. Keys without an event in that
// time keep what they have.
//
// Detectors may run meanwhile: the new baselines become the state of a partition at
// one stroke, like a snapshot, as of what the collector has stored. The owner of the
// partition fails at its next snapshot, takes the partition again, and reads USAGE on
// from there. progress is called with the number of events now and then.
func (s *Service) Rebuild(ctx context.Context, db driver.Conn, since time.Time, progress func(events int64)) (*Rebuilt, error) {
	return s.rebuild(ctx, db, since, nil, progress)
}

// rebuild is Rebuild of some partitions, of all if only is nil.
func (s *Service) rebuild(ctx context.Context, db driver.Conn, since time.Time, only map[int]bool, progress func(events int64)) (*Rebuilt, error) {
	r := &rebuild{s: s, engine: s.newEngine(), owner: newRebuildOwner(time.Now()), only: only, verdicts: map[string]verdict{}}
	if err := r.prepare(ctx); err != nil {
		return nil, err
	}
	if err := r.read(ctx, db, since, progress); err != nil {
		return nil, err
	}
	if err := r.commit(ctx); err != nil {
		return nil, err
	}
	return &r.done, nil
}

// rebuildOwner begins the owner of a rebuild's journal; when it began follows.
const rebuildOwner = "rebuild-"

// rebuildPatience is how long a rebuild may take before its journal counts as left behind.
const rebuildPatience = 24 * time.Hour

func newRebuildOwner(now time.Time) string {
	return rebuildOwner + strconv.FormatInt(now.UnixNano(), 36)
}

// beingRebuilt reports whether a journal that no commit names is of a rebuild that
// may still be writing it.
func beingRebuilt(owner string) bool {
	began, isRebuild := strings.CutPrefix(owner, rebuildOwner)
	nanos, err := strconv.ParseInt(began, 36, 64)
	return isRebuild && err == nil && time.Since(time.Unix(0, nanos)) < rebuildPatience
}

// rebuild reads key by key, so its memory does not grow with their number; what
// is seen across keys, sources that guess them, is not part of it.
type rebuild struct {
	s        *Service
	engine   *anomaly.Engine
	owner    string
	only     map[int]bool // partitions, nil for all
	created  time.Time    // of the stream: rows from before have sequences of another one
	floors   []uint64     // what the collector has stored, by partition
	parts    []rebuiltPart
	verdicts map[string]verdict
	done     Rebuilt

	key     string
	profile profile
}

// rebuiltPart is what waits to be written of a partition.
type rebuiltPart struct {
	journal []byte
	written int
	rows    []baseline.Row
}

func (r *rebuild) prepare(ctx context.Context) error {
	stream, err := r.s.js.Stream(ctx, bus.Usage)
	if err != nil {
		return fmt.Errorf("look up stream %s: %w", bus.Usage, err)
	}
	r.created = stream.CachedInfo().Created
	n, err := bus.PartitionCount(ctx, r.s.js)
	if err != nil {
		return err
	}
	r.parts, r.floors = make([]rebuiltPart, n), make([]uint64, n)
	for p := range n {
		c, err := stream.Consumer(ctx, bus.ConsumerName(bus.Collector, p))
		if err != nil {
			return fmt.Errorf("look up the collector's place in partition %d: %w", p, err)
		}
		r.floors[p] = c.CachedInfo().AckFloor.Stream
	}
	if err := r.clear(ctx); err != nil {
		return err
	}
	return r.readVerdicts(ctx)
}

// clear removes what a rebuild left behind that was broken off.
func (r *rebuild) clear(ctx context.Context) error {
	for p := range r.parts {
		st, err := r.s.readCommit(ctx, p)
		if err != nil {
			return err
		}
		names, err := r.s.states.ListKeysFiltered(ctx, fmt.Sprintf("%d.%s.>", p, nameJournal))
		if err != nil {
			return fmt.Errorf("list journals: %w", err)
		}
		for name := range names.Keys() {
			owner := strings.Split(name, ".")[2]
			if strings.HasPrefix(owner, rebuildOwner) && owner != st.owner && !beingRebuilt(owner) {
				if err := r.s.states.Purge(ctx, name); err != nil {
					return fmt.Errorf("clear journal: %w", err)
				}
			}
		}
	}
	return nil
}

// readCommit reads the commit record of a partition, the zero one if there is none.
func (s *Service) readCommit(ctx context.Context, p int) (commit, error) {
	stored, err := s.states.Get(ctx, strconv.Itoa(p)+"."+nameCommit)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return commit{}, nil
	}
	if err != nil {
		return commit{}, fmt.Errorf("read commit record: %w", err)
	}
	c, err := decodeCommit(stored.Value())
	if errors.Is(err, errCommitVersion) {
		return commit{}, nil
	}
	return c, err
}

func (r *rebuild) readVerdicts(ctx context.Context) error {
	kv, err := r.s.js.KeyValue(ctx, bus.Verdicts)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", bus.Verdicts, err)
	}
	keys, err := kv.ListKeys(ctx)
	if err != nil {
		return fmt.Errorf("read verdicts: %w", err)
	}
	for id := range keys.Keys() {
		stored, err := kv.Get(ctx, id)
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read verdict: %w", err)
		}
		var v verdict
		if err := json.Unmarshal(stored.Value(), &v); err == nil {
			r.verdicts[id] = v
		}
	}
	return nil
}

// rebuildQuery reads in the order of the table's key, which costs no sorting.
const rebuildQuery = "SELECT id, time, org_id, key_id, source_ip, method, route, status, scope, decision, deny_reason, user_agent, partition, sequence, ingested_at" +
	" FROM usage_events WHERE time >= ? ORDER BY org_id, key_id, time, sequence, `index`"

func (r *rebuild) read(ctx context.Context, db driver.Conn, since time.Time, progress func(int64)) (err error) {
	rows, err := db.Query(ctx, rebuildQuery, since)
	if err != nil {
		return fmt.Errorf("query usage_events: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var (
			ev        usage.Event
			ip        netip.Addr
			partition uint16
			sequence  uint64
			ingested  time.Time
		)
		if err := rows.Scan(&ev.ID, &ev.Time, &ev.OrgID, &ev.KeyID, &ip, &ev.Method, &ev.Route, &ev.Status, &ev.Scope,
			&ev.Decision, &ev.DenyReason, &ev.UserAgent, &partition, &sequence, &ingested); err != nil {
			return fmt.Errorf("read usage_events: %w", err)
		}
		ev.SourceIP = ip
		if ingested.Before(r.created) {
			sequence = 0
		} else if int(partition) < len(r.floors) && sequence > r.floors[partition] {
			continue // stored since we began: USAGE brings it
		}
		ev.Normalize()
		if err := r.event(ctx, &ev, sequence); err != nil {
			return err
		}
		if r.done.Events++; r.done.Events%10_000 == 0 {
			progress(r.done.Events)
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read usage_events: %w", err)
	}
	progress(r.done.Events)
	return r.finishKey(ctx)
}

func (r *rebuild) event(ctx context.Context, ev *usage.Event, sequence uint64) error {
	if ev.KeyID != r.key {
		if err := r.finishKey(ctx); err != nil {
			return err
		}
		r.key, r.profile = ev.KeyID, profile{}
	}
	if r.only != nil && !r.only[usage.Partition(ev.KeyID, len(r.parts))] {
		r.key = ""
		return nil
	}
	for _, a := range r.engine.Observe(ev, true) {
		r.profile.raised(a.ID)
	}
	r.profile.sequence = max(r.profile.sequence, sequence)
	return nil
}

// finishKey packs the baseline of the key that was read to its end.
func (r *rebuild) finishKey(ctx context.Context) error {
	if r.key == "" || !r.engine.Knows(r.key) {
		return nil
	}
	for i, a := range r.profile.alerts {
		if v, given := r.verdicts[a.id]; given {
			r.engine.Verdict(r.key, a.id, v.Verdict, v.Time)
			r.profile.alerts[i].verdict = v.Verdict
		}
	}
	r.done.Keys++
	p := usage.Partition(r.key, len(r.parts))
	part := &r.parts[p]
	if row, known := r.engine.Baseline(r.key); known {
		row.Partition, row.Sequence = p, r.profile.sequence
		part.rows = append(part.rows, row)
	}
	r.profile.row = r.profile.sequence
	value := s2.Encode(nil, encodeProfile(&r.profile, r.engine.Encode(r.key)))
	part.journal = appendText(appendText(part.journal, keyToken(r.key)), string(value))
	r.engine.Forget(r.key)
	if len(part.journal) < inlineJournal {
		return nil
	}
	return r.flush(ctx, p)
}

// flush writes one part of a partition's journal, which counts for nothing yet.
func (r *rebuild) flush(ctx context.Context, p int) error {
	part := &r.parts[p]
	if err := r.s.publishRows(ctx, p, part.rows); err != nil {
		return err
	}
	name := fmt.Sprintf("%d.%s.%s.%d", p, nameJournal, r.owner, part.written)
	if _, err := r.s.states.Put(ctx, name, part.journal); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	part.written++
	part.journal, part.rows = nil, nil
	return nil
}

// commit makes the journals the partitions' state.
func (r *rebuild) commit(ctx context.Context) error {
	for p := range r.parts {
		if len(r.parts[p].journal) > 0 {
			if err := r.flush(ctx, p); err != nil {
				return err
			}
		}
		if r.parts[p].written == 0 {
			continue
		}
		c := commit{sequence: r.floors[p], owner: r.owner, parts: r.parts[p].written}
		if _, err := r.s.states.Put(ctx, strconv.Itoa(p)+"."+nameCommit, c.encode()); err != nil {
			return fmt.Errorf("commit rebuilt baselines: %w", err)
		}
	}
	return nil
}
