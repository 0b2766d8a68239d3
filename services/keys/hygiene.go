package keys

import (
	"context"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
)

// Kinds of findings.
const (
	findOverdue      = "overdue"
	findUnused       = "unused"
	findNeverUsed    = "never_used"
	findFullAccess   = "full_access"
	findUnusedScopes = "unused_scopes"
	findShared       = "shared"
	findExpiring     = "expiring"
	findUnclaimed    = "unclaimed"
)

// Finding is one thing to put in order.
type Finding struct {
	Kind   string `json:"kind" enum:"overdue,unused,never_used,full_access,unused_scopes,shared,expiring,unclaimed"`
	KeyID  string `json:"key_id"`
	OrgID  string `json:"org_id"`
	Name   string `json:"name"`
	Prefix string `json:"prefix"`
	Owner  string `json:"owner,omitempty"`
	Detail string `json:"detail" doc:"One sentence that says what was found."`
	Advice string `json:"advice" doc:"One sentence that says what to do."`
	// Scopes are for unused_scopes and full_access.
	Scopes []string `json:"scopes,omitempty" doc:"What the key could be narrowed to."`
	// Seen are for shared and full_access.
	Seen []string `json:"seen,omitempty" doc:"The tools or networks that use the key."`
}

type hygieneInput struct {
	OrgID string `query:"org_id" maxLength:"128"`
	Kind  string `query:"kind" enum:"overdue,unused,never_used,full_access,unused_scopes,shared,expiring,unclaimed"`
	Days  int    `query:"days" default:"30" minimum:"1" maximum:"365" doc:"How far back use is looked at."`
}

type hygieneOutput struct {
	Body struct {
		GeneratedAt time.Time      `json:"generated_at"`
		Keys        int            `json:"keys" doc:"How many keys were looked at: those that can be used."`
		Counts      map[string]int `json:"counts" doc:"Findings by kind."`
		Usage       string         `json:"usage" doc:"“known”, or “unknown” while ClickHouse does not answer: then findings that follow from use are missing."`
		Findings    []Finding      `json:"findings" nullable:"false"`
	}
}

func (s *Service) registerHygiene(a huma.API) {
	huma.Register(a, operation(http.MethodGet, "/v1/hygiene", "get-hygiene", "Hygiene", "What to put in order: overdue, unused, too wide and shared keys", "keys:read", http.StatusOK), s.hygiene)
}

func (s *Service) hygiene(ctx context.Context, in *hygieneInput) (*hygieneOutput, error) {
	org, ok := api.From(ctx).Org(in.OrgID)
	if !ok {
		return nil, api.NotFound.New("There is no such organization.")
	}
	now := s.now().UTC()
	out := &hygieneOutput{}
	out.Body.GeneratedAt, out.Body.Usage, out.Body.Findings, out.Body.Counts = now, "known", []Finding{}, map[string]int{}
	for _, kind := range []string{findOverdue, findUnused, findNeverUsed, findFullAccess, findUnusedScopes, findShared, findExpiring, findUnclaimed} {
		out.Body.Counts[kind] = 0
	}
	used, err := s.facts.lastUsed(ctx, org, nil)
	var uses map[string]use
	if err == nil {
		uses, err = s.facts.usage(ctx, org, now.AddDate(0, 0, -in.Days))
	}
	if err != nil {
		out.Body.Usage = "unknown"
		s.log.DebugContext(ctx, "use is not known", "error", err)
	}
	known := err == nil
	s.set.Walk(org, "", func(r key.Record) bool {
		if ended(r, now) {
			return true
		}
		out.Body.Keys++
		found := s.findByRecord(r, now)
		if known {
			found = append(found, s.findByUse(r, used, uses[r.ID], in.Days, now)...)
		}
		for _, f := range found {
			out.Body.Counts[f.Kind]++
			if in.Kind == "" || in.Kind == f.Kind {
				f.KeyID, f.OrgID, f.Name, f.Prefix, f.Owner = r.ID, r.OrgID, r.Name, r.Prefix, r.Owner
				out.Body.Findings = append(out.Body.Findings, f)
			}
		}
		return true
	})
	return out, nil
}

