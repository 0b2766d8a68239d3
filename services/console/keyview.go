package console

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/wording"
)

// unusedAfter is the age at which a key that was never used is shown as unused.
const unusedAfter = 7 * 24 * time.Hour

// badge is a short word on a key with a colour.
type badge struct{ Class, Text, Hint string }

// keyRow is a key as lists and its page show it.
type keyRow struct {
	key.Record
	Managed bool
	OrgName string
	// State is active, suspended, revoked, expired, or unmanaged.
	State  string
	Masked string
	Age    time.Duration
	Use    *keyUse // nil if it was never used, or if that is not known
	// Days are the last 30, nil if nothing is known.
	Days     []bin
	Overdue  bool
	Dormant  bool
	Unused   bool
	DueAt    time.Time
	Open     int // alerts without a verdict in the last 30 days
	Badges   []badge
	NameLine string
}

// Requests are those of the last n days.
func (k *keyRow) Requests(n int) (sum uint64) {
	for _, b := range k.Days[max(0, len(k.Days)-n):] {
		sum += b.Events
	}
	return sum
}

// keyFilter says which keys a listing shows.
type keyFilter struct {
	Org, Query, State string
}

// keyStates are the filters of the keys page, in its order.
var keyStates = []struct{ ID, Label string }{
	{"", "All"},
	{"active", "Active"},
	{"alerts", "With alerts"},
	{"overdue", "Rotation overdue"},
	{"dormant", "Dormant"},
	{"unused", "Never used"},
	{"revoked", "Revoked"},
	{"unmanaged", "Not managed here"},
}

// keyRows are all keys that the viewer sees, those first that ask for attention,
// with what ClickHouse knows of them if it answers.
func (s *Service) keyRows(ctx context.Context, org string) (rows []*keyRow, usageErr error) {
	uses, usageErr := s.usage.keyUses(ctx, org)
	now := s.now()
	open := map[string]int{}
	alerts, _ := s.alerts.list(alertFilter{Org: org, Since: now.AddDate(0, 0, -30), Open: true, Live: true, Limit: maxAlerts})
	for _, a := range alerts {
		open[a.KeyID]++
	}
	managed := map[string]bool{}
	s.keys.Walk(org, "", func(rec key.Record) bool {
		managed[rec.ID] = true
		row := s.keyRow(rec, now)
		if use, ok := uses[rec.ID]; ok && use.OrgID == rec.OrgID {
			row.Use = &use
		}
		row.Open = open[rec.ID]
		row.finish(now, usageErr == nil, s.dormantAfter())
		rows = append(rows, row)
		return len(rows) < maxKeys
	})
	for id, use := range uses {
		if !managed[id] {
			row := s.unmanagedRow(id, use, now)
			row.Open = open[id]
			row.finish(now, true, s.dormantAfter())
			rows = append(rows, row)
		}
	}
	slices.SortFunc(rows, func(a, b *keyRow) int {
		return cmp.Or(cmp.Compare(b.urgency(), a.urgency()), strings.Compare(strings.ToLower(a.NameLine), strings.ToLower(b.NameLine)), strings.Compare(a.ID, b.ID))
	})
	return rows, usageErr
}

func (s *Service) dormantAfter() time.Duration {
	return time.Duration(s.cfg.DormantDays) * 24 * time.Hour
}

