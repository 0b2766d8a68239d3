// Package api is what every HTTP API of Latchkey shares: one huma.API with an
// OpenAPI 3.1 document and its pages, authentication by key, walls between
// organizations, RFC 9457 errors, health and metrics.
package api

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// MaxBody is the most that a request's body may have, in bytes.
const MaxBody = 256 << 10

// Options of a server.
type Options struct {
	// Keys are those that may call. Required.
	Keys *Keyset
	Log  *slog.Logger
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// Metrics registers the server's counters; nil registers none.
	Metrics prometheus.Registerer
	// TrustedProxies may name the caller in X-Forwarded-For.
	TrustedProxies []netip.Prefix
	// Observe is given a usage event for every call with a known key, if not nil.
	// It must not block.
	Observe func(usage.Event)
	// Version is that of the product, for the OpenAPI document.
	Version string
}

// Server is one API on one mux. Register operations on [Server.API], give every
// one a Security of [Requires], and serve [Server.Handler].
type Server struct {
	API huma.API

	mux    *http.ServeMux
	opts   Options
	denied *prometheus.CounterVec
}

// New makes an API on a mux, with /openapi.json, /docs and /problems/.
func New(mux *http.ServeMux, opts Options) *Server {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.Version == "" {
		opts.Version = buildVersion()
	}
	s := &Server{mux: mux, opts: opts}
	s.denied = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "latchkey_api_denied_total", Help: "API calls whose key was refused, by reason.",
	}, []string{"reason"})
	for _, reason := range []string{"invalid", "expired", "revoked", "suspended", "address"} {
		s.denied.WithLabelValues(reason)
	}
	if opts.Metrics != nil {
		// Two listeners of one process share the registry, and the counter.
		var twice prometheus.AlreadyRegisteredError
		if err := opts.Metrics.Register(s.denied); errors.As(err, &twice) {
			s.denied = twice.ExistingCollector.(*prometheus.CounterVec)
		}
	}
	s.API = humago.New(mux, config(opts.Version))
	s.API.UseMiddleware(s.authorize)
	// By method, so that the mux may also hold a page under "GET /".
	for _, method := range append(methods, http.MethodOptions) {
		mux.HandleFunc(method+" /v1/", s.unknown)
	}
	mux.HandleFunc("GET "+problemPath+"{slug}", problemPage)
	mux.HandleFunc("GET /docs", s.docsPage)
	return s
}

func config(version string) huma.Config {
	c := huma.DefaultConfig("Latchkey", version)
	c.Info.Description = "Keys, their use, and alerts when a key behaves unlike itself. Send a key as Authorization: Bearer, or as X-API-Key. " +
		"Errors are RFC 9457 problem details; each type is explained under its URI."
	c.Info.License = &huma.License{Name: "Apache-2.0", Identifier: "Apache-2.0"}
	c.Components.SecuritySchemes = map[string]*huma.SecurityScheme{
		bearerScheme: {Type: "http", Scheme: "bearer", BearerFormat: "lk_<environment>_<36 base62>", Description: "A key. What it may do follows from its scopes."},
		headerScheme: {Type: "apiKey", In: "header", Name: "X-API-Key", Description: "The same key in a header of its own."},
	}
	// No pages that load scripts from elsewhere, and no $schema links in answers.
	c.DocsPath = ""
	c.SchemasPath = ""
	c.CreateHooks = nil
	c.RejectUnknownQueryParameters = true
	c.Transformers = []huma.Transformer{func(ctx huma.Context, _ string, v any) (any, error) {
		if p, ok := v.(*Problem); ok {
			u := ctx.URL()
			p.Instance, p.RequestID = u.Path, requestID(ctx.Context())
			for name := range p.header {
				ctx.SetHeader(name, p.header.Get(name))
			}
		}
		return v, nil
	}}
	return c
}

// Handler is the mux with what every answer has: a request id, headers that keep
// browsers from guessing, a limit on bodies, and a problem instead of a crash.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get("X-Request-Id")
		if !validRequestID.MatchString(id) {
			id = "req_" + rand.Text()
		}
		r = r.WithContext(context.WithValue(r.Context(), requestKey, request{id: id, log: s.opts.Log}))
		h := w.Header()
		h.Set("X-Request-Id", id)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		if strings.HasPrefix(r.URL.Path, "/v1/") {
			// Answers may hold a secret that is shown once.
			h.Set("Cache-Control", "no-store")
		}
		if r.Header.Get("Content-Type") == "application/x-www-form-urlencoded" && (r.Header.Get("Authorization") != "" || r.Header.Get("X-API-Key") != "") {
			// What curl says of any body; a page in a browser can send no key with it.
			r.Header.Set("Content-Type", "application/json")
		}
		if r.ContentLength > MaxBody {
			tooLarge().Write(w, r)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, MaxBody+1)
		defer func() {
			if v := recover(); v != nil && v != http.ErrAbortHandler { //nolint:errorlint // the very value that net/http panics with
				if s.opts.Log != nil {
					s.opts.Log.Error("handler panicked", "request_id", id, "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
				}
				Internal.New("The request failed; the log says why.").Write(w, r)
			}
		}()
		s.mux.ServeHTTP(w, r)
	})
}

var validRequestID = regexp.MustCompile(`^[A-Za-z0-9_.:-]{1,64}$`)

type request struct {
	id  string
	log *slog.Logger
}

func requestID(ctx context.Context) string {
	r, _ := ctx.Value(requestKey).(request)
	return r.id
}

func logFrom(ctx context.Context) *slog.Logger {
	r, _ := ctx.Value(requestKey).(request)
	return r.log
}

func unwrap(ctx huma.Context) (*http.Request, http.ResponseWriter) { return humago.Unwrap(ctx) }

func tooLarge() *Problem {
	return TooLarge.New("A body may have at most 256 KiB.")
}

var methods = []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete}

// unknown answers what no operation under /v1/ matched: 405 if the path takes
// another method, else 404.
func (s *Server) unknown(w http.ResponseWriter, r *http.Request) {
	var allow []string
	for _, method := range methods {
		probe := r.Clone(r.Context())
		probe.Method = method
		if _, pattern := s.mux.Handler(probe); strings.HasPrefix(pattern, method+" /v1/") && pattern != method+" /v1/" {
			allow = append(allow, method)
		}
	}
	if len(allow) == 0 {
		NotFound.New("There is no such path; /docs lists them.").Write(w, r)
		return
	}
	MethodNotAllowed.New("The path takes "+strings.Join(allow, ", ")+".").with("Allow", strings.Join(allow, ", ")).Write(w, r)
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "devel"
}
