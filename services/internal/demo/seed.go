package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/ingest"
	"github.com/latchkey-dev/latchkey/services/internal/progress"
)

// storeTimeout is how long the demo waits for its history to reach ClickHouse
// before it goes live all the same: JetStream has it.
const storeTimeout = time.Minute

// prepare makes the organization and this run's keys, and sends what is missing
// of everybody's history: 30 days at first, the time since the last run later.
func (d *demo) prepare(ctx context.Context) error {
	if err := d.makeOrg(ctx); err != nil {
		return err
	}
	if d.state.Runs == 0 || d.allBegan() {
		d.cast()
		if err := d.state.save(); err != nil {
			return err
		}
	}
	if err := d.loadHistory(ctx); err != nil {
		return err
	}
	// The keys come last: a key without its history looks as if nobody used it.
	for _, k := range d.state.Keys {
		if err := d.makeKey(ctx, k); err != nil {
			return err
		}
	}
	return nil
}

// allBegan tells whether the history of every key was loaded: if not, the last
// run was ended before it went live, and this one takes its place.
func (d *demo) allBegan() bool {
	for _, k := range d.state.Keys {
		if k.Until.IsZero() {
			return false
		}
	}
	return true
}

// cast begins a run with its victims, the first one with the quiet keys as well.
func (d *demo) cast() {
	d.state.Runs++
	now := d.now().UTC()
	add := func(m member, part string) {
		secret, err := apikey.Generate(apikey.Live)
		if err != nil {
			panic(err) // crypto/rand is at its end
		}
		name := m.name
		if d.state.Runs > 1 {
			name = fmt.Sprintf("%s-%d", m.name, d.state.Runs)
		}
		d.state.Keys = append(d.state.Keys, keyState{
			Name: name, ID: "key_demo_" + strings.ReplaceAll(name, "-", "_"), Secret: secret.Secret(),
			Part: part, Run: d.state.Runs, Began: now,
		})
	}
	parts := victims()
	for _, a := range attacks() {
		add(parts[a.part], a.part)
	}
	if d.state.Runs == 1 {
		for _, m := range quiet() {
			add(m, "")
		}
	}
}

func (d *demo) makeOrg(ctx context.Context) error {
	d.state.OrgID = "org_demo"
	kv, err := d.cfg.JetStream.KeyValue(ctx, bus.Orgs)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", bus.Orgs, err)
	}
	if _, err := kv.Get(ctx, d.state.OrgID); err == nil {
		return nil
	}
	body, err := json.Marshal(key.Org{ID: d.state.OrgID, Name: "Demo Store", OwnerEmail: OwnerEmail, CreatedAt: d.now().UTC().Add(-2 * 365 * day)})
	if err != nil {
		return err
	}
	if _, err := kv.Put(ctx, d.state.OrgID, body); err != nil {
		return fmt.Errorf("create the organization: %w", err)
	}
	return nil
}

// makeKey publishes the key's record unless KEYS has one. The demo writes it
// itself, not through the API, because its keys are older than this minute.
func (d *demo) makeKey(ctx context.Context, k keyState) error {
	stream, err := d.cfg.JetStream.Stream(ctx, bus.Keys)
	if err != nil {
		return fmt.Errorf("look up stream %s: %w", bus.Keys, err)
	}
	if _, err := stream.GetLastMsgForSubject(ctx, bus.KeySubject(k.ID)); err == nil {
		return nil
	}
	m, err := k.member()
	if err != nil {
		return err
	}
	secret, err := apikey.Parse(k.Secret)
	if err != nil {
		return fmt.Errorf("read the key of %s: %w", k.Name, err)
	}
	r := key.Record{
		ID: k.ID, OrgID: d.state.OrgID, Name: k.Name, Description: m.description, Owner: m.owner, Scopes: m.scopes,
		Hash: apikey.Sum(k.Secret).String(), Prefix: secret.Masked(), Environment: apikey.Live,
		Status: key.Active, CreatedAt: k.Began.Add(-m.age), Tags: []string{"demo"},
	}
	if m.rotated > 0 {
		at := k.Began.Add(-m.rotated)
		r.LastRotatedAt = &at
	}
	if m.expires > 0 {
		at := k.Began.Add(m.expires)
		r.ExpiresAt = &at
	}
	body, err := json.Marshal(key.Change{
		ID: "evt_" + uuid.NewString(), Type: key.Created, Time: r.CreatedAt, Actor: "demo",
		ActorIP: netip.IPv4Unspecified(), Reason: "made by latchkey up --demo", Record: r,
	})
	if err != nil {
		return err
	}
	if _, err := d.cfg.JetStream.Publish(ctx, bus.KeySubject(k.ID), body); err != nil {
		return fmt.Errorf("create key %s: %w", k.Name, err)
	}
	return nil
}

// loadHistory sends each key's events since it was last seen to, as history:
// stored and learned from, mailing nobody.
func (d *demo) loadHistory(ctx context.Context) error {
	partitions, err := bus.PartitionCount(ctx, d.cfg.JetStream)
	if err != nil {
		return err
	}
	publisher := ingest.NewPublisher(d.cfg.JetStream, partitions, false)
	now := d.now().UTC()
	days := int64(0)
	for _, k := range d.state.Keys {
		days += d.daysToLoad(k, now)
	}
	bar := progress.Start("Loading history (days of keys)", days, progress.Items)
	defer bar.Finish()
	sent := 0
	for i := range d.state.Keys {
		k := &d.state.Keys[i]
		m, err := k.member()
		if err != nil {
			return err
		}
		err = m.span(k.ID, d.state.OrgID, k.Began, k.Until, now, func(events []usage.Event) error {
			bar.Add(1)
			sent += len(events)
			for j := range events {
				if err := publisher.Add(ctx, &events[j]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("load the history of %s: %w", k.Name, err)
		}
		k.Until = now
	}
	if err := publisher.Flush(ctx); err != nil {
		return fmt.Errorf("load history: %w", err)
	}
	bar.Finish()
	if err := d.state.save(); err != nil {
		return err
	}
	return d.awaitStored(ctx, publisher.Last(), sent)
}

func (d *demo) daysToLoad(k keyState, now time.Time) int64 {
	m, err := k.member()
	if err != nil {
		return 0 // told by loadHistory
	}
	from := k.Began.Add(-m.since)
	if k.Until.After(from) {
		from = k.Until
	}
	return int64(now.Sub(from).Hours()/24) + 1
}

func (d *demo) awaitStored(ctx context.Context, last map[int]uint64, sent int) error {
	bar := progress.Start("Storing in ClickHouse (partitions)", int64(len(last)), progress.Items)
	defer bar.Finish()
	waiting, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	err := ingest.AwaitReaders(waiting, d.cfg.JetStream, bus.Usage, last,
		func(p int) string { return bus.ConsumerName(bus.Collector, p) }, func(n int) { bar.Set(int64(n)) })
	bar.Finish()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		d.log.Warn("history is not stored yet", "error", err)
		return nil
	}
	d.say("✓ %d events of history are stored and learned from", sent)
	return nil
}
