// Package keys is the service of keys and organizations: their life, their
// audit, and the notices that owners are sent about them.
package keys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// Config of the keys service.
type Config struct {
	// Addr is where the REST API listens; empty for none of its own, where
	// another service's listener carries it ([Service.Register]).
	Addr string `env:"KEYS_ADDR" envDefault:"127.0.0.1:8083"`
	// Prefix begins every new key.
	Prefix string `env:"KEY_PREFIX" envDefault:"lk"`
	// Peppers are hex, newest first; see apikey.Hasher. Every edge needs the same.
	Peppers []string `env:"KEY_PEPPERS"`
	// PlainHashes says that keys from before the first pepper are still about.
	PlainHashes bool `env:"KEY_PLAIN_HASHES" envDefault:"true"`
	// AdminKeyPath is where the first admin key is written, once; empty for none.
	AdminKeyPath string `env:"ADMIN_KEY_PATH"`
	// TrustedProxies may name the caller in X-Forwarded-For, for the audit and allowed_cidrs.
	TrustedProxies []netip.Prefix `env:"TRUSTED_PROXIES"`
	// ClickHouseURL is where last use and usage are asked for; empty: not known.
	ClickHouseURL string `env:"CLICKHOUSE_URL"`
}

// Validate reports everything that is wrong with the configuration.
func (c *Config) Validate() error {
	_, _, err := c.format()
	return err
}

func (c *Config) format() (apikey.Format, apikey.Hasher, error) {
	format, err := apikey.NewFormat(c.Prefix)
	if err != nil {
		err = fmt.Errorf("KEY_PREFIX: %w", err)
	}
	peppers, pepperErr := apikey.DecodePeppers(c.Peppers)
	hasher, hasherErr := apikey.NewHasher(peppers, c.PlainHashes)
	if pepperErr = errors.Join(pepperErr, hasherErr); pepperErr != nil {
		pepperErr = fmt.Errorf("KEY_PEPPERS: %w", pepperErr)
	}
	return format, hasher, errors.Join(err, pepperErr)
}

// Service holds the records of all keys in memory and writes changes to KEYS.
type Service struct {
	cfg    Config
	log    *slog.Logger
	nc     *nats.Conn
	js     jetstream.JetStream
	now    func() time.Time
	format apikey.Format
	hasher apikey.Hasher
	ids    *ids

	set      *api.Keyset
	store    *records
	orgs     *orgs
	webhooks jetstream.KeyValue
	// said is what owners were told already.
	said    jetstream.KeyValue
	facts   facts
	metrics metrics

	deps     run.Deps
	listener net.Listener
}

// New reads the keys and organizations, and listens if it has an address.
func New(ctx context.Context, cfg Config, deps run.Deps) (*Service, error) {
	return newService(ctx, cfg, deps, time.Now)
}

func newService(ctx context.Context, cfg Config, deps run.Deps, now func() time.Time) (_ *Service, err error) {
	s := &Service{cfg: cfg, log: deps.Log, nc: deps.NATS, now: now, ids: &ids{}, deps: deps}
	if s.format, s.hasher, err = cfg.format(); err != nil {
		return nil, err
	}
	if s.js, err = jetstream.New(deps.NATS); err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	if err := bus.Ensure(ctx, s.js, deps.Bus); err != nil {
		return nil, err
	}
	if cfg.AdminKeyPath != "" {
		if err := EnsureAdmin(ctx, deps.NATS, cfg, cfg.AdminKeyPath); err != nil {
			return nil, err
		}
	}
	stream, err := s.js.Stream(ctx, bus.Keys)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", bus.Keys, err)
	}
	if s.set, err = api.OpenKeyset(ctx, s.js, s.hasher, deps.Log); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	s.store = &records{nc: deps.NATS, js: s.js, stream: stream, set: s.set, ids: s.ids, now: now}
	if s.orgs, err = openOrgs(ctx, s.js, deps.Log); err != nil {
		return nil, err
	}
	if s.webhooks, err = s.js.KeyValue(ctx, bus.Webhooks); err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bus.Webhooks, err)
	}
	if s.said, err = s.js.KeyValue(ctx, bus.Said); err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bus.Said, err)
	}
	if s.facts, err = openFacts(ctx, cfg.ClickHouseURL); err != nil {
		return nil, err
	}
	s.metrics = newMetrics(deps.Metrics, s.set)
	if cfg.Addr != "" {
		if s.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", cfg.Addr); err != nil {
			return nil, fmt.Errorf("listen for the keys API: %w", err)
		}
	}
	return s, nil
}

