package console

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
)

const (
	sessionCookie = "latchkey_session"
	formCookie    = "latchkey_form"
	// sessionLife is how long a login lasts; a key that is revoked ends it at once.
	sessionLife = 12 * time.Hour
	// maxSessions bounds the memory of logins.
	maxSessions = 10_000
)

// viewer is who looks at a page.
type viewer struct {
	// Org is the one organization that the viewer sees, empty for all.
	Org string
	// Local viewers sit at this machine and did not log in.
	Local bool
	// KeyID is the key of a session or of a Bearer header.
	KeyID  string
	IP     netip.Addr
	scopes apikey.Scopes
}

// can reports whether the viewer may do what needs a scope. Who sits at the
// machine may read everything and give verdicts.
func (v *viewer) can(scope string) bool { return v.Local || v.scopes.Covers(scope) }

// sees reports whether an organization's things exist for the viewer.
func (v *viewer) sees(org string) bool { return v.Org == "" || v.Org == org }

// all reports whether the viewer sees every organization.
func (v *viewer) all() bool { return v.Org == "" }

// actor is how the viewer is named in the audit.
func (v *viewer) actor() string {
	if v.Local {
		return "console"
	}
	return v.KeyID
}

type viewerKey struct{}

func viewerOf(ctx context.Context) *viewer {
	v, _ := ctx.Value(viewerKey{}).(*viewer)
	return v
}

// identify finds out who looks, nil if nobody may.
func (s *Service) identify(r *http.Request) *viewer {
	if r.Header.Get("Authorization") != "" || r.Header.Get("X-API-Key") != "" {
		p, problem := s.api.Authenticate(r, "")
		if problem != nil {
			return nil
		}
		return viewerFor(p)
	}
	if c, err := r.Cookie(sessionCookie); err == nil {
		if id, ok := s.sessions.get(c.Value); ok {
			if p, ok := s.principal(id, s.api.ClientIP(r)); ok {
				return viewerFor(p)
			}
		}
	}
	if s.cfg.Login != "always" && local(r) {
		return &viewer{Local: true, IP: s.api.ClientIP(r)}
	}
	return nil
}

func viewerFor(p api.Principal) *viewer {
	v := &viewer{Org: p.OrgID, KeyID: p.KeyID, scopes: p.Scopes, IP: p.IP}
	if p.System() {
		v.Org = ""
	}
	return v
}

// principal is the holder of a session's key, if the key may still be used.
func (s *Service) principal(keyID string, ip netip.Addr) (api.Principal, bool) {
	rec, ok := s.keys.Get(keyID)
	if !ok || rec.Status != key.Active || (rec.ExpiresAt != nil && !s.now().Before(*rec.ExpiresAt)) {
		return api.Principal{}, false
	}
	if len(rec.AllowedCIDRs) > 0 && !contains(rec.AllowedCIDRs, ip) {
		return api.Principal{}, false
	}
	scopes, err := apikey.CompileScopes(rec.Scopes)
	if err != nil {
		return api.Principal{}, false
	}
	return api.Principal{KeyID: rec.ID, OrgID: rec.OrgID, Scopes: scopes, IP: ip}, true
}

func contains(prefixes []netip.Prefix, ip netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(ip) {
			return true
		}
	}
	return false
}

// local reports whether a request comes from this machine to a listener on
// loopback, by a name that means loopback, and through nobody: a page of
// another site that names itself to 127.0.0.1 has another Host, and what comes
// through a proxy says so.
func local(r *http.Request) bool {
	for _, h := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", "Via"} {
		if _, ok := r.Header[h]; ok {
			return false
		}
	}
	at, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if at == nil || !loopbackAddr(at.String()) || !loopbackAddr(r.RemoteAddr) {
		return false
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

func loopbackAddr(addr string) bool {
	ap, err := netip.ParseAddrPort(addr)
	return err == nil && ap.Addr().Unmap().IsLoopback()
}

// guard lets through who may look, with a scope that the page needs.
func (s *Service) guard(scope string, page http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v := s.identify(r)
		if v == nil {
			s.refuse(w, r)
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), viewerKey{}, v))
		if !v.can(scope) {
			s.showError(w, r, http.StatusForbidden, "Your key may not see this page", "It needs the scope "+scope+".")
			return
		}
		page(w, r)
	}
}

// everything lets through only who sees all organizations.
func (s *Service) everything(page http.HandlerFunc) http.HandlerFunc {
	return s.guard("full_access", func(w http.ResponseWriter, r *http.Request) {
		if !viewerOf(r.Context()).all() {
			s.showError(w, r, http.StatusForbidden, "This page shows all organizations", "A key of one organization may not see it.")
			return
		}
		page(w, r)
	})
}

