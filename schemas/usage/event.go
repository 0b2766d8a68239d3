// Package usage is the contract of the usage event: its fields, the rules that
// an event must keep, its JSON and protobuf forms, and the subjects it travels on.
package usage

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Event is one API request made with one key.
type Event struct {
	// ID is made by the publisher if absent. An event sent again with the same
	// ID, KeyID and Time is stored once.
	ID string
	// Time is when the request was made, UTC, to the nanosecond.
	Time  time.Time
	OrgID string
	KeyID string
	// SourceIP is never an IPv4-mapped IPv6 address: those are read as IPv4.
	SourceIP netip.Addr
	Method   string
	// Route is the route template ("/v1/devices/{id}") where the gateway knows
	// it, else the path without its query.
	Route string
	// Status is the HTTP status of the answer, 0 if unknown.
	Status uint16
	// Scope is the scope that the request needed, "resource:action".
	Scope string
	// Decision is [Allow] or [Deny], never empty after [Event.Normalize].
	Decision   string
	DenyReason string
	UserAgent  string
	// LatencyUS is in microseconds.
	LatencyUS     uint32
	RequestBytes  uint64
	ResponseBytes uint64
	Gateway       string
}

// Decisions of the edge.
const (
	Allow = "allow"
	Deny  = "deny"
)

// Reasons for which the edge denies a request.
const (
	DenyMissingKey        = "missing_key"
	DenyInvalidKey        = "invalid_key"
	DenyExpiredKey        = "expired_key"
	DenyRevokedKey        = "revoked_key"
	DenyInsufficientScope = "insufficient_scope"
	DenyIPNotAllowed      = "ip_not_allowed"
	DenyRateLimited       = "rate_limited"
)

// Limits that an event must keep.
const (
	// MaxIdentifier is the length of an org_id, key_id or id in bytes.
	MaxIdentifier = 128
	// MaxText is the length of a route or user agent in bytes; longer ones are
	// cut at a rune boundary.
	MaxText   = 1024
	maxMethod = 32
	// MaxAhead is how far in the future an event's time may lie.
	MaxAhead = 5 * time.Minute
)

// Normalize puts the event into its stored form: time in UTC, IPv4-mapped
// addresses as IPv4, the default decision, over-long texts cut.
func (e *Event) Normalize() {
	e.Time = e.Time.UTC()
	e.SourceIP = e.SourceIP.Unmap().WithZone("")
	if e.Decision == "" {
		e.Decision = Allow
	}
	e.Route = cut(e.Route, MaxText)
	e.UserAgent = cut(e.UserAgent, MaxText)
	e.Method = cut(e.Method, maxMethod)
	e.Scope = cut(e.Scope, MaxIdentifier)
	e.Gateway = cut(e.Gateway, MaxIdentifier)
}

// Validate reports everything that is wrong with a normalized event, by field.
// now is the clock against which a time in the future is judged.
func (e *Event) Validate(now time.Time) error {
	var err error
	switch sec := e.Time.Unix(); {
	case e.Time.IsZero():
		err = errors.New("time is required")
	case e.Time.After(now.Add(MaxAhead)):
		err = fmt.Errorf("time %s is more than %s in the future", e.Time.Format(time.RFC3339), MaxAhead)
	case sec < year2000:
		err = fmt.Errorf("time %s is before the year 2000", e.Time.Format(time.RFC3339))
	}
	if ierr := CheckIdentifier(e.OrgID); ierr != nil {
		err = join(err, fmt.Errorf("org_id %w", ierr))
	}
	if ierr := CheckIdentifier(e.KeyID); ierr != nil {
		err = join(err, fmt.Errorf("key_id %w", ierr))
	}
	if e.ID != "" {
		if ierr := CheckIdentifier(e.ID); ierr != nil {
			err = join(err, fmt.Errorf("id %w", ierr))
		}
	}
	if !e.SourceIP.IsValid() {
		err = join(err, errors.New("source_ip is required"))
	}
	if e.Route == "" {
		err = join(err, errors.New("route is required"))
	}
	return join(err, checkDecision(e.Decision, e.DenyReason))
}

func checkDecision(decision, reason string) error {
	switch {
	case decision == Allow && reason != "":
		return errors.New(`deny_reason goes with decision "deny" only`)
	case decision == Allow || decision == Deny && (reason == "" || validDenyReason(reason)):
		return nil
	case decision == Deny:
		return fmt.Errorf("deny_reason %.40q is not a known reason", reason)
	}
	return fmt.Errorf("decision %.40q is neither allow nor deny", decision)
}

// year2000 in Unix seconds: whatever is older is a broken clock.
const year2000 = 946684800

// CheckIdentifier reports why s cannot be an org_id, key_id or id:
// 1 to 128 of [A-Za-z0-9_.:-].
func CheckIdentifier(s string) error {
	if s == "" {
		return errors.New("is required")
	}
	if len(s) > MaxIdentifier {
		return fmt.Errorf("is %d bytes long, at most %d are allowed", len(s), MaxIdentifier)
	}
	for i := range len(s) {
		if !identifier[s[i]] {
			return fmt.Errorf("has %q at %d, only letters, digits and _ . : - are allowed", s[i], i)
		}
	}
	return nil
}

// identifier marks the bytes that an org_id, key_id or id may have.
var identifier = func() (t [256]bool) {
	for _, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.:-") {
		t[c] = true
	}
	return t
}()

func validDenyReason(r string) bool {
	switch r {
	case DenyMissingKey, DenyInvalidKey, DenyExpiredKey, DenyRevokedKey,
		DenyInsufficientScope, DenyIPNotAllowed, DenyRateLimited:
		return true
	}
	return false
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xC0 == 0x80 {
		n--
	}
	return s[:n]
}
