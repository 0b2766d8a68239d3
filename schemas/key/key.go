// Package key is the contract of keys and organizations: the record that the
// KEYS stream carries to every edge, and the change that made it.
package key

import (
	"encoding/json"
	"net/netip"
	"time"
)

// Statuses of a key. Expiry is not a status: it follows from ExpiresAt.
const (
	Active    = "active"
	Suspended = "suspended"
	Revoked   = "revoked"
)

// Types of change, which are also the names of the webhook events.
const (
	Created   = "api_key.created"
	Updated   = "api_key.updated"
	Rotated   = "api_key.rotated"
	RevokedEv = "api_key.revoked"
	SuspendEv = "api_key.suspended"
	ResumedEv = "api_key.resumed"
	Expiring  = "api_key.expiring"
	Expired   = "api_key.expired"
	// RotationDue says that a key is older than its rotation interval.
	RotationDue = "api_key.rotation_due"
	// Unused says that nobody has used a key for long.
	Unused = "api_key.unused"
)

// SystemOrg is the organization of the first admin key. Its keys see all
// organizations; those of any other see only their own.
const SystemOrg = "org_system"

// DefaultRotationDays is how old a key may become where neither it nor its
// organization says otherwise.
const DefaultRotationDays = 90

// DefaultGrace is how long a rotated key stays valid unless told otherwise.
const DefaultGrace = 24 * time.Hour

// What happens to a key by itself when an alert is raised about it.
const (
	ReactNotify  = "notify"
	ReactRotate  = "rotate"
	ReactSuspend = "suspend"
)

// Reaction says what to do about a suspected compromise.
type Reaction struct {
	// Action is [ReactNotify], [ReactRotate] or [ReactSuspend].
	Action string `json:"action"`
	// Severity is the weakest severity of an alert that leads to the action.
	Severity string `json:"severity"`
}

// Policy is what a key does by itself. A key's own policy goes before its
// organization's, field by field.
type Policy struct {
	// RotationDays is the rotation interval; 0 leaves it to the organization, then to [DefaultRotationDays].
	RotationDays int `json:"rotation_days,omitempty"`
	// AutoRotate replaces the key when the interval is over, instead of only saying so.
	AutoRotate *bool `json:"auto_rotate,omitempty"`
	// RotationGrace is how long a key that was rotated by policy stays valid, a Go duration; empty means 24h.
	RotationGrace string `json:"rotation_grace,omitempty"`
	// OnCompromise is the reaction to alerts; nil only notifies.
	OnCompromise *Reaction `json:"on_compromise,omitempty"`
	// UnusedDays is after how many days without use the owner is told; 0 means 90.
	UnusedDays int `json:"unused_days,omitempty"`
	// AlertBudget is how many false alerts a month the detector may raise about a
	// key; 0 leaves it to the organization, then to LATCHKEY_ALERT_BUDGET.
	AlertBudget float64 `json:"alert_budget,omitempty"`
}

// Record is a key as the KEYS stream carries it. The secret is never part of it.
type Record struct {
	ID    string `json:"id"`
	OrgID string `json:"org_id"`
	Name  string `json:"name"`
	// Hash is the SHA-256 of the secret in hex, or its HMAC-SHA-256 where the
	// installation has a pepper; see apikey.Hasher.
	Hash string `json:"hash"`
	// Prefix is what may be shown of the secret: "lk_live_ab12".
	Prefix      string   `json:"prefix"`
	Environment string   `json:"environment,omitempty"`
	Description string   `json:"description,omitempty"`
	Owner       string   `json:"owner,omitempty"`
	Scopes      []string `json:"scopes"`
	Status      string   `json:"status"`
	// RevokeReason is one of the RFC 5280 CRLReason names.
	RevokeReason string `json:"revoke_reason,omitempty"`
	// AllowedCIDRs limits the source addresses; empty allows all.
	AllowedCIDRs  []netip.Prefix    `json:"allowed_cidrs,omitempty"`
	CreatedAt     time.Time         `json:"created_at"`
	ExpiresAt     *time.Time        `json:"expires_at,omitempty"`
	LastRotatedAt *time.Time        `json:"last_rotated_at,omitempty"`
	RevokedAt     *time.Time        `json:"revoked_at,omitempty"`
	ParentKeyID   string            `json:"parent_key_id,omitempty"`
	SuccessorID   string            `json:"successor_key_id,omitempty"`
	Metadata      map[string]string `json:"metadata,omitempty"`
	Tags          []string          `json:"tags,omitempty"`
	// GraceAfterUse is the grace period of a rotated key that begins only when its
	// successor is first used, a Go duration; until then ExpiresAt is the latest end.
	GraceAfterUse string `json:"grace_after_use,omitempty"`
	// Unclaimed marks a key that a policy made: nobody has seen its secret yet,
	// and its owner fetches one, once.
	Unclaimed bool `json:"unclaimed,omitempty"`
	Policy
}

