package console

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
)

// maxAudit is how many of the latest changes the audit page can show.
const maxAudit = 1000

// records follows organizations and changes as NATS tells them.
type records struct {
	log        *slog.Logger
	js         jetstream.JetStream
	deliveries jetstream.KeyValue

	mu    sync.RWMutex
	orgs  map[string]key.Org
	audit []auditLine // oldest first

	watcher  jetstream.KeyWatcher
	consumes []jetstream.ConsumeContext
}

// auditLine is a change of a key, an organization or a webhook.
type auditLine struct {
	ID, Type, Actor, OrgID, Kind, Subject, Reason string
	IP                                            string
	Name                                          string // of the key
	Time                                          time.Time
}

func openRecords(ctx context.Context, js jetstream.JetStream, log *slog.Logger) (_ *records, err error) {
	r := &records{log: log, js: js, orgs: map[string]key.Org{}}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if r.deliveries, err = js.KeyValue(ctx, bus.Deliveries); err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bus.Deliveries, err)
	}
	orgs, err := js.KeyValue(ctx, bus.Orgs)
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bus.Orgs, err)
	}
	if r.watcher, err = orgs.WatchAll(context.WithoutCancel(ctx)); err != nil {
		return nil, fmt.Errorf("watch bucket %s: %w", bus.Orgs, err)
	}
	go r.followOrgs()
	for stream, read := range map[string]func([]byte) (auditLine, error){bus.Keys: readChange, bus.Audit: readAudit} {
		if err := r.follow(ctx, stream, read); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *records) followOrgs() {
	for entry := range r.watcher.Updates() {
		if entry == nil {
			continue
		}
		var org key.Org
		if entry.Operation() == jetstream.KeyValuePut {
			if err := json.Unmarshal(entry.Value(), &org); err != nil {
				r.log.Warn("an organization cannot be read", "org", entry.Key(), "error", err)
				continue
			}
		}
		r.mu.Lock()
		if org.ID == "" {
			delete(r.orgs, entry.Key())
		} else {
			r.orgs[entry.Key()] = org
		}
		r.mu.Unlock()
	}
}

// follow keeps the latest changes of a stream.
func (r *records) follow(ctx context.Context, name string, read func([]byte) (auditLine, error)) error {
	stream, err := r.js.Stream(ctx, name)
	if err != nil {
		return fmt.Errorf("look up stream %s: %w", name, err)
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return fmt.Errorf("ask about stream %s: %w", name, err)
	}
	cfg := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy}
	if info.State.LastSeq > maxAudit {
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, info.State.LastSeq-maxAudit
	}
	consumer, err := stream.OrderedConsumer(ctx, cfg)
	if err != nil {
		return fmt.Errorf("read stream %s: %w", name, err)
	}
	consume, err := consumer.Consume(func(m jetstream.Msg) {
		line, err := read(m.Data())
		if err != nil {
			r.log.Warn("a change cannot be read", "subject", m.Subject(), "error", err)
			return
		}
		r.add(line)
	}, interrupted(r.log, name))
	if err != nil {
		return fmt.Errorf("read stream %s: %w", name, err)
	}
	r.consumes = append(r.consumes, consume)
	return nil
}

func readChange(data []byte) (auditLine, error) {
	var c key.Change
	if err := json.Unmarshal(data, &c); err != nil {
		return auditLine{}, err
	}
	line := auditLine{
		ID: c.ID, Type: c.Type, Actor: c.Actor, OrgID: c.Record.OrgID, Kind: "api_key", Subject: c.Record.ID,
		Reason: c.Reason, Name: c.Record.Name, Time: c.Time,
	}
	if c.ActorIP.IsValid() {
		line.IP = c.ActorIP.String()
	}
	return line, nil
}

func readAudit(data []byte) (auditLine, error) {
	var e key.AuditEvent
	if err := json.Unmarshal(data, &e); err != nil {
		return auditLine{}, err
	}
	line := auditLine{ID: e.ID, Type: e.Type, Actor: e.Actor, OrgID: e.OrgID, Kind: e.Kind, Subject: e.Subject, Reason: e.Reason, Time: e.Time}
	if e.ActorIP.IsValid() {
		line.IP = e.ActorIP.String()
	}
	return line, nil
}

func (r *records) add(line auditLine) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, found := slices.BinarySearchFunc(r.audit, line, func(a, b auditLine) int {
		if c := a.Time.Compare(b.Time); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	if found {
		return
	}
	r.audit = slices.Insert(r.audit, i, line)
	if len(r.audit) > 2*maxAudit {
		r.audit = slices.Delete(r.audit, 0, len(r.audit)-2*maxAudit)
	}
}

// latest are the newest changes that keep accepts, newest first.
func (r *records) latest(n int, keep func(auditLine) bool) []auditLine {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []auditLine
	for _, line := range slices.Backward(r.audit) {
		if len(out) == n {
			break
		}
		if keep(line) {
			out = append(out, line)
		}
	}
	return out
}

func (r *records) org(id string) (key.Org, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	org, ok := r.orgs[id]
	return org, ok
}

// orgName is the organization's name, or its id if it is not managed here.
func (r *records) orgName(id string) string {
	if org, ok := r.org(id); ok && org.Name != "" {
		return org.Name
	}
	return id
}

// delivery is what became of an alert's mail, nil if nothing is recorded.
func (r *records) delivery(ctx context.Context, alertID string) (*delivery.Delivery, error) {
	entry, err := r.deliveries.Get(ctx, delivery.Key(delivery.Alert, alertID))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read delivery: %w", err)
	}
	var d delivery.Delivery
	if err := json.Unmarshal(entry.Value(), &d); err != nil {
		return nil, fmt.Errorf("decode delivery: %w", err)
	}
	return &d, nil
}

func (r *records) close() {
	if r.watcher != nil {
		_ = r.watcher.Stop()
	}
	for _, c := range r.consumes {
		c.Stop()
	}
}
