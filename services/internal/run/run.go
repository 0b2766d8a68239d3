package run

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/caarlos0/env/v11"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// EnvPrefix begins every variable that Latchkey reads.
const EnvPrefix = "LATCHKEY_"

// Environment is the process's environment with every LATCHKEY_X_FILE resolved
// to LATCHKEY_X, its value being the file's content without the last newline.
func Environment() (map[string]string, error) {
	vars := env.ToMap(os.Environ())
	var errs []error
	for name, path := range vars {
		target, isFile := strings.CutSuffix(name, "_FILE")
		if !isFile || !strings.HasPrefix(name, EnvPrefix) || path == "" {
			continue
		}
		if vars[target] != "" {
			errs = append(errs, fmt.Errorf("%s and %s are both set, use one", target, name))
			continue
		}
		content, err := os.ReadFile(path)
		if err != nil {
			errs = append(errs, fmt.Errorf("read %s: %w", name, err))
			continue
		}
		vars[target] = strings.TrimRight(string(content), "\r\n")
	}
	return vars, errors.Join(errs...)
}

// Load fills cfg from the environment, all errors at once. Tags name variables
// without the LATCHKEY_ prefix.
func Load(cfg any) error {
	vars, err := Environment()
	if err != nil {
		return err
	}
	return LoadFrom(cfg, vars)
}

// LoadFrom is [Load] from a given environment.
func LoadFrom(cfg any, vars map[string]string) error {
	if err := env.ParseWithOptions(cfg, env.Options{Prefix: EnvPrefix, Environment: vars}); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	if v, ok := cfg.(interface{ Validate() error }); ok {
		if err := v.Validate(); err != nil {
			return fmt.Errorf("check configuration: %w", err)
		}
	}
	return nil
}

// Common is the configuration that every service shares.
type Common struct {
	NATSURL   string `env:"NATS_URL" envDefault:"nats://127.0.0.1:4222"`
	NATSCreds string `env:"NATS_CREDS"`
	LogLevel  string `env:"LOG_LEVEL" envDefault:"info"`
	LogFormat string `env:"LOG_FORMAT" envDefault:"text"`
	// StartTimeout is how long a service waits for NATS when it starts.
	StartTimeout time.Duration `env:"START_TIMEOUT" envDefault:"60s"`
	Bus          bus.Config
}

// NewLogger writes to stderr in the configured level and format.
func NewLogger(cfg Common) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		return nil, fmt.Errorf("%sLOG_LEVEL: %w", EnvPrefix, err)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch cfg.LogFormat {
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
	}
	return nil, fmt.Errorf("%sLOG_FORMAT: %q is neither text nor json", EnvPrefix, cfg.LogFormat)
}

// NewRegistry has the Go and process collectors registered.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Runner is a service as New returns it.
type Runner interface{ Run(context.Context) error }

// Service loads the shared configuration, connects to NATS and runs what build
// makes until ctx is done. It is the whole of a service's command.
func Service(ctx context.Context, name string, build func(context.Context, Deps) (Runner, error)) error {
	var cfg Common
	if err := Load(&cfg); err != nil {
		return err
	}
	log, err := NewLogger(cfg)
	if err != nil {
		return err
	}
	log = log.With("component", name)
	nc, err := dial(ctx, cfg, name, log)
	if err != nil {
		return err
	}
	defer nc.Close()
	svc, err := build(ctx, Deps{NATS: nc, Log: log, Metrics: NewRegistry(), Bus: cfg.Bus})
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	return svc.Run(ctx)
}

// dial waits for NATS: in a cluster that starts, services often come first.
func dial(ctx context.Context, cfg Common, name string, log *slog.Logger) (*nats.Conn, error) {
	var opts []nats.Option
	if cfg.NATSCreds != "" {
		opts = append(opts, nats.UserCredentials(cfg.NATSCreds))
	}
	ctx, cancel := context.WithTimeout(ctx, cfg.StartTimeout)
	defer cancel()
	for {
		nc, err := bus.Connect(cfg.NATSURL, "latchkey-"+name, opts...)
		if err == nil {
			return nc, nil
		}
		log.Warn("NATS does not answer yet", "url", redact(cfg.NATSURL), "error", err)
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (set %sNATS_URL, or start everything with `latchkey up`)", err, EnvPrefix)
		case <-time.After(time.Second):
		}
	}
}

func redact(url string) string {
	if at := strings.LastIndex(url, "@"); at >= 0 {
		return "…" + url[at:]
	}
	return url
}
