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
	MaxText = 1024
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
	e.Method = cut(e.Method, 32)
	e.Scope = cut(e.Scope, MaxIdentifier)
	e.Gateway = cut(e.Gateway, MaxIdentifier)
}

// Validate reports everything that is wrong with a normalized event, by field.
// now is the clock against which a time in the future is judged.
func (e *Event) Validate(now time.Time) error {
	var errs []error
	switch {
	case e.Time.IsZero():
		errs = append(errs, errors.New("time is required"))
	case e.Time.After(now.Add(MaxAhead)):
		errs = append(errs, fmt.Errorf("time %s is more than %s in the future", e.Time.Format(time.RFC3339), MaxAhead))
	case e.Time.Year() < 2000:
		errs = append(errs, fmt.Errorf("time %s is before the year 2000", e.Time.Format(time.RFC3339)))
	}
	if err := CheckIdentifier(e.OrgID); err != nil {
		errs = append(errs, fmt.Errorf("org_id %w", err))
	}
	if err := CheckIdentifier(e.KeyID); err != nil {
		errs = append(errs, fmt.Errorf("key_id %w", err))
	}
	if e.ID != "" {
		if err := CheckIdentifier(e.ID); err != nil {
			errs = append(errs, fmt.Errorf("id %w", err))
		}
	}
	if !e.SourceIP.IsValid() {
		errs = append(errs, errors.New("source_ip is required"))
	}
	if e.Route == "" {
		errs = append(errs, errors.New("route is required"))
	}
	switch e.Decision {
	case Allow:
		if e.DenyReason != "" {
			errs = append(errs, errors.New(`deny_reason goes with decision "deny" only`))
		}
	case Deny:
		if !validDenyReason(e.DenyReason) {
			errs = append(errs, fmt.Errorf("deny_reason %q is not a known reason", e.DenyReason))
		}
	default:
		errs = append(errs, fmt.Errorf("decision %q is neither allow nor deny", e.Decision))
	}
	return errors.Join(errs...)
}

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
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9',
			c == '_', c == '.', c == ':', c == '-':
		default:
			return fmt.Errorf("has %q at %d, only letters, digits and _ . : - are allowed", c, i)
		}
	}
	return nil
}

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
