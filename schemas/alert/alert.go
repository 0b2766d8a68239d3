// Package alert is the contract of the alert: what the detector raises, the
// ALERTS stream carries and the notifier mails.
package alert

import (
	"net/netip"
	"time"
)

// Triggers. The first four are those of the mission.
const (
	NewIPRange   = "new_ip_range"
	VolumeSpike  = "volume_spike"
	EndpointMix  = "endpoint_mix"
	DormantKey   = "dormant_key"
	KeyGuessing  = "key_guessing"
	RevokedKey   = "revoked_key_used"
	ScopeProbing = "scope_probing"
)

// Severities, weakest first.
const (
	Low      = "low"
	Medium   = "medium"
	High     = "high"
	Critical = "critical"
)

// Alert is one episode of a key behaving unlike itself. An episode that grows is
// published again under the same ID with a higher Revision; the owner gets one mail.
type Alert struct {
	// ID follows from the key, the triggers and the first event, so the same
	// events raise the same alert.
	ID string `json:"id"`
	// Time is the time of the event that raised the alert.
	Time time.Time `json:"time"`
	// DetectedAt is the detector's clock; backtest sets it to Time.
	DetectedAt time.Time `json:"detected_at"`
	OrgID      string    `json:"org_id"`
	KeyID      string    `json:"key_id"`
	Triggers   []string  `json:"triggers"`
	Severity   string    `json:"severity"`
	// Score is -log10 of the combined p-value.
	Score    float64    `json:"score"`
	Summary  string     `json:"summary"`
	SourceIP netip.Addr `json:"source_ip"`
	// Country is ISO 3166-1 alpha-2, empty if unknown.
	Country string `json:"country,omitempty"`
	ASN     uint32 `json:"asn,omitempty"`
	// ASName is the name of the autonomous system, empty if unknown.
	ASName    string     `json:"as_name,omitempty"`
	UserAgent string     `json:"user_agent,omitempty"`
	Method    string     `json:"method,omitempty"`
	Route     string     `json:"route,omitempty"`
	Evidence  []Evidence `json:"evidence"`
	// EventID is the event that raised the alert.
	EventID string `json:"event_id"`
	// Revision counts from 1 as the episode grows.
	Revision int `json:"revision"`
	// Historical alerts come from imported history: stored, never mailed.
	Historical bool `json:"historical,omitempty"`
}

// Evidence is what one trigger saw, against what is usual for the key.
type Evidence struct {
	Trigger  string  `json:"trigger"`
	Observed string  `json:"observed"`
	Usual    string  `json:"usual"`
	PValue   float64 `json:"p_value"`
}
