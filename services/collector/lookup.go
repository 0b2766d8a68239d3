package collector

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// identity is what makes an event the same as another.
type identity struct {
	key, id string
	ns      int64
}

func identityOf(ev *usage.Event) identity { return identity{ev.KeyID, ev.ID, ev.Time.UnixNano()} }

// backfillSQL reads the hashes of the events that a partition has stored, as
// seen.hash makes them, and their times.
const backfillSQL = `SELECT bitXor(xxHash64(concat(key_id, '/', id)), toUInt64(toUnixTimestamp64Nano(time))), toUnixTimestamp64Nano(time)
FROM usage_events WHERE partition = ? AND time >= fromUnixTimestamp64Nano(?)`

// recall fills a filter with what ClickHouse holds of the partition: everything,
// or as many of the latest hours as fit.
func (w *worker) recall(ctx context.Context) (*seen, error) {
	s := &seen{complete: math.MinInt64}
	from, total, err := w.recallFrom(ctx, s)
	if err != nil {
		return nil, err
	}
	if total == 0 {
		return s, nil
	}
	rows, err := w.c.store.Conn.Query(ctx, backfillSQL, uint16(w.p.Number), from)
	if err != nil {
		return nil, fmt.Errorf("read stored events of partition %d: %w", w.p.Number, err)
	}
	defer rows.Close()
	for rows.Next() {
		var h uint64
		var ns int64
		if err := rows.Scan(&h, &ns); err != nil {
			return nil, fmt.Errorf("read stored event: %w", err)
		}
		s.add(mix(h), ns)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read stored events of partition %d: %w", w.p.Number, err)
	}
	return s, nil
}

// recallFrom is the first time of which events are recalled, in Unix
// nanoseconds, and how many events were counted; it sets s.complete if
// there are older ones.
func (w *worker) recallFrom(ctx context.Context, s *seen) (from int64, total uint64, err error) {
	rows, err := w.c.store.Conn.Query(ctx, `SELECT toUnixTimestamp(toStartOfHour(toDateTime(time, 'UTC'))) AS hour, count()
FROM usage_events WHERE partition = ? GROUP BY hour ORDER BY hour DESC`, uint16(w.p.Number))
	if err != nil {
		return 0, 0, fmt.Errorf("count stored events of partition %d: %w", w.p.Number, err)
	}
	defer rows.Close()
	for rows.Next() {
		var hour uint32
		var n uint64
		if err := rows.Scan(&hour, &n); err != nil {
			return 0, 0, fmt.Errorf("count stored events: %w", err)
		}
		if total += n; total > maxSeen/2 {
			// This hour does not fit any more.
			from = (int64(hour) + 3600) * 1e9
			s.complete = from
			break
		}
	}
	if err := rows.Err(); err != nil {
		return 0, 0, fmt.Errorf("count stored events of partition %d: %w", w.p.Number, err)
	}
	return from, total, nil
}

// maxListed bounds the values that one question lists, in bytes of SQL: a query
// of more than 256 KiB (max_query_size) is refused.
const maxListed = 100 << 10

// question is a part of the suspects, close to each other in time.
type question struct {
	orgs, keys, ids map[string]bool
	keyBytes        int
	idBytes         int
	lo, hi          int64
}

// storedAlready asks which of the suspects ClickHouse holds, apart from what
// this very batch may have stored before its answer was lost.
func (w *worker) storedAlready(ctx context.Context, b *batch, suspects []suspect) (map[identity]bool, error) {
	wanted := make(map[identity]bool, len(suspects))
	for i := range suspects {
		wanted[identityOf(&suspects[i].ev)] = true
	}
	stored := map[identity]bool{}
	for _, q := range questions(suspects) {
		if err := w.answer(ctx, b, q, func(id identity) {
			if wanted[id] {
				stored[id] = true
			}
		}); err != nil {
			return nil, fmt.Errorf("look for duplicates: %w", err)
		}
	}
	return stored, nil
}

// questions divides suspects, in the order of their times, so that the keys of
// each part can be listed.
func questions(suspects []suspect) []*question {
	order := make([]*usage.Event, len(suspects))
	for i := range suspects {
		order[i] = &suspects[i].ev
	}
	slices.SortFunc(order, func(a, b *usage.Event) int { return a.Time.Compare(b.Time) })
	var all []*question
	var q *question
	for _, ev := range order {
		if q == nil || q.keyBytes > maxListed {
			q = &question{orgs: map[string]bool{}, keys: map[string]bool{}, ids: map[string]bool{}, lo: ev.Time.UnixNano()}
			all = append(all, q)
		}
		q.keyBytes += note(q.orgs, ev.OrgID) + note(q.keys, ev.KeyID)
		q.idBytes += note(q.ids, ev.ID)
		q.hi = ev.Time.UnixNano()
	}
	return all
}

// note adds a value to a list, and says how many bytes of SQL that adds at most.
func note(list map[string]bool, value string) int {
	if list[value] {
		return 0
	}
	list[value] = true
	return 2*len(value) + len("'', ")
}

// answer calls found for what ClickHouse holds of the keys in that time.
func (w *worker) answer(ctx context.Context, b *batch, q *question, found func(identity)) error {
	query := fmt.Sprintf(`SELECT key_id, id, toUnixTimestamp64Nano(time) FROM usage_events
WHERE org_id IN (%s) AND key_id IN (%s) AND time >= fromUnixTimestamp64Nano(%d) AND time <= fromUnixTimestamp64Nano(%d)
AND NOT (stream = %s AND partition = %d AND sequence BETWEEN %d AND %d)`,
		list(q.orgs), list(q.keys), q.lo, q.hi, literal(w.stream), w.p.Number, b.first, b.last)
	if q.idBytes <= maxListed {
		query += " AND id IN (" + list(q.ids) + ")" // else it is about as many rows as are wanted anyway
	}
	rows, err := w.c.store.Conn.Query(ctx, query)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id identity
		if err := rows.Scan(&id.key, &id.id, &id.ns); err != nil {
			return err
		}
		found(id)
	}
	return rows.Err()
}

func (w *worker) countRows(ctx context.Context, b *batch) (map[int]uint64, error) {
	rows, err := w.c.store.Conn.Query(ctx, `SELECT toYYYYMM(time) AS month, count() FROM usage_events
WHERE stream = ? AND partition = ? AND sequence BETWEEN ? AND ? GROUP BY month`, w.stream, uint16(w.p.Number), b.first, b.last)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	months := map[int]uint64{}
	for rows.Next() {
		var month uint32
		var n uint64
		if err := rows.Scan(&month, &n); err != nil {
			return nil, err
		}
		months[int(month)] = n
	}
	return months, rows.Err()
}

func list(values map[string]bool) string {
	quoted := make([]string, 0, len(values))
	for _, v := range slices.Sorted(maps.Keys(values)) {
		quoted = append(quoted, literal(v))
	}
	return strings.Join(quoted, ", ")
}

// literal is a string in SQL. Identifiers of events hold no quotes or
// backslashes, but nothing depends on that.
func literal(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}
