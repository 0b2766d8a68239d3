// Package detector watches how every key is used and raises an alert when a key
// behaves unlike itself. The judgement is package anomaly's; this one feeds it
// the partitions of USAGE in order, keeps what it learned, and publishes what it
// raises, so that a crash at any moment changes neither.
package detector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/baseline"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/geo"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// Config of the detector.
type Config struct {
	// Budget is the accepted number of false alerts per key and month; 0 is
	// anomaly.DefaultBudget, one per key and year.
	Budget float64 `env:"ALERT_BUDGET" envDefault:"0"`
	// SnapshotInterval is the least time between two snapshots of a partition. They
	// come further apart when they take long: a snapshot never takes more than a
	// tenth of the time.
	SnapshotInterval time.Duration `env:"DETECTOR_SNAPSHOT_INTERVAL" envDefault:"2s"`
	// BaselineInterval is the least time between two rows of one key for analysts.
	BaselineInterval time.Duration `env:"DETECTOR_BASELINE_INTERVAL" envDefault:"30s"`

	// ClickHouseURL is where events are read when baselines must be made anew; empty
	// for none. Nothing else of the detector needs ClickHouse.
	ClickHouseURL string `env:"CLICKHOUSE_URL"`

	// Addr serves /metrics, /-/healthy and /-/ready; empty for none.
	Addr string `env:"DETECTOR_ADDR"`

	geo.Config
}

// Validate reports everything that cannot be.
func (c Config) Validate() error {
	var errs []error
	if c.Budget < 0 || c.Budget > 1000 {
		errs = append(errs, fmt.Errorf("LATCHKEY_ALERT_BUDGET: %v false alerts per key and month is not from 0 to 1000", c.Budget))
	}
	if c.SnapshotInterval <= 0 || c.BaselineInterval <= 0 {
		errs = append(errs, errors.New("the detector's intervals must be positive"))
	}
	return errors.Join(errs...)
}

// Service is the detector.
type Service struct {
	cfg     Config
	log     *slog.Logger
	js      jetstream.JetStream
	writes  jetstream.JetStream // of profiles, so that they never hold up an alert
	states  jetstream.KeyValue
	locator *geo.Locator
	metrics *metrics

	// parents are the keys that keys were rotated from.
	parents sync.Map // child id → parent id
	mu      sync.Mutex
	// verdicts are those of owners, by alert id.
	verdicts map[string]verdict
	// budgets are what the settings of keys and organizations say.
	budgets *budgets
	// workers own the partitions that this process has at the moment.
	workers map[int]*worker
	// unread are the partitions whose baselines are to be rebuilt, repairs tells of new ones.
	unread  map[int]bool
	repairs chan struct{}
	ready   atomic.Bool

	health   api.Health
	listener net.Listener
	server   *http.Server
}

// New prepares the streams and opens the geo data; it competes for nothing yet.
func New(ctx context.Context, cfg Config, deps run.Deps) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	js, err := jetstream.New(deps.NATS, jetstream.WithPublishAsyncMaxPending(4096), jetstream.WithPublishAsyncTimeout(20*time.Second))
	if err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	writes, err := jetstream.New(deps.NATS, jetstream.WithPublishAsyncMaxPending(1<<14), jetstream.WithPublishAsyncTimeout(20*time.Second))
	if err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	if err := bus.Ensure(ctx, js, deps.Bus); err != nil {
		return nil, err
	}
	states, err := js.KeyValue(ctx, bus.Baselines)
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bus.Baselines, err)
	}
	locator, err := geo.Open(ctx, cfg.Config, deps.Log)
	if err != nil {
		return nil, err
	}
	s := &Service{
		cfg: cfg, log: deps.Log, js: js, writes: writes, states: states, locator: locator, metrics: newMetrics(deps.Metrics),
		verdicts: map[string]verdict{}, budgets: newBudgets(), workers: map[int]*worker{},
		unread: map[int]bool{}, repairs: make(chan struct{}, 1),
	}
	if err := s.listen(ctx, cfg.Addr, deps.Metrics); err != nil {
		return nil, errors.Join(err, locator.Close())
	}
	return s, nil
}