// findByRecord finds what the record alone tells.
func (s *Service) findByRecord(r key.Record, now time.Time) []Finding {
	var out []Finding
	p := effective(r.Policy, s.orgs.policy(r.OrgID))
	if due := rotationDue(r, p, now); due != nil && now.After(*due) {
		out = append(out, Finding{
			Kind: findOverdue, Detail: "Rotation was due on " + due.Format(time.DateOnly) + ", " + days(now.Sub(*due)) + " ago.",
			Advice: "Rotate it: latchkey key rotate " + r.ID + " --grace 24h",
		})
	}
	if r.ExpiresAt != nil && r.SuccessorID == "" && r.ExpiresAt.Sub(now) < expiryWarning {
		out = append(out, Finding{
			Kind: findExpiring, Detail: "It expires on " + r.ExpiresAt.Format(time.DateOnly) + ".",
			Advice: "Rotate it before that, or let it go.",
		})
	}
	if r.Unclaimed {
		out = append(out, Finding{
			Kind: findUnclaimed, Detail: "A policy made it on " + r.CreatedAt.Format(time.DateOnly) + " and nobody has fetched its secret.",
			Advice: "Fetch it: latchkey key claim " + r.ID,
		})
	}
	return out
}

// findByUse finds what the use of a key tells.
func (s *Service) findByUse(r key.Record, used map[string]time.Time, u use, lookBack int, now time.Time) []Finding {
	var out []Finding
	if _, ever := used[r.ID]; !ever && now.Sub(r.CreatedAt) > 7*day && r.SuccessorID == "" {
		out = append(out, Finding{
			Kind: findNeverUsed, Detail: "It was created " + days(now.Sub(r.CreatedAt)) + " ago and never used.",
			Advice: "Revoke it: latchkey key revoke " + r.ID,
		})
	} else if ever && s.unused(r, used, now) {
		out = append(out, Finding{
			Kind: findUnused, Detail: "It was last used on " + used[r.ID].Format(time.DateOnly) + ", " + days(now.Sub(used[r.ID])) + " ago.",
			Advice: "Revoke it: latchkey key revoke " + r.ID,
		})
	}
	if u.Requests == 0 {
		return out
	}
	full := slices.Contains(r.Scopes, apikey.FullAccess)
	if scripts := scriptsOf(u.Agents); full && len(scripts) > 0 {
		out = append(out, Finding{
			Kind: findFullAccess, Detail: "It holds full_access and is used by scripts (" + strings.Join(scripts, ", ") + ").", Seen: scripts, Scopes: u.Scopes,
			Advice: narrow(u.Scopes),
		})
	}
	if idle := idleScopes(r.Scopes, u.Scopes); len(idle) > 0 && !full && len(u.Scopes) > 0 {
		out = append(out, Finding{
			Kind: findUnusedScopes, Detail: "It holds " + strings.Join(idle, ", ") + " and needed none of it in " + days(time.Duration(lookBack)*day) + ".", Scopes: u.Scopes,
			Advice: narrow(u.Scopes),
		})
	}
	if len(u.Agents) > 1 {
		out = append(out, Finding{
			Kind: findShared, Detail: "Several tools use it: " + strings.Join(u.Agents, ", ") + ".", Seen: u.Agents,
			Advice: "Give each tool a key of its own, so that one can be revoked without the others.",
		})
	} else if len(u.Networks) > sharedNetworks {
		out = append(out, Finding{
			Kind: findShared, Detail: "It is used from many networks: " + strings.Join(u.Networks[:sharedNetworks], ", ") + " and others.", Seen: u.Networks,
			Advice: "Give each place a key of its own, limited to its addresses with allowed_cidrs.",
		})
	}
	return out
}

// sharedNetworks is how many networks one user may have: home, office, phone.
const sharedNetworks = 3

func narrow(scopes []string) string {
	if len(scopes) == 0 {
		return "Narrow its scopes to what it needs."
	}
	return "Narrow its scopes to " + strings.Join(scopes, ",") + "."
}

// idleScopes are the held scopes under which nothing needed falls.
func idleScopes(held, needed []string) []string {
	var idle []string
	for _, h := range held {
		set, err := apikey.CompileScopes([]string{h})
		if err == nil && !slices.ContainsFunc(needed, set.Covers) {
			idle = append(idle, h)
		}
	}
	return idle
}

// scriptsOf are those of the user agents that no person sits behind.
func scriptsOf(agents []string) []string {
	var out []string
	for _, a := range agents {
		if !strings.HasPrefix(strings.ToLower(a), "mozilla") {
			out = append(out, a)
		}
	}
	return out
}

func days(d time.Duration) string {
	n := int(d / day)
	if n == 1 {
		return "1 day"
	}
	return strconv.Itoa(n) + " days"
}
