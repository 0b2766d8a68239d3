// Package edge is the service that gateways ask whether a request's API key may
// do what it asks: forward-auth over HTTP, Envoy's ext_authz over gRPC, and the
// way in for usage events, POST /v1/usage. README.md says what it promises.
package edge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"

	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/pkg/usage"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// Service is one edge.
type Service struct {
	cfg     Config
	deps    run.Deps
	log     *slog.Logger
	nc      *nats.Conn
	js      jetstream.JetStream
	now     func() time.Time
	proxies []netip.Prefix

	keys    *edge.Keyset
	edge    *edge.Edge
	policy  atomic.Pointer[policy]
	outbox  *outbox
	live    *usage.Publisher // POST /v1/usage
	history *usage.Publisher // the same, for imports
	bodies  *semaphore.Weighted
	metrics *metrics
	health  *api.Health
	hinted  atomic.Bool

	policyText  []byte // as last judged, by the policy goroutine
	policySeen  []byte // as last looked at
	policyError atomic.Pointer[error]

	http     *http.Server
	listener net.Listener
	grpc     *grpc.Server
	grpcLis  net.Listener
}

// stopTimeout is how long each step of stopping may take.
const stopTimeout = 3 * time.Second

// New prepares an edge and listens, so that Addr is known and nobody is refused
// a connection. It needs NATS once, to learn how the streams are laid out.
func New(ctx context.Context, cfg Config, deps run.Deps) (_ *Service, err error) {
	s := &Service{
		cfg: cfg, deps: deps, log: deps.Log, nc: deps.NATS, now: cfg.Clock,
		keys: edge.NewKeyset(), metrics: newMetrics(), health: new(api.Health),
		bodies: semaphore.NewWeighted(max(cfg.MaxBodies, cfg.MaxBody)),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.cfg.Name == "" {
		s.cfg.Name = hostname()
	}
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := s.loadFirstPolicy(); err != nil {
		return nil, err
	}
	if s.js, err = jetstream.New(s.nc); err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	if err := bus.Ensure(ctx, s.js, deps.Bus); err != nil {
		return nil, err
	}
	var undo cleanups
	defer func() {
		if err != nil {
			undo.run()
		}
	}()
	if err := s.openPublishers(ctx, &undo); err != nil {
		return nil, err
	}
	if err := s.registerMetrics(deps.Metrics); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	undo.add(func() { s.unregisterMetrics(deps.Metrics) })
	if err := s.listen(ctx, &undo); err != nil {
		return nil, err
	}
	s.addChecks()
	return s, nil
}

// cleanups undo what New did before it failed, last in, first out.
type cleanups []func()

func (c *cleanups) add(f func()) { *c = append(*c, f) }

func (c *cleanups) run() {
	for i := len(*c) - 1; i >= 0; i-- {
		(*c)[i]()
	}
}

func (s *Service) openPublishers(ctx context.Context, undo *cleanups) error {
	proxies, hasher, err := s.cfg.read()
	if err != nil {
		return err
	}
	s.proxies = proxies
	for _, p := range []struct {
		pub  **usage.Publisher
		mode string
	}{{&s.live, ""}, {&s.history, "history"}} {
		pub, err := usage.New(ctx, s.nc, usage.Options{Mode: p.mode})
		if err != nil {
			return fmt.Errorf("open publisher: %w", err)
		}
		*p.pub = pub
		undo.add(func() { _ = pub.Close(ctx) })
	}
	opts := outboxOptions{
		queue: s.cfg.Queue, interval: s.cfg.FlushInterval, dir: s.cfg.Spool, maxBytes: s.cfg.SpoolMaxBytes,
		window: 512, timeout: 5 * time.Second,
	}
	if opts.dir == "" {
		opts.maxBytes = s.cfg.MemoryMaxBytes
	}
	if s.outbox, err = openOutbox(s.nc, s.live, opts, s.log, s.metrics); err != nil {
		return err
	}
	undo.add(func() {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		_ = s.outbox.close(ctx)
	})
	s.edge = edge.New(s.keys, edge.Options{
		Recorder: s.outbox, Hasher: hasher, Header: s.cfg.KeyHeader, TrustedProxies: proxies, Gateway: s.cfg.Name,
		Realm: s.cfg.Realm, FailClosedAfter: s.cfg.FailClosedAfter, Clock: s.now,
		Denials: edge.DenialLimit{PerSecond: s.cfg.DenialsPerSecond, Burst: s.cfg.DenialsBurst, Total: s.cfg.DenialsTotal},
	})
	return nil
}

func (s *Service) listen(ctx context.Context, undo *cleanups) (err error) {
	var lc net.ListenConfig
	if s.listener, err = lc.Listen(ctx, "tcp", s.cfg.Addr); err != nil {
		return fmt.Errorf("listen for forward-auth: %w", err)
	}
	undo.add(func() { _ = s.listener.Close() })
	s.http = &http.Server{
		Handler: s.Handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 128 << 10,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	if s.cfg.GRPCAddr == "" {
		return nil
	}
	if s.grpcLis, err = lc.Listen(ctx, "tcp", s.cfg.GRPCAddr); err != nil {
		return fmt.Errorf("listen for ext_authz: %w", err)
	}
	s.grpc = s.newGRPC()
	return nil
}

// Addr is where forward-auth and POST /v1/usage are served.
func (s *Service) Addr() string { return s.listener.Addr().String() }

// GRPCAddr is where Envoy's ext_authz is served, "" if it is not.
func (s *Service) GRPCAddr() string {
	if s.grpcLis == nil {
		return ""
	}
	return s.grpcLis.Addr().String()
}

// Loaded is closed once the edge has every key.
func (s *Service) Loaded() <-chan struct{} { return s.keys.Loaded() }

// Handler is everything that the edge serves over HTTP.
func (s *Service) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/usage", s.serveUsage)
	mux.HandleFunc("/v1/usage", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Allow", http.MethodPost)
		edge.WriteProblem(w, edge.Problem{Type: "about:blank", Title: "Method Not Allowed", Status: http.StatusMethodNotAllowed})
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		edge.WriteProblem(w, edge.Problem{Type: "about:blank", Title: "Not Found", Status: http.StatusNotFound, Instance: r.URL.Path})
	})
	api.Operate(mux, s.health, s.deps.Metrics)
	// The gateways' requests come by every method and are most of the traffic:
	// they do not go through the mux.
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/auth" {
			s.serveAuth(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func (s *Service) addChecks() {
	s.health.Add("keys", func(context.Context) error {
		if s.keys.Synced().IsZero() {
			return errors.New("the keys are not loaded yet")
		}
		if age := s.edge.Stale(s.now()); s.cfg.FailClosedAfter > 0 && age > s.cfg.FailClosedAfter {
			return fmt.Errorf("the keys are %s old, every request is refused", age.Round(time.Second))
		}
		return nil
	})
	s.health.AddOptional("keys_fresh", func(context.Context) error {
		if age := s.edge.Stale(s.now()); !s.keys.Synced().IsZero() && age > staleAfter {
			return fmt.Errorf("the keys were last proven complete %s ago, requests are decided by what is known", age.Round(time.Second))
		}
		return nil
	})
	s.health.AddOptional("nats", func(context.Context) error {
		if !s.nc.IsConnected() {
			events, bytes := s.metrics.backlog()
			return fmt.Errorf("NATS is away, %d events (%d bytes) wait for it", events, bytes)
		}
		return nil
	})
	s.health.AddOptional("policy", func(context.Context) error {
		if err := s.policyError.Load(); err != nil {
			return *err
		}
		return nil
	})
}

// staleAfter is when keys that are not proven fresh are worth a word.
const staleAfter = 10 * time.Second

// Run serves until ctx is done. Then it stops taking requests, writes down and
// publishes the events that it has, and stops reading keys, in this order.
func (s *Service) Run(ctx context.Context) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = s.keys.Watch(background, s.js, edge.WatchOptions{Log: s.log, Clock: s.now})
	})
	wg.Go(func() { s.watchPolicy(background) })
	failed := make(chan error, 2)
	wg.Go(func() { failed <- s.http.Serve(s.listener) })
	if s.grpc != nil {
		wg.Go(func() { failed <- s.grpc.Serve(s.grpcLis) })
	}
	s.log.Info("edge serves", "addr", s.Addr(), "grpc_addr", s.GRPCAddr(), "trusted_proxies", len(s.proxies), "policy", s.cfg.Policy, "spool", s.cfg.Spool)
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
		if errors.Is(err, http.ErrServerClosed) {
			err = nil
		}
	}
	err = errors.Join(err, s.stop())
	stop()
	wg.Wait()
	return err
}