func (s *Service) keyRow(rec key.Record, now time.Time) *keyRow {
	row := &keyRow{Record: rec, Managed: true, OrgName: s.records.orgName(rec.OrgID), State: rec.Status, NameLine: rec.Name, Age: now.Sub(rec.CreatedAt)}
	if rec.Prefix != "" {
		row.Masked = rec.Prefix + "…"
	}
	if row.NameLine == "" {
		row.NameLine = rec.ID
	}
	if rec.Status == key.Active && rec.ExpiresAt != nil && !now.Before(*rec.ExpiresAt) {
		row.State = "expired"
	}
	days := rec.RotationDays
	if org, ok := s.records.org(rec.OrgID); ok && days == 0 {
		days = org.RotationDays
	}
	if days == 0 {
		days = key.DefaultRotationDays
	}
	row.DueAt = rec.CreatedAt.AddDate(0, 0, days)
	if rec.LastRotatedAt != nil && rec.LastRotatedAt.After(rec.CreatedAt) {
		row.DueAt = rec.LastRotatedAt.AddDate(0, 0, days)
	}
	row.Overdue = row.State == key.Active && rec.SuccessorID == "" && now.After(row.DueAt)
	return row
}

func (s *Service) unmanagedRow(id string, use keyUse, now time.Time) *keyRow {
	return &keyRow{
		Record: key.Record{ID: id, OrgID: use.OrgID}, OrgName: s.records.orgName(use.OrgID), State: "unmanaged", NameLine: id,
		Use: &use, Age: now.Sub(use.First),
	}
}

// finish derives what follows from the use of a key, and its badges.
func (k *keyRow) finish(now time.Time, usageKnown bool, dormant time.Duration) {
	live := k.State == key.Active || k.State == "unmanaged"
	if live && usageKnown {
		k.Dormant = k.Use != nil && now.Sub(k.Use.Last) > dormant
		k.Unused = k.Use == nil && k.Age > unusedAfter
	}
	add := func(ok bool, class, text, hint string) {
		if ok {
			k.Badges = append(k.Badges, badge{class, text, hint})
		}
	}
	add(k.Open == 1, "high", "1 alert", "without a verdict, in the last 30 days")
	add(k.Open > 1, "high", wording.Grouped(uint64(max(k.Open, 0)))+" alerts", "without a verdict, in the last 30 days")
	add(k.State == key.Revoked, "off", "revoked", k.RevokeReason)
	add(k.State == key.Suspended, "off", "suspended", "refused until it is resumed")
	add(k.State == "expired", "off", "expired", "")
	add(k.State == key.Active && k.SuccessorID != "", "info", "rotated", "its successor is "+k.SuccessorID)
	add(k.Overdue, "warn", "rotation overdue", "since "+k.DueAt.UTC().Format("2 Jan 2006"))
	add(k.State == key.Active && k.SuccessorID == "" && k.ExpiresAt != nil && k.ExpiresAt.Sub(now) < 14*24*time.Hour, "warn", "expires soon", "")
	add(k.Dormant, "idle", "dormant", "not used for long")
	add(k.Unused, "idle", "never used", "")
	add(k.Unclaimed, "info", "secret not fetched", "made by a policy; nobody has seen its secret yet")
	add(k.State == "unmanaged", "plain", "not managed here", "known from its use alone")
}

// urgency orders keys: alerts first, ended keys last.
func (k *keyRow) urgency() int {
	switch {
	case k.Open > 0:
		return 3
	case k.State == key.Revoked || k.State == "expired":
		return 0
	case k.Overdue || k.Dormant || k.Unused:
		return 2
	}
	return 1
}

func (f *keyFilter) keeps(k *keyRow) bool {
	if f.Query != "" {
		hay := strings.ToLower(strings.Join([]string{k.Name, k.ID, k.Prefix, k.OrgName, k.Owner, strings.Join(k.Scopes, " "), strings.Join(k.Tags, " ")}, " "))
		for _, word := range strings.Fields(strings.ToLower(f.Query)) {
			if !strings.Contains(hay, word) {
				return false
			}
		}
	}
	switch f.State {
	case "":
		return true
	case "alerts":
		return k.Open > 0
	case "overdue":
		return k.Overdue
	case "dormant":
		return k.Dormant
	case "unused":
		return k.Unused
	case "revoked":
		return k.State == key.Revoked || k.State == "expired" || k.State == key.Suspended
	}
	return k.State == f.State
}
