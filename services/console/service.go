// Package console is what people see of Latchkey: the pages, and the read API
// of alerts, activity and baselines. It asks and shows; the only thing that it
// writes is a verdict.
package console

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/mailbox"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

// Config of the console. Variables carry the prefix LATCHKEY_.
type Config struct {
	// Addr is where pages and API are served; empty for no listener of its own,
	// where another carries them ([Service.Register], [Service.Mount]).
	Addr string `env:"CONSOLE_ADDR" envDefault:"127.0.0.1:8080"`
	// KeysURL is the keys service, to which its part of the API is passed on.
	KeysURL string `env:"KEYS_URL" envDefault:"http://127.0.0.1:8083"`
	// Login is "auto": pages may be read without logging in from this machine
	// itself; or "always".
	Login string `env:"CONSOLE_LOGIN" envDefault:"auto"`
	// TrustedProxies may name the caller in X-Forwarded-For.
	TrustedProxies []netip.Prefix `env:"TRUSTED_PROXIES"`
	// DormantDays is after how many days without use a key is shown as dormant.
	DormantDays int `env:"CONSOLE_DORMANT_DAYS" envDefault:"45"`
	// Peppers and PlainHashes are those of the keys service.
	Peppers     []string `env:"KEY_PEPPERS"`
	PlainHashes bool     `env:"KEY_PLAIN_HASHES" envDefault:"true"`
	ClickHouse  store.Config
}

// Validate reports everything that is wrong.
func (c *Config) Validate() error {
	var errs []error
	if c.Login != "" && c.Login != "auto" && c.Login != "always" {
		errs = append(errs, fmt.Errorf("LATCHKEY_CONSOLE_LOGIN: %q is neither auto nor always", c.Login))
	}
	if c.KeysURL != "" {
		if u, err := url.Parse(c.KeysURL); err != nil || u.Host == "" {
			errs = append(errs, fmt.Errorf("LATCHKEY_KEYS_URL: %q is no http address", c.KeysURL))
		}
	}
	return errors.Join(errs...)
}

// Service is the console.
type Service struct {
	cfg      Config
	log      *slog.Logger
	js       jetstream.JetStream
	keys     *api.Keyset
	ownKeys  bool
	records  *records
	alerts   *alertIndex
	usage    *usageStore
	sessions *sessions
	metrics  *prometheus.Registry
	secret   []byte // signs the tokens of forms; anew with every start
	now      func() time.Time
	listener net.Listener
	mailbox  *mailbox.Mailbox // nil if there is none
	api      *api.Server      // of the mux that carries the pages
}

// New prepares the console and listens if it has an address.
func New(ctx context.Context, cfg Config, deps run.Deps) (*Service, error) {
	return NewWithKeys(ctx, cfg, deps, nil)
}

// NewWithKeys is [New] with a keyset that the process has already; it stays the
// caller's.
func NewWithKeys(ctx context.Context, cfg Config, deps run.Deps, keys *api.Keyset) (_ *Service, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.DormantDays <= 0 {
		cfg.DormantDays = 45
	}
	s := &Service{
		cfg: cfg, log: deps.Log, keys: keys, metrics: deps.Metrics, now: time.Now, sessions: newSessions(time.Now),
		secret: []byte(rand.Text() + rand.Text()),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.js, err = jetstream.New(deps.NATS); err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	if err := bus.Ensure(ctx, s.js, deps.Bus); err != nil {
		return nil, err
	}
	if s.keys == nil {
		if err := s.openKeys(ctx); err != nil {
			return nil, err
		}
	}
	if s.usage, err = openUsage(cfg.ClickHouse, s.log); err != nil {
		return nil, err
	}
	if s.records, err = openRecords(ctx, s.js, s.log); err != nil {
		return nil, err
	}
	if s.alerts, err = openAlerts(ctx, s.js, s.log); err != nil {
		return nil, err
	}
	if cfg.Addr != "" {
		if s.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", cfg.Addr); err != nil {
			return nil, fmt.Errorf("listen for the console: %w", err)
		}
	}
	return s, nil
}

