package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/latchkey-dev/latchkey/services/internal/store"
)

// clickhouse answers from what the collector stored. While ClickHouse is away
// it is asked again only every few seconds, so that a listing does not wait.
type clickhouse struct {
	store *store.Store

	mu    sync.Mutex
	away  error
	askAt time.Time
}

const (
	lastUsedTimeout = 2 * time.Second
	usageTimeout    = 20 * time.Second
	askAgain        = 5 * time.Second
	// idsPerQuery keeps queries at a size that any server takes.
	idsPerQuery = 1000
)

func openFacts(ctx context.Context, url string) (facts, error) {
	if url == "" {
		return noFacts{}, nil
	}
	s, err := store.Open(ctx, url)
	if err != nil {
		return nil, err
	}
	return &clickhouse{store: s}, nil
}

func (c *clickhouse) close() { _ = c.store.Close() }

func (c *clickhouse) check(ctx context.Context) error { return c.store.Ping(ctx) }

// ask runs a query within a time limit, unless ClickHouse was just found away.
func (c *clickhouse) ask(ctx context.Context, limit time.Duration, query func(context.Context) error) error {
	c.mu.Lock()
	away := c.away
	if away != nil && time.Now().After(c.askAt) {
		away = nil
	}
	c.mu.Unlock()
	if away != nil {
		return away
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := query(limited)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		c.away, c.askAt = err, time.Now().Add(askAgain)
	} else {
		c.away = nil
	}
	return err
}

func (c *clickhouse) lastUsed(ctx context.Context, org string, ids []string) (map[string]time.Time, error) {
	out := map[string]time.Time{}
	err := c.ask(ctx, lastUsedTimeout, func(ctx context.Context) error {
		if len(ids) == 0 {
			return c.readLastUsed(ctx, out, "SELECT key_id, last_used_at FROM key_last_used WHERE ? = '' OR org_id = ?", org, org)
		}
		for chunk := range slices.Chunk(ids, idsPerQuery) {
			if err := c.readLastUsed(ctx, out, "SELECT key_id, last_used_at FROM key_last_used WHERE key_id IN (?)", chunk); err != nil {
				return err
			}
		}
		return nil
	})
	return out, err
}

func (c *clickhouse) readLastUsed(ctx context.Context, out map[string]time.Time, query string, args ...any) (err error) {
	rows, err := c.store.Conn.Query(ctx, query, args...)
	if err != nil {
		return fmt.Errorf("ask ClickHouse for last use: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var (
			id string
			at time.Time
		)
		if err := rows.Scan(&id, &at); err != nil {
			return fmt.Errorf("read last use: %w", err)
		}
		out[id] = at.UTC()
	}
	return rows.Err()
}

// useQuery finds tools and networks that were at work at once, which is to say
// within one hour: the hour with most of them counts. A tool is a user agent's
// product name, a network a /24 or a /48.
const useQuery = `
SELECT key_id, sum(events), groupUniqArrayArray(50)(hour_scopes),
    argMax(hour_agents, length(hour_agents)), argMax(hour_networks, length(hour_networks))
FROM
(
    SELECT key_id, toStartOfHour(toDateTime(time, 'UTC')) AS hour, count() AS events,
        groupUniqArrayIf(50)(toString(scope), scope != '') AS hour_scopes,
        groupUniqArrayIf(20)(extract(toString(user_agent), '^[^/ (]+'), user_agent != '') AS hour_agents,
        groupUniqArray(20)(cutIPv6(source_ip, 10, 1)) AS hour_networks
    FROM usage_events
    WHERE decision = 'allow' AND time >= ? AND (? = '' OR org_id = ?)
    GROUP BY key_id, hour
)
GROUP BY key_id`

func (c *clickhouse) usage(ctx context.Context, org string, since time.Time) (map[string]use, error) {
	out := map[string]use{}
	err := c.ask(ctx, usageTimeout, func(ctx context.Context) (err error) {
		rows, err := c.store.Conn.Query(ctx, useQuery, since, org, org)
		if err != nil {
			return fmt.Errorf("ask ClickHouse for use: %w", err)
		}
		defer func() { err = errors.Join(err, rows.Close()) }()
		for rows.Next() {
			var (
				id string
				u  use
			)
			if err := rows.Scan(&id, &u.Requests, &u.Scopes, &u.Agents, &u.Networks); err != nil {
				return fmt.Errorf("read use: %w", err)
			}
			slices.Sort(u.Scopes)
			slices.Sort(u.Agents)
			slices.Sort(u.Networks)
			out[id] = u
		}
		return rows.Err()
	})
	return out, err
}
