package api

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Principal is who makes a call.
type Principal struct {
	KeyID  string
	OrgID  string
	Scopes apikey.Scopes
	// IP is the caller's address, behind the trusted proxies.
	IP netip.Addr
}

// System reports whether the principal belongs to the installation itself and
// sees every organization.
func (p Principal) System() bool { return p.OrgID == key.SystemOrg }

// Sees reports whether an organization's things exist for the principal. What
// it does not see is answered as not found.
func (p Principal) Sees(orgID string) bool { return p.System() || p.OrgID == orgID }

// Org is the organization to which a listing is limited: the principal's own,
// or the wanted one (empty: all) for a principal of the system. The second
// result is false if the wanted one does not exist for the principal.
func (p Principal) Org(wanted string) (string, bool) {
	if p.System() {
		return wanted, true
	}
	return p.OrgID, wanted == "" || wanted == p.OrgID
}

type contextKey int

const (
	principalKey contextKey = iota
	requestKey
)

// WithPrincipal marks a request as made by p: for callers that authenticate in
// another way, as the console's sessions do. Scopes are still checked.
func WithPrincipal(ctx context.Context, p Principal) context.Context {
	return context.WithValue(ctx, principalKey, p)
}

// From is the principal of a call. It is only absent, and zero, outside of operations.
func From(ctx context.Context) Principal {
	p, _ := ctx.Value(principalKey).(Principal)
	return p
}

// Authenticate is the principal of a request that is not huma's, or a problem
// to answer with; then the principal only names the refused key, if it is
// known. scope may be empty: any valid key will do.
func (s *Server) Authenticate(r *http.Request, scope string) (Principal, *Problem) {
	p, ok := r.Context().Value(principalKey).(Principal)
	if !ok {
		var problem *Problem
		if p, problem = s.identify(r); problem != nil {
			return p, problem
		}
	}
	if !p.Scopes.Covers(scope) {
		detail := fmt.Sprintf("The call needs the scope %s.", scope)
		return p, InsufficientScope.New(detail).with("WWW-Authenticate", challenge("insufficient_scope", detail, scope))
	}
	return p, nil
}

// identify reads the key of a request. Its answers do not tell unknown keys
// from expired, suspended or revoked ones (RFC 6750, section 3.1).
func (s *Server) identify(r *http.Request) (Principal, *Problem) {
	secret, problem := credentials(r)
	if problem != nil {
		return Principal{}, problem
	}
	ip := s.clientIP(r)
	record, scopes, refused := s.opts.Keys.Lookup(secret, s.opts.Now())
	if refused != "" {
		s.denied.WithLabelValues(refused).Inc()
		return Principal{KeyID: record.ID, OrgID: record.OrgID}, InvalidKey.New("The key is malformed, unknown, expired or revoked.").
			with("WWW-Authenticate", challenge("invalid_token", "The key is malformed, unknown, expired or revoked.", ""))
	}
	if len(record.AllowedCIDRs) > 0 && !slices.ContainsFunc(record.AllowedCIDRs, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		s.denied.WithLabelValues("address").Inc()
		return Principal{KeyID: record.ID, OrgID: record.OrgID}, AddressNotAllowed.New("The key may not be used from this address.").
			with("WWW-Authenticate", challenge("invalid_token", "The key may not be used from this address.", ""))
	}
	return Principal{KeyID: record.ID, OrgID: record.OrgID, Scopes: scopes, IP: ip}, nil
}

// credentials finds the one key of a request.
func credentials(r *http.Request) (string, *Problem) {
	malformed := func(detail string) (string, *Problem) {
		return "", InvalidRequest.New(detail).with("WWW-Authenticate", challenge("invalid_request", detail, ""))
	}
	var found []string
	for _, h := range r.Header.Values("Authorization") {
		scheme, rest, _ := strings.Cut(strings.TrimSpace(h), " ")
		if !strings.EqualFold(scheme, "Bearer") {
			continue
		}
		if rest = strings.TrimSpace(rest); rest == "" {
			return malformed("The Authorization header has no key after “Bearer”.")
		}
		found = append(found, rest)
	}
	for _, h := range r.Header.Values("X-API-Key") {
		if h = strings.TrimSpace(h); h == "" {
			return malformed("The header X-API-Key is empty.")
		}
		found = append(found, h)
	}
	slices.Sort(found)
	switch found = slices.Compact(found); len(found) {
	case 0:
		return "", MissingKey.New("Send a key as “Authorization: Bearer lk_…”.").with("WWW-Authenticate", `Bearer realm="latchkey"`)
	case 1:
		return found[0], nil
	}
	return malformed("The request carries two different keys.")
}

