package keys

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
)

type listKeysInput struct {
	OrgID         string    `query:"org_id" maxLength:"128"`
	Status        string    `query:"status" enum:"active,suspended,revoked,expired"`
	Q             string    `query:"q" doc:"Part of the name, id, shown prefix, description or owner." maxLength:"200"`
	Scope         string    `query:"scope" doc:"Keys that may do this, by this scope or a wider one." maxLength:"128"`
	Environment   string    `query:"environment" maxLength:"16"`
	Owner         string    `query:"owner" maxLength:"200"`
	Tag           string    `query:"tag" maxLength:"64"`
	CreatedBefore time.Time `query:"created_before"`
	CreatedAfter  time.Time `query:"created_after"`
	OlderThan     string    `query:"older_than" doc:"Age: 90d, 12h." maxLength:"20"`
	UsedSince     time.Time `query:"used_since" doc:"Keys used at or after this time."`
	UnusedFor     string    `query:"unused_for" doc:"Keys not used for this long, nor created within it: 90d." maxLength:"20"`
	Overdue       string    `query:"overdue" enum:"true,false" doc:"Whether the rotation interval is over."`
	Unused        string    `query:"unused" enum:"true,false" doc:"Whether the key is unused for longer than its policy's unused_days."`
	Cursor        string    `query:"cursor" doc:"next_cursor of the page before." maxLength:"300"`
	Limit         int       `query:"limit" default:"100" minimum:"1" maximum:"1000"`
}

type listKeysOutput struct {
	Body struct {
		Keys       []Key  `json:"keys" nullable:"false"`
		NextCursor string `json:"next_cursor,omitempty" doc:"Absent on the last page."`
		// LastUse tells absent last_used_at apart.
		LastUse string `json:"last_use" doc:"“known”, or “unknown” while ClickHouse does not answer: then last_used_at is absent."`
	}
}

func (s *Service) listKeys(ctx context.Context, in *listKeysInput) (*listKeysOutput, error) {
	org, ok := api.From(ctx).Org(in.OrgID)
	if !ok {
		return nil, api.NotFound.New("There is no such organization.")
	}
	after, err := readCursor(in.Cursor)
	if err != nil {
		return nil, err
	}
	keep, err := s.filter(ctx, in, org)
	if err != nil {
		return nil, err
	}
	var page []key.Record
	more := false
	s.set.Walk(org, after, func(r key.Record) bool {
		if !keep(r) {
			return true
		}
		if more = len(page) == in.Limit; more {
			return false
		}
		page = append(page, r)
		return true
	})
	out := &listKeysOutput{}
	out.Body.Keys, out.Body.LastUse = make([]Key, len(page)), "known"
	keyIDs := make([]string, len(page))
	for i, r := range page {
		keyIDs[i] = r.ID
	}
	used, err := s.lastUsed(ctx, keyIDs)
	if err != nil {
		out.Body.LastUse = "unknown"
	}
	for i, r := range page {
		out.Body.Keys[i] = s.show(r, used)
	}
	if more {
		out.Body.NextCursor = writeCursor(page[len(page)-1].ID)
	}
	return out, nil
}

// filter compiles what a listing asks for. What asks about use needs
// ClickHouse, and is refused while that does not answer rather than answered wrongly.
func (s *Service) filter(ctx context.Context, in *listKeysInput, org string) (func(key.Record) bool, error) {
	var f faults
	now := s.now()
	var tests []func(key.Record) bool
	add := func(asked bool, test func(key.Record) bool) {
		if asked {
			tests = append(tests, test)
		}
	}
	add(in.Status != "", func(r key.Record) bool { return status(r, now) == in.Status })
	add(in.Environment != "", func(r key.Record) bool { return r.Environment == in.Environment })
	add(in.Owner != "", func(r key.Record) bool { return strings.EqualFold(r.Owner, in.Owner) })
	add(in.Tag != "", func(r key.Record) bool { return slices.Contains(r.Tags, in.Tag) })
	add(in.Q != "", func(r key.Record) bool { return contains(in.Q, r.Name, r.ID, r.Prefix, r.Description, r.Owner) })
	add(!in.CreatedBefore.IsZero(), func(r key.Record) bool { return r.CreatedAt.Before(in.CreatedBefore) })
	add(!in.CreatedAfter.IsZero(), func(r key.Record) bool { return r.CreatedAt.After(in.CreatedAfter) })
	if in.Scope != "" {
		if err := apikey.CheckScope(in.Scope); err != nil {
			f.add("query.scope", "%s", err)
		}
		add(true, func(r key.Record) bool {
			set, err := apikey.CompileScopes(r.Scopes)
			return err == nil && set.Covers(in.Scope)
		})
	}
	if in.OlderThan != "" {
		limit := now.Add(-f.duration("query.older_than", in.OlderThan, maxDays*day))
		add(true, func(r key.Record) bool { return r.CreatedAt.Before(limit) })
	}
	add(in.Overdue != "", func(r key.Record) bool {
		due := rotationDue(r, effective(r.Policy, s.orgs.policy(r.OrgID)), now)
		return (due != nil && now.After(*due)) == (in.Overdue == "true")
	})
	useTests, err := s.useFilter(ctx, &f, in, org)
	if err := f.err(); err != nil {
		return nil, err
	}
	if err != nil {
		return nil, err
	}
	tests = append(tests, useTests...)
	return func(r key.Record) bool {
		return !slices.ContainsFunc(tests, func(test func(key.Record) bool) bool { return !test(r) })
	}, nil
}

func (s *Service) useFilter(ctx context.Context, f *faults, in *listKeysInput, org string) ([]func(key.Record) bool, error) {
	if in.UsedSince.IsZero() && in.UnusedFor == "" && in.Unused == "" {
		return nil, nil
	}
	var limit time.Duration
	if in.UnusedFor != "" {
		limit = f.duration("query.unused_for", in.UnusedFor, maxDays*day)
	}
	now := s.now()
	used, err := s.facts.lastUsed(ctx, org, nil)
	if err != nil {
		return nil, factsProblem(err)
	}
	var tests []func(key.Record) bool
	if !in.UsedSince.IsZero() {
		tests = append(tests, func(r key.Record) bool { at, ok := used[r.ID]; return ok && !at.Before(in.UsedSince) })
	}
	if in.UnusedFor != "" {
		tests = append(tests, func(r key.Record) bool { return now.Sub(idleSince(r, used)) > limit })
	}
	if in.Unused != "" {
		tests = append(tests, func(r key.Record) bool { return s.unused(r, used, now) == (in.Unused == "true") })
	}
	return tests, nil
}

// idleSince is the last use of a key, or its creation if it was never used.
func idleSince(r key.Record, used map[string]time.Time) time.Time {
	if at, ok := used[r.ID]; ok && at.After(r.CreatedAt) {
		return at
	}
	return r.CreatedAt
}

func (s *Service) unused(r key.Record, used map[string]time.Time, now time.Time) bool {
	p := effective(r.Policy, s.orgs.policy(r.OrgID))
	return !ended(r, now) && now.Sub(idleSince(r, used)) > time.Duration(p.UnusedDays)*day
}

// lastUsed is when keys were last used, as far as is known.
func (s *Service) lastUsed(ctx context.Context, keyIDs []string) (map[string]time.Time, error) {
	if len(keyIDs) == 0 {
		return nil, nil
	}
	used, err := s.facts.lastUsed(ctx, "", keyIDs)
	if err != nil {
		s.log.DebugContext(ctx, "last use is not known", "error", err)
	}
	return used, err
}
