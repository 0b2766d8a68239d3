// Package key is the contract of keys and organizations: the record that the
// KEYS stream carries to every edge, and the change that made it.
package key

import (
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
)

// Record is a key as the KEYS stream carries it. The secret is never part of it.
type Record struct {
	ID    string `json:"id"`
	OrgID string `json:"org_id"`
	Name  string `json:"name"`
	// Hash is the SHA-256 of the secret, hex.
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
	RotationDays  int               `json:"rotation_days,omitempty"`
	Metadata      map[string]string `json:"metadata,omitempty"`
	Tags          []string          `json:"tags,omitempty"`
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
}

// Org is an organization, the value in KV bucket "orgs" under its id.
type Org struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	OwnerEmail string    `json:"owner_email"`
	CreatedAt  time.Time `json:"created_at"`
	// RotationDays is the default rotation interval of the org's keys; 0 means 90.
	RotationDays int `json:"rotation_days,omitempty"`
}
