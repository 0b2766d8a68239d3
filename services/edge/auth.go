package edge

import (
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// The identity headers, in canonical form. Every answer of /auth carries all of
// them, empty where there is nothing to say: a gateway that copies a header
// which an answer lacks leaves the client's own in place (CVE-2026-30851).
const (
	headerKeyID       = "X-Latchkey-Key-Id"
	headerOrgID       = "X-Latchkey-Org-Id"
	headerKeyName     = "X-Latchkey-Key-Name"
	headerEnvironment = "X-Latchkey-Environment"
	headerScopes      = "X-Latchkey-Scopes"
	headerRoute       = "X-Latchkey-Route"
	headerClientIP    = "X-Latchkey-Client-Ip"
	headerDenyReason  = "X-Latchkey-Deny-Reason"
)

// identity is what a gateway is told about a request that was judged. Eight are
// as many as a map holds without growing, which is worth a tenth of the
// requests per second.
type identity [8]struct{ name, value string }

// identify fills the identity headers. A denial names no key: whether one exists
// is not told, and an upstream must not take the headers of a denial for a name.
func identify(v edge.Verdict, j *judged) identity {
	id := identity{
		{headerKeyID, ""},
		{headerOrgID, ""},
		{headerKeyName, ""},
		{headerEnvironment, ""},
		{headerScopes, ""},
		{headerRoute, headerSafe(routeStart(j.route))},
		{headerClientIP, j.source.String()},
		{headerDenyReason, publicReason(v.Reason)},
	}
	if k := v.Key; k != nil && v.Allowed() {
		id[0].value, id[1].value = k.ID(), k.OrgID()
		id[2].value, id[3].value = headerSafe(k.Name()), headerSafe(k.Environment())
		id[4].value = k.ScopeText()
	}
	return id
}

// publicReason is a deny reason as the client may know it: a key that expired or
// was revoked is not told from one that never was.
func publicReason(reason string) string {
	switch reason {
	case usage.DenyExpiredKey, usage.DenyRevokedKey:
		return usage.DenyInvalidKey
	}
	return reason
}

// routeStart is as much of a route as its event holds. Without a template it is
// the client's path, and nginx makes a 500 of an answer with too long a header.
func routeStart(route string) string { return route[:min(len(route), usage.MaxText)] }

// headerSafe is s for a header: anything but printable ASCII is percent-encoded,
// and the percent sign itself, so that nothing is lost and no line can begin.
func headerSafe(s string) string {
	clean := true
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' || s[i] == '%' {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			b.WriteString("%" + strings.ToUpper(strconv.FormatUint(0x100|uint64(c), 16)[1:]))
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// judged is a request that a gateway asked about, and what became of it.
type judged struct {
	original
	time    time.Time
	source  netip.Addr
	route   string
	need    edge.Need
	verdict edge.Verdict
	// refused says that it is not the key that is wrong but the request; then
	// there is no verdict and no event.
	refused error
}

// judge decides about a request whose line and source are known.
func (s *Service) judge(j *judged, secret string, required func(edge.Need) edge.Need) {
	j.time = s.now()
	if j.refused == nil {
		var cleaned string
		if cleaned, j.refused = cleanPath(j.target); j.refused == nil {
			s.decide(j, cleaned, secret, required)
		}
	}
	if j.refused != nil {
		j.verdict = edge.Verdict{Reason: reasonBadRequest}
		s.metrics.decided(reasonBadRequest)
		return
	}
	s.metrics.decided(j.verdict.Reason)
}

// Reasons of a denial that are not about the key and make no event.
const (
	reasonBadRequest = "bad_request"
)

func (s *Service) decide(j *judged, cleaned, secret string, required func(edge.Need) edge.Need) {
	r := s.policy.Load().match(j.method, j.host, cleaned)
	if r == nil {
		// No rule allows it to anybody: the scope for it does not exist.
		j.route, j.need = edge.FoldPath(cleaned), required(edge.Need{})
		j.verdict = s.edge.DecideAt(j.time, secret, j.source, j.need)
		if j.verdict.Allowed() {
			j.verdict.Reason = usage.DenyInsufficientScope
		}
		return
	}
	if j.route = r.route; j.route == "" {
		j.route = edge.FoldPath(cleaned)
	}
	j.need = required(r.need)
	if r.public && secret == "" && len(j.need.Scopes()) == 0 {
		j.verdict = edge.Verdict{}
		return
	}
	j.verdict = s.edge.DecideAt(j.time, secret, j.source, j.need)
}

// record sends the usage event of a judged request. Its status, sizes and
// latency are the upstream's, and unknown here.
func (s *Service) record(j *judged, userAgent string, status int) {
	if j.refused != nil || j.verdict.Allowed() && j.verdict.Key == nil {
		return
	}
	s.edge.Record(j.verdict, j.need, &usage.Event{
		Time: j.time, SourceIP: j.source, Method: j.method, Route: j.route, UserAgent: userAgent, Status: uint16(status),
	})
}

// serveAuth is the forward-auth endpoint. It answers 200, 401 or 403, and 503
// only to gateways that pass it on.
func (s *Service) serveAuth(w http.ResponseWriter, r *http.Request) {
	j := judged{source: s.edge.Source(r)}
	s.hintUntrusted(r)
	j.original, j.refused = originalOf(r)
	s.judge(&j, s.edge.Secret(r.Header), func(n edge.Need) edge.Need { return withRequired(n, r.Header) })
	h := w.Header()
	id := identify(j.verdict, &j)
	values := make([]string, len(id))
	for i, f := range id {
		values[i] = f.value
		h[f.name] = values[i : i+1 : i+1]
	}
	if j.verdict.Allowed() {
		s.record(&j, r.UserAgent(), 0)
		w.WriteHeader(http.StatusOK)
		return
	}
	a := s.answer(&j)
	s.record(&j, r.UserAgent(), a.Status)
	a.Problem.Instance = instance(j.target)
	a.Write(w)
}

// answer is what a denied client is told.
func (s *Service) answer(j *judged) edge.Answer {
	if j.refused != nil {
		// nginx makes a 500 of a 400.
		a := s.edge.BadRequest("The request is ambiguous", "The request was refused: "+j.refused.Error()+".")
		a.Status, a.Problem.Status = http.StatusForbidden, http.StatusForbidden
		return a
	}
	a := s.edge.Answer(j.verdict, j.need)
	if a.Status == http.StatusServiceUnavailable && !j.wants503 {
		a.Status, a.Problem.Status = http.StatusForbidden, http.StatusForbidden
	}
	return a
}

// instance is the path of a target without its query, which may hold secrets.
func instance(target string) string {
	u, err := url.ParseRequestURI(target)
	if err != nil {
		return ""
	}
	return u.EscapedPath()
}

// hintUntrusted tells the operator once that client addresses are not believed,
// which is the most likely reason why every event comes from the gateway.
func (s *Service) hintUntrusted(r *http.Request) {
	if s.hinted.Load() || len(r.Header["X-Forwarded-For"]) == 0 {
		return
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || s.trusts(peer.Addr()) || !s.hinted.CompareAndSwap(false, true) {
		return
	}
	s.log.Warn("X-Forwarded-For of a peer that is not trusted is ignored: the peer counts as the client; name the gateway in LATCHKEY_EDGE_TRUSTED_PROXIES",
		"peer", peer.Addr().Unmap().String())
}

func (s *Service) trusts(ip netip.Addr) bool {
	ip = ip.Unmap()
	for _, p := range s.proxies {
		if p.Contains(ip) {
			return true
		}
	}
	return false
}
