package demo

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// client makes requests as a gateway would ask the edge about them.
type client struct {
	edge string // http://127.0.0.1:8081
	http *http.Client
}

func newClient(edge string) *client {
	return &client{edge: edge, http: &http.Client{Timeout: 5 * time.Second}}
}

// request asks the edge about the request that e describes, made with secret.
func (c *client) request(ctx context.Context, rng *rand.Rand, e *usage.Event, secret string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.edge+"/auth", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+secret)
	req.Header.Set("X-Forwarded-Method", e.Method)
	req.Header.Set("X-Forwarded-Uri", path(rng, e.Route))
	req.Header.Set("X-Forwarded-For", e.SourceIP.String())
	req.Header.Set("User-Agent", e.UserAgent)
	res, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask the edge: %w", err)
	}
	defer func() { _ = res.Body.Close() }()
	body, _ := io.ReadAll(io.LimitReader(res.Body, 1<<10))
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the edge refuses %s %s of key %s: %s %s", e.Method, e.Route, e.KeyID, res.Status, body)
	}
	return nil
}

// carryOn goes on with every key's habit in real time until ctx is done: each
// second it makes the requests that the key's day holds for that second.
func (d *demo) carryOn(ctx context.Context) error {
	rng := rand.New(rand.NewPCG(1, uint64(d.now().UnixNano())))
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return d.state.save()
		case <-ticker.C:
		}
		now := d.now()
		for i := range d.state.Keys {
			k := &d.state.Keys[i]
			m, err := k.member()
			if err != nil {
				return err
			}
			err = m.span(k.ID, d.state.OrgID, k.Began, k.Until, now, func(events []usage.Event) error {
				for _, e := range events {
					if err := d.client.request(ctx, rng, &e, k.Secret); err != nil && ctx.Err() == nil {
						d.log.Warn("demo request failed", "error", err)
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
			k.Until = now
		}
		if n%10 == 9 {
			if err := d.state.save(); err != nil {
				return err
			}
		}
	}
}

// commit makes the requests of one attack, evenly over its time.
func (d *demo) commit(ctx context.Context, a attack, k keyState) error {
	usual, err := k.member()
	if err != nil {
		return err
	}
	h := a.habit(usual.habit, k.Run)
	rng := rand.New(rand.NewPCG(2, uint64(d.now().UnixNano())))
	ticker := time.NewTicker(a.lasts / time.Duration(a.requests))
	defer ticker.Stop()
	for range a.requests {
		e := h.event(rng, k.ID, d.state.OrgID, d.now())
		if err := d.client.request(ctx, rng, &e, k.Secret); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
	return nil
}
