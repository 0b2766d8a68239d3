// Package collector is the only writer to ClickHouse: it stores usage events,
// alerts, audit, key records and baselines, all of which come over JetStream,
// each exactly once.
package collector

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/collector/rows"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

// Config of the collector.
type Config struct {
	Store store.Config
	// BatchRows and BatchBytes (of messages) end a batch of a partition that is behind.
	BatchRows  int `env:"COLLECTOR_BATCH_ROWS" envDefault:"100000"`
	BatchBytes int `env:"COLLECTOR_BATCH_BYTES" envDefault:"16777216"`
	// FlushInterval is how long the first event of a batch waits for others.
	FlushInterval time.Duration `env:"COLLECTOR_FLUSH_INTERVAL" envDefault:"1s"`
	// InsertTimeout is after how long an insert is sent again, or a question asked
	// again; each further attempt has twice as long, up to 32 times.
	InsertTimeout time.Duration `env:"COLLECTOR_INSERT_TIMEOUT" envDefault:"20s"`
	// Inserters is how many inserts run at once.
	Inserters int `env:"COLLECTOR_INSERTERS" envDefault:"2"`
	// UsageTail is how many bytes of USAGE are kept though everyone has read them.
	UsageTail uint64 `env:"USAGE_TAIL_BYTES" envDefault:"536870912"`
	// Addr serves /metrics and health where the collector runs alone; empty serves nothing.
	Addr string `env:"COLLECTOR_ADDR"`
	// Migrate brings the schema up to date before anything is stored.
	Migrate bool `env:"COLLECTOR_MIGRATE" envDefault:"true"`
}

// Validate reports what cannot work.
func (c Config) Validate() error {
	var errs []error
	if c.BatchRows < 1 || c.BatchRows > 900_000 {
		errs = append(errs, fmt.Errorf("COLLECTOR_BATCH_ROWS %d is not between 1 and 900000: ClickHouse would split the block", c.BatchRows))
	}
	if c.BatchBytes < 1 || c.Inserters < 1 || c.FlushInterval <= 0 || c.InsertTimeout <= 0 {
		errs = append(errs, errors.New("COLLECTOR_BATCH_BYTES, COLLECTOR_INSERTERS, COLLECTOR_FLUSH_INTERVAL and COLLECTOR_INSERT_TIMEOUT must be more than 0"))
	}
	return errors.Join(errs...)
}

// Service is the collector.
type Service struct {
	cfg      Config
	log      *slog.Logger
	js       jetstream.JetStream
	nc       *nats.Conn
	store    *store.Store
	pool     *store.ConnPool
	large    chan *rows.Block
	intentKV jetstream.KeyValue
	usage    jetstream.Stream
	metrics  *metrics
	owner    string
	// stream names USAGE and its incarnation: sequences begin anew when a stream
	// is made anew, and must not be taken for the old ones.
	stream   string
	listener net.Listener
	registry *prometheus.Registry
}

// New makes a collector. ClickHouse may be away, JetStream may not.
func New(ctx context.Context, cfg Config, deps run.Deps) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	js, err := jetstream.New(deps.NATS)
	if err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	if err := bus.Ensure(ctx, js, deps.Bus); err != nil {
		return nil, err
	}
	usageStream, err := js.Stream(ctx, bus.Usage)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", bus.Usage, err)
	}
	kv, err := js.KeyValue(ctx, bus.Intents)
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bus.Intents, err)
	}
	partitions, err := bus.PartitionCount(ctx, js)
	if err != nil {
		return nil, err
	}
	st, err := store.OpenConfig(cfg.Store)
	if err != nil {
		return nil, err
	}
	c := &Service{
		cfg: cfg, log: deps.Log, js: js, nc: deps.NATS, store: st,
		pool: st.Pool(cfg.Inserters), large: make(chan *rows.Block, cfg.Inserters+1), intentKV: kv, usage: usageStream,
		metrics: newMetrics(deps.Metrics, partitions), owner: owner(),
		stream: bus.Usage + "@" + strconv.FormatInt(usageStream.CachedInfo().Created.UnixNano(), 36),
	}
	for range cap(c.large) {
		c.large <- rows.New()
	}
	if cfg.Addr != "" {
		c.registry = deps.Metrics
		if c.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", cfg.Addr); err != nil {
			return nil, fmt.Errorf("listen for metrics: %w", err)
		}
	}
	return c, nil
}

// Addr is where metrics and health are served, nil if nowhere.
func (c *Service) Addr() net.Addr {
	if c.listener == nil {
		return nil
	}
	return c.listener.Addr()
}

// serve answers /metrics and health where an address is configured. The
// collector is ready without ClickHouse: it waits for it, and loses nothing.
func (c *Service) serve(ctx context.Context) {
	if c.listener == nil {
		return
	}
	mux, health := http.NewServeMux(), new(api.Health)
	health.Add("nats", func(context.Context) error {
		if status := c.nc.Status(); status != nats.CONNECTED {
			return fmt.Errorf("connection is %s", status)
		}
		return nil
	})
	health.AddOptional("clickhouse", c.store.Ping)
	api.Operate(mux, health, c.registry)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(c.listener); !errors.Is(err, http.ErrServerClosed) {
		c.log.Error("serve metrics", "error", err)
	}
}

// owner tells people which process it is.
func owner() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return host + "/" + strconv.Itoa(os.Getpid())
}

// Run stores what comes until ctx is done. Then nothing more is fetched, inserts
// under way are ended and acknowledged, and the connections closed; what was
// fetched and not stored is fetched again by the next owner.
func (c *Service) Run(ctx context.Context) error {
	defer c.store.Close()
	defer c.pool.Close()
	var wg sync.WaitGroup
	wg.Go(func() { c.serve(ctx) })
	defer wg.Wait()
	if err := c.migrate(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	for _, s := range c.sinks() {
		wg.Go(func() { s.run(ctx) })
	}
	wg.Go(func() { c.trim(ctx) })
	opts := bus.Options{Log: c.log, Owned: c.metrics.owns}
	return bus.Partitions(ctx, c.js, bus.Collector, opts, c.own)
}

// migrate waits for ClickHouse for as long as it takes.
func (c *Service) migrate(ctx context.Context) error {
	if !c.cfg.Migrate {
		return nil
	}
	attempts := 0
	return untilDone(ctx, c.log, "migrate ClickHouse", func() {}, c.metrics.retries.Inc, func(ctx context.Context) error {
		attempts++
		ctx, cancel := context.WithTimeout(ctx, c.patience(attempts))
		defer cancel()
		applied, err := c.store.Migrate(ctx)
		for _, m := range applied {
			c.log.Info("migrated", "version", m.Version, "name", m.Name)
		}
		return err
	})
}

// trim makes room in USAGE every few seconds.
func (c *Service) trim(ctx context.Context) {
	t := time.NewTicker(5 * time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if _, err := bus.Trim(ctx, c.js, c.cfg.UsageTail); err != nil && ctx.Err() == nil {
				c.log.Warn("trim the usage stream", "error", err)
			}
		}
	}
}