// Ready reports why the service should not be counted on yet: it is ready once it
// competes for partitions, whether it was given some or stands by.
func (s *Service) Ready(context.Context) error {
	if !s.ready.Load() {
		return errors.New("the detector has not read the keys and verdicts yet")
	}
	return nil
}

// Run owns partitions until ctx is done, writes down what it knows and gives them back.
func (s *Service) Run(ctx context.Context) error {
	defer func() { _ = s.locator.Close() }()
	defer s.serve()()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	if err := s.watchKeys(watching); err != nil {
		return err
	}
	if err := s.watch(watching, bus.Verdicts, s.hear); err != nil {
		return err
	}
	if err := s.watch(watching, bus.Orgs, s.hearOrg); err != nil {
		return err
	}
	s.ready.Store(true)
	context.AfterFunc(ctx, s.health.Drain)
	var aside sync.WaitGroup
	defer func() { stop(); aside.Wait() }()
	aside.Go(func() { s.sweep(watching) })
	aside.Go(func() { s.repair(watching) })
	return bus.Partitions(ctx, s.js, bus.Detector, bus.Options{Log: s.log}, s.own)
}

// sweepDelay is how long a start waits for partitions before it looks at idle ones.
const sweepDelay = 10 * time.Second

// sweep publishes the rows for analysts that a killed detector left unpublished
// on partitions which nobody owns, because nothing has come for them since.
func (s *Service) sweep(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(sweepDelay):
	}
	n, err := bus.PartitionCount(ctx, s.js)
	for p := 0; p < n && err == nil; p++ {
		s.mu.Lock()
		_, owned := s.workers[p]
		s.mu.Unlock()
		if !owned {
			err = s.publishStale(ctx, p)
		}
	}
	if err != nil && ctx.Err() == nil {
		s.log.Warn("rows of idle partitions were not looked at", "error", err)
	}
}

// publishStale publishes the rows of a partition that are behind its baselines.
func (s *Service) publishStale(ctx context.Context, partition int) error {
	st, err := s.readState(ctx, partition)
	if err != nil {
		return err
	}
	if _, err := st.overlay(); err != nil {
		return err
	}
	engine := s.newEngine()
	var rows []baseline.Row
	for _, token := range slices.Sorted(maps.Keys(st.values)) {
		p, state, err := decodeProfile(st.values[token].value)
		keyID := keyOfToken(token)
		if token == nameSources || err != nil || p.row >= p.sequence || engine.Decode(keyID, state) != nil {
			continue
		}
		if row, known := engine.Baseline(keyID); known {
			row.Partition, row.Sequence = partition, p.sequence
			rows = append(rows, row)
		}
		engine.Forget(keyID)
	}
	return s.publishRows(ctx, partition, rows)
}

func (s *Service) newEngine() *anomaly.Engine {
	opts := anomaly.Options{Budget: s.cfg.Budget, BudgetOf: s.budgets.of}
	if len(s.locator.Sources()) > 0 {
		opts.Locate = s.locator.Lookup
	}
	return anomaly.New(opts)
}

