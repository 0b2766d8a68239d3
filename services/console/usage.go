package console

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/baseline"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

const (
	// queryTimeout is how long a page waits for ClickHouse before it does without.
	queryTimeout = 4 * time.Second
	// fresh is for how long an answer of ClickHouse is shown again.
	fresh = 3 * time.Second
	// maxKeys bounds the keys whose last use is read at once.
	maxKeys = 100_000
)

// usageStore asks ClickHouse what keys did. Every answer may be missing: then
// pages say so and show the rest.
type usageStore struct {
	store *store.Store
	log   *slog.Logger

	mu    sync.Mutex
	cache map[string]*cached
}

type cached struct {
	until time.Time
	ready chan struct{}
	value any
	err   error
}

func openUsage(cfg store.Config, log *slog.Logger) (*usageStore, error) {
	u := &usageStore{log: log, cache: map[string]*cached{}}
	if cfg.URL == "" {
		return u, nil
	}
	var err error
	u.store, err = store.OpenConfig(cfg)
	return u, err
}

func (u *usageStore) close() {
	if u.store != nil {
		_ = u.store.Close()
	}
}

var errNoClickHouse = errors.New("no ClickHouse is configured (LATCHKEY_CLICKHOUSE_URL)")

func (u *usageStore) check(ctx context.Context) error {
	if u.store == nil {
		return errNoClickHouse
	}
	return u.store.Ping(ctx)
}

