package edge

import (
	"context"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

type contextKey struct{}

// KeyFrom is the key that a request was allowed with, inside a handler behind
// [Edge.RequireScope]; nil elsewhere.
func KeyFrom(ctx context.Context) *Key {
	k, _ := ctx.Value(contextKey{}).(*Key)
	return k
}

// RequireScope lets a request through only with a valid key that holds every one
// of scopes; without scopes any valid key will do. A request that is refused is
// answered as RFC 6750 says, with an RFC 9457 body, and never reaches the handler.
// Each request, refused or not, becomes one usage event once it was answered.
//
// The route of the event is the pattern of the http.ServeMux that the request
// went through, if any, else its path with ids folded; see [FoldPath].
func (e *Edge) RequireScope(scopes ...string) func(http.Handler) http.Handler {
	need := Require(scopes...)
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { e.serve(w, r, need, next) })
	}
}

func (e *Edge) serve(w http.ResponseWriter, r *http.Request, need Need, next http.Handler) {
	start := e.opts.Clock()
	source := e.Source(r)
	verdict := e.DecideAt(start, e.Secret(r.Header), source, need)
	out := &recordingWriter{ResponseWriter: w}
	if verdict.Allowed() {
		// net/http copies a request to give it a context; the pattern that a mux
		// further in finds is on the copy.
		r = r.WithContext(context.WithValue(r.Context(), contextKey{}, verdict.Key))
		next.ServeHTTP(out, r)
	} else {
		e.Deny(out, r, verdict, need)
	}
	ev := usage.Event{
		Time: start, SourceIP: source, Method: r.Method, Route: routeOf(r), Status: out.statusCode(),
		UserAgent: r.UserAgent(), LatencyUS: micros(e.opts.Clock().Sub(start)), ResponseBytes: out.written,
	}
	if r.ContentLength > 0 {
		ev.RequestBytes = uint64(r.ContentLength)
	}
	e.Record(verdict, need, &ev)
}

// Secret finds the key in a request's headers: Authorization: Bearer, X-API-Key,
// or the configured header, in this order; "" if there is none.
func (e *Edge) Secret(h http.Header) string {
	if s := bearer(field(h, "Authorization")); s != "" {
		return s
	}
	if s := field(h, "X-Api-Key"); s != "" {
		return s
	}
	if e.opts.Header != "" {
		if s := field(h, e.header); s != "" {
			if b := bearer(s); b != "" {
				return b
			}
			return s
		}
	}
	return ""
}

// field is the value of a header whose name is in canonical form already. Several
// lines are one value (RFC 9110, 5.3), which is no key: if the first or the last
// of them counted, two readers of one request could see two clients.
func field(h http.Header, name string) string {
	switch v := h[name]; len(v) {
	case 0:
		return ""
	case 1:
		return v[0]
	default:
		return strings.Join(v, ", ")
	}
}

// bearer is the token of "Bearer <token>"; the scheme's case does not matter (RFC 9110, 11.1).
func bearer(s string) string {
	const scheme = "bearer "
	if len(s) <= len(scheme) || !strings.EqualFold(s[:len(scheme)], scheme) {
		return ""
	}
	return strings.Trim(s[len(scheme):], " ")
}

// Source is the address of a request's client; see [ClientIP].
func (e *Edge) Source(r *http.Request) netip.Addr {
	peer := peerAddr(r.RemoteAddr)
	if len(e.opts.TrustedProxies) == 0 {
		return peer
	}
	return ClientIP(peer, r.Header["X-Forwarded-For"], e.opts.TrustedProxies)
}

// peerAddr is the address of a socket's other end; on a Unix socket there is
// none, and its callers are this machine.
func peerAddr(remote string) netip.Addr {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return netip.IPv6Loopback()
	}
	return fold(ap.Addr())
}

func routeOf(r *http.Request) string {
	if r.Pattern != "" {
		// "POST example.com/v1/devices/{id}" without its method and host.
		if i := strings.IndexByte(r.Pattern, '/'); i >= 0 && r.Pattern != "/" {
			return r.Pattern[i:]
		}
	}
	return FoldPath(r.URL.Path)
}

// micros is d in microseconds, as far as a uint32 goes (71 minutes).
func micros(d time.Duration) uint32 {
	return uint32(min(max(d.Microseconds(), 0), 1<<32-1))
}

// recordingWriter notes the status and the size of an answer.
type recordingWriter struct {
	http.ResponseWriter
	status  int
	written uint64
}

func (w *recordingWriter) WriteHeader(status int) {
	if w.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *recordingWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(p)
	w.written += uint64(n)
	return n, err
}

// Unwrap gives http.ResponseController the writer beneath, for flushing,
// hijacking and deadlines.
func (w *recordingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *recordingWriter) statusCode() uint16 {
	if w.status == 0 {
		return http.StatusOK
	}
	return uint16(w.status)
}
