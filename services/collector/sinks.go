package collector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/baseline"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// sinkTables are the smaller tables. Their rows replace themselves by id and
// revision, so storing a message twice changes nothing that anyone sees.
var sinkTables = []string{"alerts_data", "api_keys_data", "audit_log_data", "key_baselines_data"}

// sink brings one stream into its tables, as one reader among the replicas.
type sink struct {
	c      *Service
	stream string
	// rows reads a message: what to append to which table.
	rows func(m *bus.Message, add func(table string, row ...any)) error
}

func (c *Service) sinks() []*sink {
	return []*sink{
		{c, bus.Alerts, alertRows},
		{c, bus.Keys, keyRows},
		{c, bus.Audit, auditRows},
		{c, bus.BaselineRows, baselineRows},
	}
}

func (s *sink) run(ctx context.Context) {
	_ = bus.Single(ctx, s.c.js, bus.Collector, s.stream, bus.Options{Log: s.c.log}, s.own)
}

func (s *sink) own(ctx context.Context, p *bus.Partition) error {
	floor, err := p.AckFloor(ctx)
	if err != nil {
		return err
	}
	if err := p.Reset(ctx, floor+1); err != nil {
		return err
	}
	for {
		msgs, err := p.Fetch(ctx, 500, 1<<20, 5*time.Second)
		if err != nil {
			return err
		}
		if len(msgs) == 0 {
			continue
		}
		if err := s.store(ctx, p, msgs); err != nil {
			return err
		}
	}
}

func (s *sink) store(ctx context.Context, p *bus.Partition, msgs []*bus.Message) error {
	ctx, cancel := graceful(ctx, finishWithin)
	defer cancel()
	tables := map[string][][]any{}
	for _, m := range msgs {
		err := s.rows(m, func(table string, row ...any) { tables[table] = append(tables[table], row) })
		if err == nil {
			continue
		}
		d := dead{m, -1, "application/json", m.Data, err}
		if err := s.untilDone(ctx, p, "publish dead letter", func(ctx context.Context) error {
			return s.c.bury(ctx, s.stream, d)
		}); err != nil {
			return err
		}
	}
	for table, rows := range tables {
		attempts := 0
		if err := s.untilDone(ctx, p, "insert into "+table, func(ctx context.Context) error {
			attempts++
			return s.c.append(ctx, table, rows, s.c.patience(attempts))
		}); err != nil {
			return err
		}
		s.c.metrics.sinkRows.WithLabelValues(table).Add(float64(len(rows)))
	}
	if err := p.Ack(ctx, msgs[len(msgs)-1]); err != nil {
		return fmt.Errorf("%w: %w", bus.ErrLost, err)
	}
	return nil
}

func (s *sink) untilDone(ctx context.Context, p *bus.Partition, what string, try func(context.Context) error) error {
	return untilDone(ctx, s.c.log, what, p.Touch, s.c.metrics.retries.Inc, try)
}

// append inserts rows, whose values are in the order of the table's columns.
func (c *Service) append(ctx context.Context, table string, rows [][]any, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	b, err := c.store.Conn.PrepareBatch(ctx, "INSERT INTO "+table)
	if err != nil {
		return fmt.Errorf("prepare insert: %w", err)
	}
	for _, row := range rows {
		if err := b.Append(row...); err != nil {
			_ = b.Abort()
			return fmt.Errorf("append row: %w", err)
		}
	}
	if err := b.Send(); err != nil {
		return fmt.Errorf("send rows: %w", err)
	}
	return nil
}

func alertRows(m *bus.Message, add func(string, ...any)) error {
	var a alert.Alert
	if err := json.Unmarshal(m.Data, &a); err != nil {
		return fmt.Errorf("read alert: %w", err)
	}
	if a.ID == "" {
		return errors.New("read alert: it has no id")
	}
	evidence := make([]map[string]any, len(a.Evidence))
	for i, e := range a.Evidence {
		evidence[i] = map[string]any{"trigger": e.Trigger, "observed": e.Observed, "usual": e.Usual, "p_value": e.PValue}
	}
	add("alerts_data", a.ID, storable(a.Time), storable(a.DetectedAt), a.OrgID, a.KeyID, a.Triggers, a.Severity, a.Score, a.Summary,
		ip(a.SourceIP), a.Country, a.ASN, a.ASName, a.UserAgent, a.Method, a.Route, evidence, a.EventID,
		uint32(max(a.Revision, 0)), a.Historical, string(m.Data), m.Time)
	return nil
}