// Keyset is the service's view of all keys, for the API server of whoever
// carries the service's operations.
func (s *Service) Keyset() *api.Keyset { return s.set }

// Addr is where the API listens, empty if nowhere.
func (s *Service) Addr() string {
	if s.listener == nil {
		return ""
	}
	return s.listener.Addr().String()
}

// Check reports whether the service can write, for /-/ready.
func (s *Service) Check(ctx context.Context) error {
	if _, err := s.store.stream.Info(ctx); err != nil {
		return fmt.Errorf("ask about stream %s: %w", bus.Keys, err)
	}
	return nil
}

// Run sends notices, rotates and suspends as policies say, and serves the API
// if the service has an address, until ctx is done.
func (s *Service) Run(ctx context.Context) error {
	group := run.NewGroup()
	group.OnStop("keys", func() error { s.close(); return nil })
	group.Go("notices", s.runNotices)
	group.Go("timers", s.runTimers)
	group.Go("reactions", s.runReactions)
	if s.listener != nil {
		group.Go("keys API", s.serve)
	}
	return group.Run(ctx)
}

func (s *Service) close() {
	if s.listener != nil {
		_ = s.listener.Close()
	}
	if s.orgs != nil {
		s.orgs.close()
	}
	if s.facts != nil {
		s.facts.close()
	}
	if s.set != nil {
		s.set.Close()
	}
}

// serve answers on the service's own listener.
func (s *Service) serve(ctx context.Context) error {
	mux := http.NewServeMux()
	server := api.New(mux, api.Options{
		Keys: s.set, Log: s.log, Now: s.now, Metrics: s.deps.Metrics, TrustedProxies: s.cfg.TrustedProxies,
	})
	s.Register(server.API)
	var health api.Health
	health.Add("nats", s.Check)
	health.AddOptional("clickhouse", s.facts.check)
	api.Operate(mux, &health, s.deps.Metrics)
	httpServer := &http.Server{
		Handler: server.Handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- httpServer.Serve(s.listener) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve the keys API: %w", err)
	case <-ctx.Done():
	}
	health.Drain()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	if err := httpServer.Shutdown(stop); err != nil {
		return fmt.Errorf("stop the keys API: %w", err)
	}
	return nil
}

// Register adds the service's operations to an API.
func (s *Service) Register(a huma.API) {
	s.registerOrgs(a)
	s.registerKeys(a)
	s.registerAudit(a)
	s.registerWebhooks(a)
	s.registerHygiene(a)
}

// operation is one call of the API.
func operation(method, path, id, tag, summary, scope string, status int) huma.Operation {
	return huma.Operation{
		OperationID: id, Method: method, Path: path, Tags: []string{tag}, Summary: summary, DefaultStatus: status,
		Security: api.Requires(scope), MaxBodyBytes: api.MaxBody,
		Errors: errorsOf(method, path),
	}
}

func errorsOf(method, path string) []int {
	codes := []int{401, 403, 422}
	if method != http.MethodGet {
		codes = append(codes, 400, 413)
	}
	if strings.Contains(path, "{id}") {
		codes = append(codes, 404)
		if method != http.MethodGet {
			codes = append(codes, 409)
		}
	}
	return codes
}