func (s *Service) stop() error {
	s.health.Drain()
	step := func(name string, f func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		if err := f(ctx); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	var errs []error
	errs = append(errs, step("stop HTTP", func(ctx context.Context) error {
		if err := s.http.Shutdown(ctx); err != nil {
			return s.http.Close()
		}
		return nil
	}))
	if s.grpc != nil {
		s.stopGRPC()
	}
	errs = append(errs,
		step("close outbox", s.outbox.close),
		step("close publisher", s.live.Close),
		step("close publisher", s.history.Close))
	s.unregisterMetrics(s.deps.Metrics)
	return errors.Join(errs...)
}

// stopGRPC lets calls finish, which take no time, and then hangs up on those who
// keep their streams open.
func (s *Service) stopGRPC() {
	done := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Second):
		s.grpc.Stop()
		<-done
	}
}

func (s *Service) loadFirstPolicy() error {
	if s.cfg.Policy == "" {
		s.policy.Store(openPolicy())
		return nil
	}
	p, text, err := loadPolicy(s.cfg.Policy)
	if err != nil {
		return err
	}
	s.policyText, s.policySeen = text, text
	s.policy.Store(p)
	s.metrics.reloads["ok"].Inc()
	return nil
}

// watchPolicy takes a changed policy file into use, and keeps the old one if the
// new one is bad. It looks at the file's text, since a change of a mounted
// Kubernetes secret or an editor's rename would escape a watch on the file; at
// SIGHUP at once.
func (s *Service) watchPolicy(ctx context.Context) {
	if s.cfg.Policy == "" {
		return
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	tick := time.NewTicker(s.cfg.PolicyCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			s.reloadPolicy(true)
		case <-tick.C:
			s.reloadPolicy(false)
		}
	}
}

// reloadPolicy judges the file if it has changed. A text must have been the same
// at two looks, because an editor may be half way through writing it, and half a
// policy can be a valid one.
func (s *Service) reloadPolicy(always bool) {
	p, text, err := loadPolicy(s.cfg.Policy)
	settled := string(text) == string(s.policySeen)
	s.policySeen = text
	if !always && (!settled || string(text) == string(s.policyText) && (text != nil || s.policyText == nil)) {
		return
	}
	s.policyText = text
	if err != nil {
		s.metrics.reloads["failed"].Inc()
		kept := fmt.Errorf("the policy file is bad, the last good one stays in force: %w", err)
		s.policyError.Store(&kept)
		s.log.Error("reload policy, the last good one stays in force", "error", err)
		return
	}
	s.policy.Store(p)
	s.policyError.Store(nil)
	s.metrics.reloads["ok"].Inc()
	s.log.Info("policy reloaded", "rules", len(p.rules))
}