// keyRows stores the record and, as audit, the change. The hash stays behind.
func keyRows(m *bus.Message, add func(string, ...any)) error {
	var ch key.Change
	if err := json.Unmarshal(m.Data, &ch); err != nil {
		return fmt.Errorf("read key change: %w", err)
	}
	r := ch.Record
	if r.ID == "" {
		return errors.New("read key change: the record has no id")
	}
	cidrs := make([]string, len(r.AllowedCIDRs))
	for i, c := range r.AllowedCIDRs {
		cidrs[i] = c.String()
	}
	if r.Metadata == nil {
		r.Metadata = map[string]string{}
	}
	add("api_keys_data", r.ID, r.OrgID, r.Name, r.Prefix, r.Environment, r.Description, r.Owner, filled(r.Scopes), r.Status,
		r.RevokeReason, cidrs, storable(r.CreatedAt), r.ExpiresAt, r.LastRotatedAt, r.RevokedAt, r.ParentKeyID, r.SuccessorID,
		uint32(max(r.RotationDays, 0)), r.Metadata, filled(r.Tags), storable(ch.Time), m.Sequence)
	before, err := withoutHash(ch.Before)
	if err != nil {
		return err
	}
	after, err := withoutHash(&ch.Record)
	if err != nil {
		return err
	}
	id := ch.ID
	if id == "" {
		id = fmt.Sprintf("keys:%d", m.Sequence)
	}
	add("audit_log_data", id, storable(ch.Time), ch.Type, ch.Actor, ip(ch.ActorIP), r.OrgID, "api_key", r.ID, r.ID, ch.Reason,
		before, after, bus.Keys, m.Sequence)
	return nil
}

func withoutHash(r *key.Record) (string, error) {
	if r == nil {
		return "", nil
	}
	public := *r
	public.Hash = ""
	text, err := json.Marshal(public)
	if err != nil {
		return "", fmt.Errorf("encode key record: %w", err)
	}
	return string(text), nil
}

func auditRows(m *bus.Message, add func(string, ...any)) error {
	var ev key.AuditEvent
	if err := json.Unmarshal(m.Data, &ev); err != nil {
		return fmt.Errorf("read audit event: %w", err)
	}
	if ev.ID == "" {
		ev.ID = fmt.Sprintf("audit:%d", m.Sequence)
	}
	keyID := ""
	if ev.Kind == "api_key" || ev.Kind == "key" {
		keyID = ev.Subject
	}
	add("audit_log_data", ev.ID, storable(ev.Time), ev.Type, ev.Actor, ip(ev.ActorIP), ev.OrgID, ev.Kind, ev.Subject, keyID,
		ev.Reason, string(ev.Before), string(ev.After), bus.Audit, m.Sequence)
	return nil
}

func baselineRows(m *bus.Message, add func(string, ...any)) error {
	var list []baseline.Row
	if err := json.Unmarshal(m.Data, &list); err != nil {
		return fmt.Errorf("read baselines: %w", err)
	}
	for _, r := range list {
		if r.HourOfWeek == nil {
			r.HourOfWeek = []float64{}
		}
		add("key_baselines_data", r.KeyID, r.OrgID, storable(r.UpdatedAt), uint16(r.Partition), r.Sequence,
			storable(r.FirstSeen), storable(r.LastSeen), r.Events, r.Maturity, r.ParentKeyID,
			shares(r.Networks), shares(r.ASNs), shares(r.Countries), shares(r.Routes), r.HourOfWeek,
			r.EventsPerHour, r.GapSecondsMedian, r.GapSecondsMax, m.Sequence)
	}
	return nil
}

func shares(list []baseline.Share) []map[string]any {
	out := make([]map[string]any, len(list))
	for i, s := range list {
		out[i] = map[string]any{"value": s.Value, "share": s.Share}
	}
	return out
}

func filled(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

// ip is an address as the IPv6 columns take it; none is "::".
func ip(a netip.Addr) netip.Addr {
	if !a.IsValid() {
		return netip.IPv6Unspecified()
	}
	return netip.AddrFrom16(a.As16())
}

// storable keeps a time within what DateTime64 with nanoseconds can hold.
func storable(t time.Time) time.Time {
	lo, hi := time.Unix(0, 0).UTC(), time.Date(2261, 1, 1, 0, 0, 0, 0, time.UTC)
	switch {
	case t.Before(lo):
		return lo
	case t.After(hi):
		return hi
	}
	return t.UTC()
}
