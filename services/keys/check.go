package keys

import (
	"encoding/base64"
	"net/mail"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
)

// Limits of what a request may hold.
const (
	maxName        = 200
	maxDescription = 2000
	maxScopes      = 200
	maxTags        = 50
	maxTag         = 64
	maxMetadata    = 50
	maxCIDRs       = 200
	maxLifetime    = 10 * 365 * day
	maxGrace       = 90 * day
	maxDays        = 3650
	maxBudget      = 1000
)

// faults gathers everything that is wrong with a request, so that the caller
// hears it at once.
type faults []error

func (f *faults) add(location, format string, args ...any) {
	*f = append(*f, api.Fault(location, format, args...))
}

func (f *faults) err() error {
	if len(*f) == 0 {
		return nil
	}
	return api.Invalid.New("Something in the request is not allowed; “errors” says what.", *f...)
}

// text checks a text of one line.
func (f *faults) text(location, s string, limit int) string {
	s = strings.TrimSpace(s)
	switch {
	case !utf8.ValidString(s):
		f.add(location, "is not UTF-8")
	case utf8.RuneCountInString(s) > limit:
		f.add(location, "has %d characters, at most %d are allowed", utf8.RuneCountInString(s), limit)
	case strings.ContainsFunc(s, func(r rune) bool {
		return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || unicode.Is(unicode.Bidi_Control, r)
	}):
		f.add(location, "has a control character, a line break or a change of writing direction")
	}
	return s
}

func (f *faults) name(s string) string {
	const location = "body.name"
	if s = f.text(location, s, maxName); s == "" {
		f.add(location, "is required and must not be blank")
	}
	return s
}

func (f *faults) email(location, s string) string {
	s = f.text(location, s, 254)
	if addr, err := mail.ParseAddress(s); err != nil || addr.Address != s || !strings.Contains(s, "@") {
		f.add(location, "is not an address like owner@example.com")
	}
	return s
}

func (f *faults) scopes(location string, scopes []string) []string {
	if len(scopes) == 0 {
		f.add(location, "must name at least one scope")
	}
	if len(scopes) > maxScopes {
		f.add(location, "has %d scopes, at most %d are allowed; resource:* stands for all of a resource", len(scopes), maxScopes)
		return scopes
	}
	out := make([]string, 0, len(scopes))
	for i, s := range scopes {
		if err := apikey.CheckScope(s); err != nil {
			f.add(location+index(i), "%s", err)
		}
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

func (f *faults) cidrs(location string, texts []string) []netip.Prefix {
	if len(texts) > maxCIDRs {
		f.add(location, "has %d ranges, at most %d are allowed", len(texts), maxCIDRs)
		return nil
	}
	var out []netip.Prefix
	for i, t := range texts {
		p, err := parsePrefix(t)
		if err != nil {
			f.add(location+index(i), "%q is not a range like 198.51.100.0/24 or 2001:db8::/32", t)
			continue
		}
		out = append(out, p)
	}
	return out
}

// parsePrefix reads a range or a single address; IPv4-mapped IPv6 is IPv4.
func parsePrefix(t string) (netip.Prefix, error) {
	if !strings.Contains(t, "/") {
		a, err := netip.ParseAddr(t)
		if err != nil {
			return netip.Prefix{}, err
		}
		a = a.Unmap().WithZone("")
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(t)
	if err != nil {
		return p, err
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

func (f *faults) tags(location string, tags []string) []string {
	if len(tags) > maxTags {
		f.add(location, "has %d tags, at most %d are allowed", len(tags), maxTags)
		return nil
	}
	var out []string
	for i, t := range tags {
		if t = f.text(location+index(i), t, maxTag); t == "" {
			f.add(location+index(i), "is blank")
		}
		if !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	return out
}

func (f *faults) metadata(location string, m map[string]string) map[string]string {
	if len(m) > maxMetadata {
		f.add(location, "has %d entries, at most %d are allowed", len(m), maxMetadata)
		return nil
	}
	for k, v := range m {
		if k == "" || utf8.RuneCountInString(k) > maxTag {
			f.add(location, "has a name of %d characters, 1 to %d are allowed", utf8.RuneCountInString(k), maxTag)
			continue
		}
		f.text(location+"."+k, v, 500)
	}
	return m
}

func (f *faults) expiry(location string, at *time.Time, now time.Time) *time.Time {
	if at == nil {
		return nil
	}
	utc := at.UTC()
	switch {
	case !utc.After(now):
		f.add(location, "%s is not in the future", utc.Format(time.RFC3339))
	case utc.Sub(now) > maxLifetime:
		f.add(location, "%s is more than ten years away; leave it out for a key that does not expire", utc.Format(time.RFC3339))
	}
	return &utc
}

// duration reads "24h", "90m", "7d" or "0", from 0 to limit.
func (f *faults) duration(location, s string, limit time.Duration) time.Duration {
	d, err := parseDuration(s)
	switch {
	case err != nil:
		f.add(location, "%q is not a duration like 24h, 30m, 7d or 0", s)
	case d < 0:
		f.add(location, "%s is negative", s)
	case d > limit:
		f.add(location, "%s is longer than %d days", s, limit/day)
	}
	return d
}

func parseDuration(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		return time.Duration(n) * day, err
	}
	return time.ParseDuration(s)
}

// policy puts what the request says of a policy into p.
func (f *faults) policy(in PolicyInput, p *key.Policy) {
	if in.RotationDays != nil {
		p.RotationDays = f.days("body.rotation_days", *in.RotationDays)
	}
	if in.UnusedDays != nil {
		p.UnusedDays = f.days("body.unused_days", *in.UnusedDays)
	}
	if b := in.AlertBudget; b != nil {
		if !(*b >= 0 && *b <= maxBudget) {
			f.add("body.alert_budget", "%v is not within 0 to %d; 0 leaves it to the default", *b, maxBudget)
		}
		p.AlertBudget = *b
	}
	if in.AutoRotate != nil {
		p.AutoRotate = in.AutoRotate
	}
	if in.RotationGrace != nil {
		p.RotationGrace = ""
		if *in.RotationGrace != "" {
			p.RotationGrace = f.duration("body.rotation_grace", *in.RotationGrace, maxGrace).String()
		}
	}
	if in.OnCompromise != nil {
		p.OnCompromise = &key.Reaction{Action: in.OnCompromise.Action, Severity: in.OnCompromise.Severity}
	}
}

func (f *faults) days(location string, n int) int {
	if n < 0 || n > maxDays {
		f.add(location, "%d is not within 0 to %d; 0 leaves it to the default", n, maxDays)
	}
	return n
}

func index(i int) string { return "[" + strconv.Itoa(i) + "]" }

// A cursor is the last id of a page, in a form that invites nobody to make one up.
func writeCursor(id string) string { return base64.RawURLEncoding.EncodeToString([]byte(id)) }

func readCursor(s string) (string, error) {
	id, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil || !utf8.Valid(id) {
		return "", api.Invalid.New("The cursor is not one that this API gave out.", api.Fault("query.cursor", "take next_cursor of the page before, unchanged"))
	}
	return string(id), nil
}

// contains reports whether one of the texts has q in it, in any case.
func contains(q string, texts ...string) bool {
	if q == "" {
		return true
	}
	q = strings.ToLower(q)
	return slices.ContainsFunc(texts, func(t string) bool { return strings.Contains(strings.ToLower(t), q) })
}
