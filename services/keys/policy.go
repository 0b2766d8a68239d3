package keys

import (
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
)

// effective is the policy of a key: its own, completed by its organization's,
// completed by the defaults.
func effective(own, org key.Policy) key.Policy {
	p := own
	if p.RotationDays == 0 {
		p.RotationDays = org.RotationDays
	}
	if p.RotationDays == 0 {
		p.RotationDays = key.DefaultRotationDays
	}
	if p.AutoRotate == nil {
		p.AutoRotate = org.AutoRotate
	}
	if p.RotationGrace == "" {
		p.RotationGrace = org.RotationGrace
	}
	if p.OnCompromise == nil {
		p.OnCompromise = org.OnCompromise
	}
	if p.UnusedDays == 0 {
		p.UnusedDays = org.UnusedDays
	}
	if p.AlertBudget == 0 {
		p.AlertBudget = org.AlertBudget
	}
	if p.UnusedDays == 0 {
		p.UnusedDays = defaultUnusedDays
	}
	return p
}

// defaultUnusedDays is after how long without use a key is called unused.
const defaultUnusedDays = 90

// expiryWarning is how long before expiry the owner is told.
const expiryWarning = 14 * day

const day = 24 * time.Hour

// grace is how long a key stays valid that the policy rotates.
func grace(p key.Policy) time.Duration {
	if d, err := time.ParseDuration(p.RotationGrace); err == nil && p.RotationGrace != "" {
		return d
	}
	return key.DefaultGrace
}

// rotationDue is when a key is older than its interval allows; nil for a key
// that has a successor or has ended.
func rotationDue(r key.Record, p key.Policy, now time.Time) *time.Time {
	if ended(r, now) || r.SuccessorID != "" {
		return nil
	}
	since := r.CreatedAt
	if r.LastRotatedAt != nil {
		since = *r.LastRotatedAt
	}
	due := since.Add(time.Duration(p.RotationDays) * day)
	return &due
}

func expired(r key.Record, now time.Time) bool {
	return r.ExpiresAt != nil && !now.Before(*r.ExpiresAt)
}

// ended reports whether a key can never be used again.
func ended(r key.Record, now time.Time) bool { return r.Status == key.Revoked || expired(r, now) }

// statusExpired is how the API shows an active or suspended key past its expiry.
const statusExpired = "expired"

func status(r key.Record, now time.Time) string {
	if r.Status != key.Revoked && expired(r, now) {
		return statusExpired
	}
	return r.Status
}

var severities = map[string]int{alert.Low: 1, alert.Medium: 2, alert.High: 3, alert.Critical: 4}

// reaction is what the policy wants done about an alert of a severity; notify if
// nothing beyond telling the owner.
func reaction(p key.Policy, severity string) string {
	if p.OnCompromise == nil || severities[severity] < severities[p.OnCompromise.Severity] {
		return key.ReactNotify
	}
	return p.OnCompromise.Action
}
