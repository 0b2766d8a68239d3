package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/services/collector"
	"github.com/latchkey-dev/latchkey/services/console"
	"github.com/latchkey-dev/latchkey/services/detector"
	"github.com/latchkey-dev/latchkey/services/edge"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/demo"
	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/mailbox"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
	"github.com/latchkey-dev/latchkey/services/keys"
	"github.com/latchkey-dev/latchkey/services/notifier"
)

// stack is everything that `up` runs, in the order in which it was started.
type stack struct {
	opts  upOptions
	out   io.Writer
	log   *slog.Logger
	group *run.Group
	// vars is the environment that the services read their configuration from:
	// the process's own, with the addresses of what is embedded put in.
	vars map[string]string
	// addrs is what addresses.json will say.
	addrs map[string]string

	deps    run.Deps
	js      jetstream.JetStream
	mailbox *mailbox.Mailbox
}

// stopLimit is how long stopping may take altogether.
const stopLimit = 4500 * time.Millisecond

// start brings up the servers, then the services from right to left: what reads
// is there before what writes.
func (s *stack) start(ctx context.Context) error {
	vars, err := run.Environment()
	if err != nil {
		return err
	}
	s.vars = vars
	_ = os.Remove(s.path(addressesName)) // of a process that was killed
	for _, step := range []func(context.Context) error{
		s.startNATS, s.startClickHouse, s.startMailbox, s.startServices,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return writeAddresses(s.opts.data, s.addrs)
}

func (s *stack) path(name string) string { return filepath.Join(s.opts.data, name) }

func (s *stack) addr(name string) string { return *s.opts.addrs[name] }

// set is what a service finds in its environment, unless a person set it.
func (s *stack) set(name, value string) {
	if s.vars[run.EnvPrefix+name] == "" {
		s.vars[run.EnvPrefix+name] = value
	}
}

// force is [stack.set] over what a person set: flags were merged with it already.
func (s *stack) force(name, value string) { s.vars[run.EnvPrefix+name] = value }

func (s *stack) startNATS(ctx context.Context) error {
	var cfg run.Common
	if err := run.LoadFrom(&cfg, s.vars); err != nil {
		return err
	}
	var connect func(...nats.Option) (*nats.Conn, error)
	if s.vars["LATCHKEY_NATS_URL"] != "" {
		connect = func(opts ...nats.Option) (*nats.Conn, error) { return bus.Connect(cfg.NATSURL, "latchkey-up", opts...) }
	} else {
		sync, err := natsd.ParseSync(s.vars["LATCHKEY_NATS_SYNC"])
		if err != nil {
			return err
		}
		server, err := natsd.Start(ctx, natsd.Options{DataDir: s.path("nats"), Addr: s.addr("nats"), Sync: sync, Log: s.log})
		if err != nil {
			return err
		}
		s.group.OnStop("NATS", func() error { server.Shutdown(); return nil })
		s.addrs["nats"] = server.Addr()
		connect = func(opts ...nats.Option) (*nats.Conn, error) { return server.Connect("latchkey-up", opts...) }
	}
	nc, err := connect()
	if err != nil {
		return err
	}
	s.group.OnStop("NATS connection", func() error { nc.Close(); return nil })
	s.deps = run.Deps{NATS: nc, Log: s.log, Metrics: run.NewRegistry(), Bus: cfg.Bus}
	if s.js, err = jetstream.New(nc); err != nil {
		return fmt.Errorf("open JetStream: %w", err)
	}
	return bus.Ensure(ctx, s.js, cfg.Bus)
}

func (s *stack) startClickHouse(ctx context.Context) error {
	tries := 1
	if s.vars["LATCHKEY_CLICKHOUSE_URL"] == "" {
		tries = 5 // an engine that died meanwhile is started again
		s.force("CLICKHOUSE_ADDR", s.addr("clickhouse"))
		s.force("CLICKHOUSE_HTTP_ADDR", s.addr("clickhouse_http"))
		var cfg engine.Config
		if err := run.LoadFrom(&cfg, s.vars); err != nil {
			return err
		}
		cfg.DataDir, cfg.Log = s.path("clickhouse"), s.log
		e, err := engine.Start(ctx, cfg)
		if err != nil {
			return err
		}
		s.group.OnStop("ClickHouse", e.Close)
		s.addrs["clickhouse"], s.addrs["clickhouse_http"] = e.NativeAddr(), e.HTTPAddr()
		s.set("CLICKHOUSE_URL", e.URL(store.DefaultDatabase))
	}
	var cfg store.Config
	if err := run.LoadFrom(&cfg, s.vars); err != nil {
		return err
	}
	db, err := store.OpenConfig(cfg)
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	for {
		_, err := db.Migrate(ctx)
		if err == nil {
			return nil
		}
		if tries--; tries == 0 || ctx.Err() != nil {
			return fmt.Errorf("migrate ClickHouse: %w", err)
		}
		s.log.Warn("migrating ClickHouse again", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// startMailbox takes the owners' mail where no mail server is configured.
func (s *stack) startMailbox(ctx context.Context) error {
	if s.vars["LATCHKEY_SMTP_URL"] != "" {
		return nil
	}
	m, err := mailbox.New(ctx, mailbox.Config{Dir: s.path("mailbox"), Addr: s.addr("smtp")}, s.named("mailbox"))
	if err != nil {
		return err
	}
	s.group.Go("mailbox", m.Run)
	s.mailbox = m
	s.addrs["smtp"] = m.Addr().String()
	s.set("SMTP_URL", m.SMTPURL())
	return nil
}

// named is what a service of that name is given.
func (s *stack) named(component string) run.Deps {
	deps := s.deps
	deps.Log = s.log.With("component", component)
	return deps
}

// startServices starts the notifier first and the edge last, so that stopping,
// which goes the other way, ends the intake before what takes it.
func (s *stack) startServices(ctx context.Context) error {
	// The console's address is written into mails, so it must be known before
	// the notifier starts: its listener comes first.
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", s.addr("console"))
	if err != nil {
		return fmt.Errorf("listen for the console: %w (move it with --console-addr)", err)
	}
	s.addrs["console"] = listener.Addr().String()
	s.set("CONSOLE_URL", httpURL(s.addrs["console"]))
	s.set("ADMIN_KEY_PATH", s.path("admin.key"))
	s.set("EDGE_SPOOL", s.path("spool"))
	s.force("EDGE_ADDR", s.addr("edge"))
	s.force("EDGE_GRPC_ADDR", s.addr("edge_grpc"))
	if s.opts.demo {
		if err := s.prepareDemo(); err != nil {
			return errors.Join(err, listener.Close())
		}
	}

	if _, err := startService(ctx, s, "notifier", notifier.New); err != nil {
		return errors.Join(err, listener.Close())
	}
	if _, err := startService(ctx, s, "collector", collector.New); err != nil {
		return errors.Join(err, listener.Close())
	}
	s.fetchGeo(ctx)
	if _, err := startService(ctx, s, "detector", detector.New); err != nil {
		return errors.Join(err, listener.Close())
	}
	k, err := startService(ctx, s, "keys", func(ctx context.Context, cfg keys.Config, deps run.Deps) (*keys.Service, error) {
		cfg.Addr = "" // the console's listener carries its API
		return keys.New(ctx, cfg, deps)
	})
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	if err := s.startConsole(ctx, listener, k); err != nil {
		return err
	}
	e, err := startService(ctx, s, "edge", edge.New)
	if err != nil {
		return err
	}
	s.addrs["edge"], s.addrs["edge_grpc"] = e.Addr(), e.GRPCAddr()
	return nil
}

// startService reads a service's configuration, builds it and runs it.
func startService[C any, S run.Runner](ctx context.Context, s *stack, name string, build func(context.Context, C, run.Deps) (S, error)) (S, error) {
	var (
		cfg  C
		none S
	)
	if err := run.LoadFrom(&cfg, s.vars); err != nil {
		return none, fmt.Errorf("%s: %w", name, err)
	}
	service, err := build(ctx, cfg, s.named(name))
	if err != nil {
		return none, fmt.Errorf("start %s: %w", name, err)
	}
	s.group.Go(name, service.Run)
	return service, nil
}

// ready says where everything is.
func (s *stack) ready(began time.Time) {
	fmt.Fprintf(s.out, "Latchkey is up (%.1f s).\n\n", time.Since(began).Seconds())
	console, edge := httpURL(s.addrs["console"]), httpURL(s.addrs["edge"])
	rows := [][2]string{
		{"Console", console},
		{"API", console + "/docs"},
		{"Edge", edge + "/auth, " + edge + "/v1/usage"},
	}
	if s.mailbox != nil {
		rows = append(rows, [2]string{"Mailbox", console + "/mailbox"})
	}
	if a := s.addrs["nats"]; a != "" {
		rows = append(rows, [2]string{"NATS", "nats://" + a})
	}
	if a := s.addrs["clickhouse"]; a != "" {
		rows = append(rows, [2]string{"ClickHouse", "clickhouse://" + a + ", " + httpURL(s.addrs["clickhouse_http"])})
	}
	rows = append(rows, [2]string{"Admin key", "in " + s.path("admin.key")}, [2]string{"Log", s.path(logName)})
	for _, r := range rows {
		fmt.Fprintf(s.out, "  %-11s%s\n", r[0], r[1])
	}
	if !s.opts.demo {
		fmt.Fprintf(s.out, "\nCtrl-C ends it; the data stays in %s.\n", s.opts.data)
	}
}

// stop stops everything in reverse order, and gives up after stopLimit: what is
// killed then loses nothing, it only starts a little slower.
func (s *stack) stop() error {
	_ = os.Remove(s.path(addressesName))
	done := make(chan error, 1)
	go func() { done <- s.group.Stop() }()
	select {
	case err := <-done:
		if err != nil {
			s.log.Error("stopped with errors", "error", err)
		}
		return err
	case <-time.After(stopLimit):
		return fmt.Errorf("not everything stopped within %s (the log is in %s)", stopLimit, s.path(logName))
	}
}

// prepareDemo writes the policy by which the edge knows the demo's routes, and
// lets the demo speak for its clients' addresses.
func (s *stack) prepareDemo() error {
	path := s.path("demo-policy.yaml")
	if err := os.WriteFile(path, []byte(demo.Policy()), 0o600); err != nil {
		return fmt.Errorf("write the demo's policy: %w", err)
	}
	s.set("EDGE_POLICY", path)
	s.set("EDGE_TRUSTED_PROXIES", "127.0.0.1/32,::1/128")
	s.set("EDGE_NAME", "demo-edge")
	return nil
}

// demo runs the demo until ctx is done, a part of the stack fails, or a check
// knows its outcome.
func (s *stack) demo(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- demo.Run(ctx, demo.Config{
			Dir: s.opts.data, EdgeURL: httpURL(s.addrs["edge"]), ConsoleURL: httpURL(s.addrs["console"]),
			JetStream: s.js, Mails: s.mailbox, Out: s.out, Log: s.log, Check: s.opts.check,
		})
	}()
	failed := make(chan error, 1)
	go func() { failed <- s.group.Wait(ctx) }()
	select {
	case err := <-done:
		if ctx.Err() != nil {
			return nil
		}
		return err
	case err := <-failed:
		cancel()
		return errors.Join(err, <-done)
	}
}

// startConsole serves the console, the REST API of all services and the mailbox
// on one listener.
func (s *stack) startConsole(ctx context.Context, listener net.Listener, k *keys.Service) error {
	c, err := startService(ctx, s, "console", func(ctx context.Context, cfg console.Config, deps run.Deps) (*console.Service, error) {
		cfg.Addr = ""
		return console.NewWithKeys(ctx, cfg, deps, k.Keyset())
	})
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	mux := http.NewServeMux()
	server := api.New(mux, api.Options{Keys: k.Keyset(), Log: s.log.With("component", "api"), Metrics: s.deps.Metrics, Version: version})
	k.Register(server.API)
	c.Register(server.API)
	c.Mount(mux, server, s.mailbox)
	var health api.Health
	health.Add("nats", k.Check)
	health.AddOptional("console", c.Check)
	api.Operate(mux, &health, s.deps.Metrics)
	s.group.Go("console and API", func(ctx context.Context) error { return serveHTTP(ctx, listener, server.Handler(), s.log) })
	return nil
}

// serveHTTP serves until ctx is done, then lets running requests end.
func serveHTTP(ctx context.Context, listener net.Listener, handler http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve the console: %w", err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := server.Shutdown(stop); err != nil {
		return server.Close() // a page that is followed live
	}
	return nil
}