func (s *Service) openKeys(ctx context.Context) error {
	peppers, err := apikey.DecodePeppers(s.cfg.Peppers)
	if err != nil {
		return fmt.Errorf("read LATCHKEY_KEY_PEPPERS: %w", err)
	}
	hasher, err := apikey.NewHasher(peppers, s.cfg.PlainHashes)
	if err != nil {
		return fmt.Errorf("read LATCHKEY_KEY_PEPPERS: %w", err)
	}
	s.keys, err = api.OpenKeyset(ctx, s.js, hasher, s.log)
	s.ownKeys = err == nil
	return err
}

// Addr is where the console listens, nil if nowhere.
func (s *Service) Addr() net.Addr {
	if s.listener == nil {
		return nil
	}
	return s.listener.Addr()
}

// Check reports whether the console can read what it shows, for /-/ready.
// ClickHouse is not asked: without it the console shows what it can and says so.
func (s *Service) Check(context.Context) error {
	if status := s.js.Conn().Status(); status != nats.CONNECTED {
		return fmt.Errorf("connection to NATS is %s", status)
	}
	return nil
}

// Run keeps what is shown current, and serves if the console has an address.
func (s *Service) Run(ctx context.Context) error {
	defer s.close()
	if s.listener == nil {
		<-ctx.Done()
		return nil
	}
	return s.serve(ctx)
}

func (s *Service) close() {
	if s.listener != nil {
		_ = s.listener.Close()
	}
	if s.alerts != nil {
		s.alerts.close()
	}
	if s.records != nil {
		s.records.close()
	}
	if s.usage != nil {
		s.usage.close()
	}
	if s.ownKeys {
		s.keys.Close()
	}
}

// serve is the console as a service of its own: the keys service's part of the
// API is passed on to it.
func (s *Service) serve(ctx context.Context) error {
	mux := http.NewServeMux()
	server := api.New(mux, api.Options{Keys: s.keys, Log: s.log, Metrics: s.metrics, TrustedProxies: s.cfg.TrustedProxies})
	s.Register(server.API)
	s.Mount(mux, server, nil)
	var health api.Health
	health.Add("nats", s.Check)
	health.AddOptional("clickhouse", s.usage.check)
	api.Operate(mux, &health, s.metrics)

	web := &http.Server{
		Handler: s.proxy(server.Handler()), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- web.Serve(s.listener) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve the console: %w", err)
	case <-ctx.Done():
	}
	health.Drain()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := web.Shutdown(stop); err != nil {
		return web.Close()
	}
	return nil
}

// proxied are the paths that the keys service answers.
var proxied = []string{"/v1/orgs", "/v1/api-keys", "/v1/audit", "/v1/webhooks", "/v1/hygiene"}

// proxy passes on what the keys service answers, as it came: the caller's key
// is checked there. The console's own operations under /v1/api-keys stay here.
func (s *Service) proxy(own http.Handler) http.Handler {
	target, err := url.Parse(s.cfg.KeysURL)
	if err != nil || s.cfg.KeysURL == "" {
		return own
	}
	keys := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"]
			r.SetXForwarded()
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			s.log.Warn("the keys service does not answer", "error", err)
			api.Unavailable.New("The keys service does not answer just now.").Write(w, r)
		},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if passOn(r.URL.Path) {
			keys.ServeHTTP(w, r)
			return
		}
		own.ServeHTTP(w, r)
	})
}

func passOn(path string) bool {
	segments := splitPath(path)
	if len(segments) == 4 && segments[1] == "api-keys" && (segments[3] == "activity" || segments[3] == "baseline") {
		return false
	}
	return len(segments) >= 2 && slices.Contains(proxied, "/"+segments[0]+"/"+segments[1])
}