// remember asks once for what several pages want at the same moment, and keeps
// the answer for a little while, an error as well: an absent ClickHouse must not
// make every page wait.
func remember[T any](ctx context.Context, u *usageStore, name string, ask func(context.Context) (T, error)) (T, error) {
	var zero T
	if u.store == nil {
		return zero, errNoClickHouse
	}
	now := time.Now()
	u.mu.Lock()
	c, ok := u.cache[name]
	if !ok || (isClosed(c.ready) && now.After(c.until)) {
		c = &cached{ready: make(chan struct{})}
		if len(u.cache) > 1000 {
			clear(u.cache)
		}
		u.cache[name] = c
		go func() {
			// The answer is for everybody who waits, not for the first alone.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), queryTimeout)
			defer cancel()
			value, err := ask(ctx)
			c.value, c.err, c.until = value, err, time.Now().Add(fresh)
			if err != nil {
				u.log.Warn("ClickHouse does not answer", "query", name, "error", err)
			}
			close(c.ready)
		}()
	}
	u.mu.Unlock()
	select {
	case <-c.ready:
	case <-ctx.Done():
		return zero, ctx.Err()
	}
	if c.err != nil {
		return zero, c.err
	}
	return c.value.(T), nil
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// keyUse is when and how a key was last used.
type keyUse struct {
	KeyID, OrgID string
	First, Last  time.Time
	Events       uint64
	IP           netip.Addr
	Route, Agent string
}

// keyUses is the last use of all keys of an organization (empty: of all), by id.
func (u *usageStore) keyUses(ctx context.Context, org string) (map[string]keyUse, error) {
	return remember(ctx, u, "uses "+org, func(ctx context.Context) (map[string]keyUse, error) {
		where, args := orgClause(org)
		rows, err := u.store.Conn.Query(ctx, `SELECT key_id, org_id, first_used_at, last_used_at, events, source_ip, route, user_agent
			FROM key_last_used`+where+fmt.Sprintf(" ORDER BY last_used_at DESC LIMIT %d", maxKeys), args...)
		if err != nil {
			return nil, fmt.Errorf("read last use: %w", err)
		}
		defer func() { _ = rows.Close() }()
		out := map[string]keyUse{}
		for rows.Next() {
			var k keyUse
			if err := rows.Scan(&k.KeyID, &k.OrgID, &k.First, &k.Last, &k.Events, &k.IP, &k.Route, &k.Agent); err != nil {
				return nil, fmt.Errorf("read last use: %w", err)
			}
			k.IP = k.IP.Unmap()
			if _, ok := out[k.KeyID]; !ok { // the latest, should two organizations claim one id
				out[k.KeyID] = k
			}
		}
		return out, rows.Err()
	})
}

func orgClause(org string) (string, []any) {
	if org == "" {
		return "", nil
	}
	return " WHERE org_id = ?", []any{org}
}

// bin is one bar of a chart.
type bin struct {
	Time           time.Time
	Events, Denied uint64
}

// binTime puts a time onto the grid of bins.
func binTime(t time.Time, width time.Duration) time.Time { return t.UTC().Truncate(width) }

// daily are the last 30 days of each key of an organization, oldest first.
func (u *usageStore) daily(ctx context.Context, org string, now time.Time) (map[string][]bin, error) {
	const days = 30
	return remember(ctx, u, "daily "+org, func(ctx context.Context) (map[string][]bin, error) {
		start := binTime(now, 24*time.Hour).AddDate(0, 0, 1-days)
		and, args := "", []any{start}
		if org != "" {
			and, args = " AND org_id = ?", append(args, org)
		}
		rows, err := u.store.Conn.Query(ctx, `SELECT key_id, toStartOfDay(hour, 'UTC') AS day, sum(events) AS n, sum(denied) AS d
			FROM usage_hourly WHERE hour >= ?`+and+` GROUP BY key_id, day LIMIT 1000000`, args...)
		if err != nil {
			return nil, fmt.Errorf("read daily usage: %w", err)
		}
		defer func() { _ = rows.Close() }()
		out := map[string][]bin{}
		for rows.Next() {
			var (
				id   string
				b    bin
				bins []bin
			)
			if err := rows.Scan(&id, &b.Time, &b.Events, &b.Denied); err != nil {
				return nil, fmt.Errorf("read daily usage: %w", err)
			}
			if bins = out[id]; bins == nil {
				bins = emptyBins(start, 24*time.Hour, days)
				out[id] = bins
			}
			put(bins, 24*time.Hour, b)
		}
		return out, rows.Err()
	})
}

func emptyBins(start time.Time, width time.Duration, n int) []bin {
	bins := make([]bin, n)
	for i := range bins {
		bins[i].Time = start.Add(time.Duration(i) * width)
	}
	return bins
}

func put(bins []bin, width time.Duration, b bin) {
	if i := int(b.Time.Sub(bins[0].Time) / width); i >= 0 && i < len(bins) {
		bins[i].Events += b.Events
		bins[i].Denied += b.Denied
	}
}

// activity is a key's use in bins of an hour or a day.
func (u *usageStore) activity(ctx context.Context, org, keyID string, from, to time.Time, width time.Duration) ([]bin, error) {
	from, to = binTime(from, width), binTime(to, width)
	name := fmt.Sprint("activity ", org, " ", keyID, " ", from.Unix(), " ", to.Unix(), " ", width)
	return remember(ctx, u, name, func(ctx context.Context) ([]bin, error) {
		rows, err := u.store.Conn.Query(ctx, `SELECT hour, sum(events) AS n, sum(denied) AS d FROM usage_hourly
			WHERE org_id = ? AND key_id = ? AND hour >= ? AND hour < ? GROUP BY hour`, org, keyID, from, to.Add(width))
		if err != nil {
			return nil, fmt.Errorf("read activity: %w", err)
		}
		defer func() { _ = rows.Close() }()
		bins := emptyBins(from, width, int(to.Sub(from)/width)+1)
		for rows.Next() {
			var b bin
			if err := rows.Scan(&b.Time, &b.Events, &b.Denied); err != nil {
				return nil, fmt.Errorf("read activity: %w", err)
			}
			put(bins, width, b)
		}
		return bins, rows.Err()
	})
}

// lastHour is what [usageStore.minutes] remembers.
type lastHour struct {
	bins   []bin
	latest uint64
}

// minutes are the events of the last hour by minute, and how many came in the
// last 60 seconds.
func (u *usageStore) minutes(ctx context.Context, org string, now time.Time) ([]bin, uint64, error) {
	hour, err := remember(ctx, u, "minutes "+org, func(ctx context.Context) (lastHour, error) {
		start := binTime(now, time.Minute).Add(-59 * time.Minute)
		and, args := "", []any{now.Add(-time.Minute), start, now.Add(time.Minute)}
		if org != "" {
			and, args = " AND org_id = ?", append(args, org)
		}
		rows, err := u.store.Conn.Query(ctx, `SELECT toStartOfMinute(toDateTime(time, 'UTC')) AS minute, count() AS n, countIf(decision = 'deny') AS d,
			countIf(time >= ?) AS latest FROM usage_events WHERE time >= ? AND time < ?`+and+` GROUP BY minute`, args...)
		if err != nil {
			return lastHour{}, fmt.Errorf("read events: %w", err)
		}
		defer func() { _ = rows.Close() }()
		out := lastHour{bins: emptyBins(start, time.Minute, 60)}
		for rows.Next() {
			var (
				b      bin
				latest uint64
			)
			if err := rows.Scan(&b.Time, &b.Events, &b.Denied, &latest); err != nil {
				return lastHour{}, fmt.Errorf("read events: %w", err)
			}
			put(out.bins, time.Minute, b)
			out.latest += latest
		}
		return out, rows.Err()
	})
	return hour.bins, hour.latest, err
}

// requestLine is one request of a key.
type requestLine struct {
	Time                          time.Time
	IP                            netip.Addr
	Method, Route, Agent, Gateway string
	Status                        uint16
	Decision, DenyReason          string
}

// recent are the latest requests of a key, newest first.
func (u *usageStore) recent(ctx context.Context, org, keyID string, n int) ([]requestLine, error) {
	return remember(ctx, u, fmt.Sprint("recent ", org, " ", keyID, " ", n), func(ctx context.Context) ([]requestLine, error) {
		rows, err := u.store.Conn.Query(ctx, `SELECT time, source_ip, method, route, user_agent, gateway, status, decision, deny_reason
			FROM usage_events WHERE org_id = ? AND key_id = ? ORDER BY time DESC LIMIT ?`, org, keyID, n)
		if err != nil {
			return nil, fmt.Errorf("read recent requests: %w", err)
		}
		defer func() { _ = rows.Close() }()
		out := []requestLine{}
		for rows.Next() {
			var l requestLine
			if err := rows.Scan(&l.Time, &l.IP, &l.Method, &l.Route, &l.Agent, &l.Gateway, &l.Status, &l.Decision, &l.DenyReason); err != nil {
				return nil, fmt.Errorf("read recent requests: %w", err)
			}
			l.IP = l.IP.Unmap()
			out = append(out, l)
		}
		return out, rows.Err()
	})
}

// baseline is what the detector has learned of a key, nil if nothing yet.
func (u *usageStore) baseline(ctx context.Context, org, keyID string) (*baseline.Row, error) {
	return remember(ctx, u, "baseline "+org+" "+keyID, func(ctx context.Context) (*baseline.Row, error) {
		rows, err := u.store.Conn.Query(ctx, `SELECT updated_at, first_seen, last_seen, events, maturity, parent_key_id,
			networks.value, networks.share, asns.value, asns.share, countries.value, countries.share, routes.value, routes.share,
			hour_of_week, events_per_hour, gap_seconds_median, gap_seconds_max
			FROM key_baselines WHERE org_id = ? AND key_id = ? LIMIT 1`, org, keyID)
		if err != nil {
			return nil, fmt.Errorf("read baseline: %w", err)
		}
		defer func() { _ = rows.Close() }()
		if !rows.Next() {
			return nil, rows.Err()
		}
		b := &baseline.Row{KeyID: keyID, OrgID: org}
		var values, shares [4]any
		names, parts := [4][]string{}, [4][]float64{}
		for i := range names {
			values[i], shares[i] = &names[i], &parts[i]
		}
		err = rows.Scan(&b.UpdatedAt, &b.FirstSeen, &b.LastSeen, &b.Events, &b.Maturity, &b.ParentKeyID,
			values[0], shares[0], values[1], shares[1], values[2], shares[2], values[3], shares[3],
			&b.HourOfWeek, &b.EventsPerHour, &b.GapSecondsMedian, &b.GapSecondsMax)
		if err != nil {
			return nil, fmt.Errorf("read baseline: %w", err)
		}
		for i, target := range []*[]baseline.Share{&b.Networks, &b.ASNs, &b.Countries, &b.Routes} {
			*target = []baseline.Share{}
			for j := range min(len(names[i]), len(parts[i])) {
				*target = append(*target, baseline.Share{Value: names[i][j], Share: parts[i][j]})
			}
		}
		return b, nil
	})
}