// challenge is a WWW-Authenticate header (RFC 6750, section 3).
func challenge(code, description, scope string) string {
	out := fmt.Sprintf(`Bearer realm="latchkey", error="%s", error_description="%s"`, code, strings.Map(ascii, description))
	if scope != "" {
		out += fmt.Sprintf(`, scope="%s"`, scope)
	}
	return out
}

func ascii(r rune) rune {
	if r < 0x20 || r > 0x7e || r == '"' || r == '\\' {
		return -1
	}
	return r
}

// ClientIP is the address of the caller of a request that is not huma's.
func (s *Server) ClientIP(r *http.Request) netip.Addr { return s.clientIP(r) }

// clientIP is the address of the caller: the socket's peer, or, if that is a
// trusted proxy, the last address of X-Forwarded-For that is none. The header
// is read from the right, since a client can write anything to its left.
func (s *Server) clientIP(r *http.Request) netip.Addr {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	ip := peer.Addr().Unmap().WithZone("")
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(hops) - 1; i >= 0 && s.trusted(ip); i-- {
		hop, err := netip.ParseAddr(strings.TrimSpace(hops[i]))
		if err != nil {
			break
		}
		ip = hop.Unmap().WithZone("")
	}
	return ip
}

func (s *Server) trusted(ip netip.Addr) bool {
	return slices.ContainsFunc(s.opts.TrustedProxies, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// security names for the OpenAPI document.
const (
	bearerScheme = "bearer"
	headerScheme = "header"
)

// Requires is the security of an operation that needs a scope.
func Requires(scope string) []map[string][]string {
	return []map[string][]string{{bearerScheme: {scope}}, {headerScheme: {scope}}}
}

// scopeOf is what [Requires] said; an operation without it needs full_access, so
// that a forgotten one is closed and not open.
func scopeOf(op *huma.Operation) string {
	for _, alternative := range op.Security {
		if scopes := alternative[bearerScheme]; len(scopes) == 1 {
			return scopes[0]
		}
	}
	return apikey.FullAccess
}

// authorize is the middleware of every operation.
func (s *Server) authorize(ctx huma.Context, next func(huma.Context)) {
	r, w := unwrap(ctx)
	start := s.opts.Now()
	scope := scopeOf(ctx.Operation())
	p, problem := s.Authenticate(r, scope)
	if problem != nil {
		problem.Write(w, r)
		s.observe(r, ctx.Operation(), p, scope, problem.Status, start, problem)
		return
	}
	ctx = huma.WithContext(ctx, WithPrincipal(ctx.Context(), p))
	next(ctx)
	s.observe(r, ctx.Operation(), p, scope, ctx.Status(), start, nil)
}

// observe tells the pipeline of a call: the API's own keys are watched as well.
// A call without a known key is only counted.
func (s *Server) observe(r *http.Request, op *huma.Operation, p Principal, scope string, status int, start time.Time, problem *Problem) {
	if s.opts.Observe == nil || p.KeyID == "" || p.OrgID == "" {
		return
	}
	ip := p.IP
	if !ip.IsValid() {
		ip = s.clientIP(r)
	}
	ev := usage.Event{
		Time: start, OrgID: p.OrgID, KeyID: p.KeyID, SourceIP: ip, Method: r.Method, Route: op.Path, Status: uint16(status),
		Scope: scope, Decision: usage.Allow, UserAgent: r.UserAgent(), LatencyUS: uint32(s.opts.Now().Sub(start).Microseconds()),
		RequestBytes: uint64(max(r.ContentLength, 0)), Gateway: "api",
	}
	if problem != nil {
		ev.Decision, ev.DenyReason = usage.Deny, usage.DenyInvalidKey
		switch {
		case InsufficientScope.Is(problem):
			ev.DenyReason = usage.DenyInsufficientScope
		case AddressNotAllowed.Is(problem):
			ev.DenyReason = usage.DenyIPNotAllowed
		default:
			if record, ok := s.opts.Keys.Get(p.KeyID); ok && record.Status != key.Active {
				ev.DenyReason = usage.DenyRevokedKey
			} else if ok {
				ev.DenyReason = usage.DenyExpiredKey
			}
		}
	}
	if !ev.SourceIP.IsValid() {
		return
	}
	ev.Normalize()
	s.opts.Observe(ev)
}