// refuse sends a person to the login and tells a program that it needs a key.
func (s *Service) refuse(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet && strings.Contains(r.Header.Get("Accept"), "text/html") {
		http.Redirect(w, r, "/login?next="+url.QueryEscape(r.URL.RequestURI()), http.StatusSeeOther)
		return
	}
	w.Header().Set("WWW-Authenticate", `Bearer realm="latchkey"`)
	http.Error(w, "Log in at /login, or send a key as “Authorization: Bearer lk_…”.", http.StatusUnauthorized)
}

// sessions are the logins of this process. Only hashes of cookies are held, and
// they end with the process.
type sessions struct {
	now func() time.Time
	mu  sync.Mutex
	by  map[[32]byte]session
}

type session struct {
	keyID string
	until time.Time
}

func newSessions(now func() time.Time) *sessions {
	return &sessions{now: now, by: map[[32]byte]session{}}
}

// begin makes a session and returns its cookie's value.
func (s *sessions) begin(keyID string) string {
	token := rand.Text() + rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	for k, old := range s.by {
		if now.After(old.until) {
			delete(s.by, k)
		}
	}
	for k := range s.by { // any one of too many
		if len(s.by) < maxSessions {
			break
		}
		delete(s.by, k)
	}
	s.by[sha256.Sum256([]byte(token))] = session{keyID, now.Add(sessionLife)}
	return token
}

func (s *sessions) get(token string) (keyID string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found, ok := s.by[sha256.Sum256([]byte(token))]
	if !ok || s.now().After(found.until) {
		return "", false
	}
	return found.keyID, true
}

func (s *sessions) end(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.by, sha256.Sum256([]byte(token)))
}

// formToken is what a form carries so that no other site can send it: it goes
// with a cookie that other sites can neither read nor make a browser send.
func (s *Service) formToken(w http.ResponseWriter, r *http.Request) string {
	c, err := r.Cookie(formCookie)
	if err != nil || len(c.Value) < 26 {
		c = s.cookie(r, formCookie, rand.Text(), 0)
		http.SetCookie(w, c)
		r.AddCookie(c) // for a second form of the same page
	}
	return s.sign(c.Value)
}

func (s *Service) sign(value string) string {
	mac := hmac.New(sha256.New, s.secret)
	mac.Write([]byte(value))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// crossSite refuses what a browser says another site sent.
var crossSite = http.NewCrossOriginProtection()

// ownForm reports whether a POST comes from a form of ours. A request with a key
// in its header needs no form: browsers do not add that by themselves.
func (s *Service) ownForm(r *http.Request) bool {
	if r.Header.Get("Authorization") != "" || r.Header.Get("X-API-Key") != "" {
		return true
	}
	if crossSite.Check(r) != nil {
		return false
	}
	c, err := r.Cookie(formCookie)
	return err == nil && hmac.Equal([]byte(s.sign(c.Value)), []byte(r.PostFormValue("token")))
}

func (s *Service) cookie(r *http.Request, name, value string, life time.Duration) *http.Cookie {
	secure := r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https"
	return &http.Cookie{
		Name: name, Value: value, Path: "/", HttpOnly: true, Secure: secure, SameSite: http.SameSiteStrictMode,
		MaxAge: int(life / time.Second),
	}
}

// loginPage takes a key and makes a session of it. The key itself is not kept.
func (s *Service) loginPage(w http.ResponseWriter, r *http.Request) {
	next := safeNext(r.FormValue("next"))
	show := func(status int, problem string) {
		s.render(w, r, status, "login", "Log in", struct{ Next, Problem, Token string }{next, problem, s.formToken(w, r)})
	}
	if r.Method == http.MethodGet {
		show(http.StatusOK, "")
		return
	}
	if !s.ownForm(r) {
		show(http.StatusForbidden, "The form was too old, or came from elsewhere. Try again.")
		return
	}
	probe := r.Clone(r.Context())
	probe.Header = http.Header{"Authorization": {"Bearer " + strings.TrimSpace(r.PostFormValue("key"))}}
	p, problem := s.api.Authenticate(probe, "")
	if problem != nil {
		show(http.StatusUnauthorized, "The key is malformed, unknown, expired or revoked.")
		return
	}
	http.SetCookie(w, s.cookie(r, sessionCookie, s.sessions.begin(p.KeyID), sessionLife))
	http.Redirect(w, r, next, http.StatusSeeOther)
}

func (s *Service) logout(w http.ResponseWriter, r *http.Request) {
	if !s.ownForm(r) {
		s.showError(w, r, http.StatusForbidden, "The form was too old, or came from elsewhere", "Go back and try again.")
		return
	}
	if c, err := r.Cookie(sessionCookie); err == nil {
		s.sessions.end(c.Value)
	}
	http.SetCookie(w, s.cookie(r, sessionCookie, "", -time.Second))
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

// safeNext is a path on this site.
func safeNext(next string) string {
	u, err := url.Parse(next)
	if err != nil || u.IsAbs() || u.Host != "" || !strings.HasPrefix(u.Path, "/") || strings.HasPrefix(u.Path, "//") || strings.Contains(next, `\`) {
		return "/"
	}
	return u.RequestURI()
}
