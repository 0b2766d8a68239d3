// Package delivery is what the notifier records of every mail and webhook call,
// and what the console shows of them: KV bucket bus.Deliveries.
package delivery

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"
	"time"
)

// Kinds of delivery, which are also the first token of their keys.
const (
	Alert  = "alert"
	Notice = "notice"
	Digest = "digest"
	Hook   = "hook"
)

// States of a delivery.
const (
	// Pending waits for its next attempt.
	Pending = "pending"
	// Sent was accepted by the mail server or the endpoint.
	Sent = "sent"
	// Refused got an answer that no retry can change.
	Refused = "refused"
	// Abandoned was tried until its time was up.
	Abandoned = "abandoned"
	// Unaddressed has nobody to go to: the organization is unknown and no fallback is configured.
	Unaddressed = "unaddressed"
	// Held came in a storm and is told in a digest.
	Held = "held"
)

// Delivery is one mail or webhook call and what became of it.
type Delivery struct {
	// ID is that of the alert, the notice or the webhook's event.
	ID    string `json:"id"`
	Kind  string `json:"kind"`
	OrgID string `json:"org_id,omitempty"`
	KeyID string `json:"key_id,omitempty"`
	// To is a mail address, or the host of a webhook's URL.
	To string `json:"to,omitempty"`
	// WebhookID is set for kind [Hook].
	WebhookID string `json:"webhook_id,omitempty"`
	State     string `json:"state"`
	// MessageID is the same through all attempts.
	MessageID string    `json:"message_id,omitempty"`
	Attempts  int       `json:"attempts"`
	CreatedAt time.Time `json:"created_at"`
	// NextAttemptAt and LeaseUntil hold attempts back: until a retry is due, and
	// while another notifier is at it.
	NextAttemptAt time.Time  `json:"next_attempt_at"`
	LeaseUntil    time.Time  `json:"lease_until"`
	SentAt        *time.Time `json:"sent_at,omitempty"`
	// Answer is the last that the server said, or why it was not reached.
	Answer string `json:"answer,omitempty"`
	// Payload is what is to be told; dropped once that is done.
	Payload json.RawMessage `json:"payload,omitempty"`
}

// Due is when the next attempt may be made.
func (d *Delivery) Due() time.Time {
	if d.LeaseUntil.After(d.NextAttemptAt) {
		return d.LeaseUntil
	}
	return d.NextAttemptAt
}

// Key is the bucket's key of a delivery: its kind and its parts as tokens.
func Key(kind string, parts ...string) string {
	var b strings.Builder
	b.WriteString(kind)
	for _, p := range parts {
		b.WriteByte('.')
		b.WriteString(token(p))
	}
	return b.String()
}

// token is s where a bucket allows it in a key, else its hash.
func token(s string) string {
	if s == "" || len(s) > 128 || strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
		sum := sha256.Sum256([]byte(s))
		return "sha256-" + hex.EncodeToString(sum[:])
	}
	return s
}
