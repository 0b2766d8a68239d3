package keys

import (
	"time"

	"github.com/latchkey-dev/latchkey/schemas/key"
)

// PolicyInput is what a request may say of a policy. Absent fields stay as they are.
type PolicyInput struct {
	RotationDays  *int           `json:"rotation_days,omitempty" doc:"Rotation interval in days; 0 leaves it to the organization, then to 90."`
	AutoRotate    *bool          `json:"auto_rotate,omitempty" doc:"Rotate when the interval is over, instead of only saying so. The owner fetches the new secret once, with claim."`
	RotationGrace *string        `json:"rotation_grace,omitempty" doc:"How long a key stays valid that the policy rotates: 24h, 7d, 0. Empty for 24h." maxLength:"20"`
	OnCompromise  *ReactionInput `json:"on_compromise,omitempty" doc:"What to do when an alert is raised about the key."`
	UnusedDays    *int           `json:"unused_days,omitempty" doc:"After how many days without use the owner is told; 0 for 90."`
	AlertBudget   *float64       `json:"alert_budget,omitempty" doc:"Accepted false alerts per key and month, the one knob of the detector: more finds more. 0 leaves it to the organization, then to LATCHKEY_ALERT_BUDGET (one per key and year)."`
}

// ReactionInput is a reaction to alerts.
type ReactionInput struct {
	Action   string `json:"action" enum:"notify,rotate,suspend"`
	Severity string `json:"severity" enum:"low,medium,high,critical" doc:"The weakest severity that leads to the action."`
}

// PolicyView is a policy as the API shows it; absent fields follow the
// organization or the defaults.
type PolicyView struct {
	RotationDays  int            `json:"rotation_days,omitempty"`
	AutoRotate    *bool          `json:"auto_rotate,omitempty"`
	RotationGrace string         `json:"rotation_grace,omitempty"`
	OnCompromise  *ReactionInput `json:"on_compromise,omitempty"`
	UnusedDays    int            `json:"unused_days,omitempty"`
	AlertBudget   float64        `json:"alert_budget,omitempty"`
}

func showPolicy(p key.Policy) PolicyView {
	v := PolicyView{RotationDays: p.RotationDays, AutoRotate: p.AutoRotate, RotationGrace: p.RotationGrace, UnusedDays: p.UnusedDays, AlertBudget: p.AlertBudget}
	if p.OnCompromise != nil {
		v.OnCompromise = &ReactionInput{Action: p.OnCompromise.Action, Severity: p.OnCompromise.Severity}
	}
	return v
}

// Key is a key as the API shows it: neither its secret nor its hash.
type Key struct {
	ID            string            `json:"id" example:"key_01KAEXAMPLE"`
	OrgID         string            `json:"org_id"`
	Name          string            `json:"name"`
	Prefix        string            `json:"prefix" doc:"What may be shown of the secret." example:"lk_live_4fGh"`
	Environment   string            `json:"environment"`
	Description   string            `json:"description,omitempty"`
	Owner         string            `json:"owner,omitempty"`
	Scopes        []string          `json:"scopes" nullable:"false"`
	Status        string            `json:"status" doc:"active, suspended, revoked or expired."`
	CreatedAt     time.Time         `json:"created_at"`
	ExpiresAt     *time.Time        `json:"expires_at,omitempty"`
	LastRotatedAt *time.Time        `json:"last_rotated_at,omitempty"`
	LastUsedAt    *time.Time        `json:"last_used_at,omitempty" doc:"Absent if the key was never used, or if last use is not known just now."`
	RotationDueAt *time.Time        `json:"rotation_due_at,omitempty" doc:"Absent for a key that has ended or has a successor."`
	Overdue       bool              `json:"overdue" doc:"Whether rotation_due_at is over."`
	RevokedAt     *time.Time        `json:"revoked_at,omitempty"`
	RevokeReason  string            `json:"revoke_reason,omitempty" doc:"A name of RFC 5280, section 5.3.1."`
	ParentKeyID   string            `json:"parent_key_id,omitempty" doc:"The key that this one replaced."`
	SuccessorID   string            `json:"successor_key_id,omitempty" doc:"The key that replaced this one."`
	GraceAfterUse string            `json:"grace_after_use,omitempty" doc:"The grace period that begins when the successor is first used; expires_at is its latest end."`
	Unclaimed     bool              `json:"unclaimed,omitempty" doc:"Made by a policy; nobody has seen its secret yet."`
	AllowedCIDRs  []string          `json:"allowed_cidrs,omitempty"`
	Metadata      map[string]string `json:"metadata,omitempty"`
	Tags          []string          `json:"tags,omitempty"`
	PolicyView
}

// showKey shows a record by itself; [Service.show] adds what follows from the
// organization's policy and from use.
func showKey(r key.Record, now time.Time) Key {
	v := Key{
		ID: r.ID, OrgID: r.OrgID, Name: r.Name, Prefix: r.Prefix, Environment: r.Environment, Description: r.Description, Owner: r.Owner,
		Scopes: r.Scopes, Status: status(r, now), CreatedAt: r.CreatedAt, ExpiresAt: r.ExpiresAt, LastRotatedAt: r.LastRotatedAt,
		RevokedAt: r.RevokedAt, RevokeReason: r.RevokeReason, ParentKeyID: r.ParentKeyID, SuccessorID: r.SuccessorID,
		Unclaimed: r.Unclaimed, GraceAfterUse: r.GraceAfterUse, Metadata: r.Metadata, Tags: r.Tags, PolicyView: showPolicy(r.Policy),
	}
	if v.Scopes == nil {
		v.Scopes = []string{}
	}
	for _, p := range r.AllowedCIDRs {
		v.AllowedCIDRs = append(v.AllowedCIDRs, p.String())
	}
	return v
}

func (s *Service) show(r key.Record, used map[string]time.Time) Key {
	now := s.now()
	v := showKey(r, now)
	v.RotationDueAt = rotationDue(r, effective(r.Policy, s.orgs.policy(r.OrgID)), now)
	v.Overdue = v.RotationDueAt != nil && now.After(*v.RotationDueAt)
	if at, ok := used[r.ID]; ok {
		v.LastUsedAt = &at
	}
	return v
}