// Change is one message on subject keys.<id>: the record after the change, and
// who made it. The last message of a subject is the key's state, all of them
// are its audit.
type Change struct {
	// ID is the change's own id, "evt_…".
	ID   string    `json:"id"`
	Type string    `json:"type"`
	Time time.Time `json:"time"`
	// Actor is the id of the key that made the change, or "system".
	Actor   string     `json:"actor"`
	ActorIP netip.Addr `json:"actor_ip"`
	Reason  string     `json:"reason,omitempty"`
	Record  Record     `json:"record"`
	// Before is the record before the change, nil for a new key.
	Before *Record `json:"before,omitempty"`
}

// Notice is a message on NOTICES, subject notices.<org>.<key>: something that
// the key's owner, or a webhook, may want to hear. Its id is the same however
// often it is published.
type Notice struct {
	ID string `json:"id"`
	// Type is one of the types of change of this package, say [Expiring].
	Type  string    `json:"type"`
	Time  time.Time `json:"time"`
	OrgID string    `json:"org_id"`
	KeyID string    `json:"key_id"`
	Data  Data      `json:"data"`
}

// Data is what a notice says about its key, fit for a mail or a webhook.
type Data struct {
	Name          string     `json:"name"`
	Prefix        string     `json:"prefix"`
	Status        string     `json:"status"`
	Owner         string     `json:"owner,omitempty"`
	ExpiresAt     *time.Time `json:"expires_at,omitempty"`
	RotationDueAt *time.Time `json:"rotation_due_at,omitempty"`
	LastUsedAt    *time.Time `json:"last_used_at,omitempty"`
	ParentKeyID   string     `json:"parent_key_id,omitempty"`
	SuccessorID   string     `json:"successor_key_id,omitempty"`
	RevokeReason  string     `json:"revoke_reason,omitempty"`
	Unclaimed     bool       `json:"unclaimed,omitempty"`
	// Actor is who made the change, Reason why, for a notice of a change.
	Actor  string `json:"actor,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// AuditEvent is a message on AUDIT, subject audit.<kind>.<id>: a change of an
// organization or a webhook, told before it is made.
type AuditEvent struct {
	ID   string    `json:"id"`
	Type string    `json:"type"`
	Time time.Time `json:"time"`
	// Actor is the id of the key that made the change, or "system".
	Actor   string     `json:"actor"`
	ActorIP netip.Addr `json:"actor_ip"`
	OrgID   string     `json:"org_id"`
	// Kind is "org" or "webhook", Subject its id.
	Kind    string `json:"kind"`
	Subject string `json:"subject"`
	Reason  string `json:"reason,omitempty"`
	// Before and After are the object without its secrets; null where there is none.
	Before json.RawMessage `json:"before,omitempty"`
	After  json.RawMessage `json:"after,omitempty"`
}

// Webhook is an endpoint that is told of events, the value in KV bucket
// "webhooks" under its id.
type Webhook struct {
	ID string `json:"id"`
	// OrgID is whose events it hears; those of [SystemOrg] hear all organizations'.
	OrgID string `json:"org_id"`
	URL   string `json:"url"`
	// Events are the types it hears; empty means all.
	Events      []string `json:"events,omitempty"`
	Description string   `json:"description,omitempty"`
	// Secret signs the deliveries (Standard Webhooks, "whsec_…"); shown once by the API.
	Secret string `json:"secret"`
	// PreviousSecret also signs until PreviousUntil, while receivers change over.
	PreviousSecret string     `json:"previous_secret,omitempty"`
	PreviousUntil  *time.Time `json:"previous_until,omitempty"`
	Disabled       bool       `json:"disabled,omitempty"`
	// DisabledReason says why, for instance that the endpoint answered 410.
	DisabledReason string    `json:"disabled_reason,omitempty"`
	CreatedAt      time.Time `json:"created_at"`
}

// Org is an organization, the value in KV bucket "orgs" under its id.
type Org struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	OwnerEmail string    `json:"owner_email"`
	CreatedAt  time.Time `json:"created_at"`
	// Policy holds for the organization's keys that do not say otherwise.
	Policy
}