// watchKeys learns which key was rotated from which, and what false alerts it may cost. It returns once it knows
// what KEYS holds, and goes on until ctx is done.
func (s *Service) watchKeys(ctx context.Context) error {
	c, err := s.js.OrderedConsumer(ctx, bus.Keys, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverLastPerSubjectPolicy})
	if err != nil {
		return fmt.Errorf("watch keys: %w", err)
	}
	info, err := c.Info(ctx)
	if err != nil {
		return fmt.Errorf("watch keys: %w", err)
	}
	left, known := info.NumPending, make(chan struct{})
	if left == 0 {
		close(known)
	}
	consuming, err := c.Consume(func(m jetstream.Msg) {
		var change key.Change
		if err := json.Unmarshal(m.Data(), &change); err != nil {
			s.log.Warn("a key's record cannot be read", "subject", m.Subject(), "error", err)
		} else {
			s.heard(change.Record)
		}
		if left > 0 {
			if left--; left == 0 {
				close(known)
			}
		}
	})
	if err != nil {
		return fmt.Errorf("watch keys: %w", err)
	}
	context.AfterFunc(ctx, consuming.Stop)
	select {
	case <-known:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// heard notes what a key's record tells the detector.
func (s *Service) heard(r key.Record) {
	if r.ParentKeyID != "" {
		s.rotated(r.ID, r.ParentKeyID)
	}
	if s.budgets.setKey(r.ID, r.AlertBudget) {
		s.rebudget(r.ID)
	}
}

// rebudget has the budget of a key, or of every key for an empty id, asked for anew.
func (s *Service) rebudget(keyID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.workers {
		w.rebudget(keyID)
	}
}

// rotated notes which key a key was rotated from.
func (s *Service) rotated(child, parent string) {
	if known, loaded := s.parents.Swap(child, parent); loaded && known == parent {
		return // a later change of the same key
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.workers {
		w.tell("", child)
	}
}

// verdict is an owner's word on an alert, as bucket verdicts holds it.
type verdict struct {
	Verdict string    `json:"verdict"`
	Time    time.Time `json:"time"`
}

// watch is watchKeys for a bucket.
func (s *Service) watch(ctx context.Context, bucket string, hear func(jetstream.KeyValueEntry)) error {
	kv, err := s.js.KeyValue(ctx, bucket)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", bucket, err)
	}
	w, err := kv.WatchAll(ctx)
	if err != nil {
		return fmt.Errorf("watch bucket %s: %w", bucket, err)
	}
	known := make(chan struct{})
	go func() {
		for entry := range w.Updates() {
			if entry == nil {
				close(known)
				continue
			}
			hear(entry)
		}
	}()
	select {
	case <-known:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// hearOrg notes what false alerts an organization's keys may cost.
func (s *Service) hearOrg(entry jetstream.KeyValueEntry) {
	var org key.Org
	if entry.Operation() == jetstream.KeyValuePut {
		if err := json.Unmarshal(entry.Value(), &org); err != nil {
			s.log.Warn("an organization cannot be read", "org", entry.Key(), "error", err)
			return
		}
	}
	if s.budgets.setOrg(entry.Key(), org.AlertBudget) {
		s.rebudget("")
	}
}

// hear notes an owner's word.
func (s *Service) hear(entry jetstream.KeyValueEntry) {
	var v verdict
	if entry.Operation() == jetstream.KeyValuePut {
		if err := json.Unmarshal(entry.Value(), &v); err != nil {
			s.log.Warn("a verdict cannot be read", "alert", entry.Key(), "error", err)
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.Verdict == "" {
		delete(s.verdicts, entry.Key())
		return
	}
	s.verdicts[entry.Key()] = v
	for _, w := range s.workers {
		w.tell(entry.Key(), "")
	}
}

func (s *Service) verdictOf(alertID string) (verdict, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.verdicts[alertID]
	return v, ok
}

// deadLetter keeps what this service alone could not work on. What cannot be
// decoded at all is the collector's to report, which reads the same messages.
func (s *Service) deadLetter(ctx context.Context, m *bus.Message, reason string) {
	msg := nats.NewMsg(bus.DeadSubject(bus.Detector))
	msg.Data = m.Data
	for name, values := range m.Header {
		if !strings.HasPrefix(name, "Nats-") {
			msg.Header[name] = values
		}
	}
	msg.Header.Set("Latchkey-Reason", reason)
	msg.Header.Set("Latchkey-Subject", m.Subject)
	if _, err := s.js.PublishMsg(ctx, msg, jetstream.WithMsgID(fmt.Sprintf("detector:%d", m.Sequence))); err != nil {
		s.log.Error("a dead letter was not stored", "sequence", m.Sequence, "error", err)
	}
}
