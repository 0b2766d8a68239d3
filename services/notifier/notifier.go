// Package notifier tells owners: one mail an alert, mails of notices, and
// webhooks. What is to be told is recorded before it is tried, see outbox.go.
package notifier

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// stopGrace is how long attempts in flight may take once the service stops.
const stopGrace = 3 * time.Second

// Service is the notifier.
type Service struct {
	cfg      Config
	log      *slog.Logger
	js       jetstream.JetStream
	orgs     jetstream.KeyValue
	keys     jetstream.Stream
	mailer   *mailer
	render   *renderer
	outbox   *outbox
	hooks    *hooks
	metrics  *metrics
	listener net.Listener // nil if nothing is served
	now      func() time.Time
	window   time.Duration // in which MaxPerHour counts
}

// New prepares the notifier; nothing is sent before [Service.Run].
func New(ctx context.Context, cfg Config, deps run.Deps) (*Service, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	log := deps.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	mailer, err := newMailer(cfg)
	if err != nil {
		return nil, err
	}
	zone := time.Local // of a person's own machine, if it is one
	if cfg.TimeZone != "" {
		if zone, err = time.LoadLocation(cfg.TimeZone); err != nil {
			return nil, fmt.Errorf("read LATCHKEY_MAIL_TIMEZONE: %w", err)
		}
	}
	s := &Service{
		cfg: cfg, log: log, mailer: mailer, metrics: newMetrics(deps.Metrics),
		render: &renderer{consoleURL: cfg.ConsoleURL, zone: zone, mailer: mailer},
		now:    time.Now, window: time.Hour,
	}
	if err := s.openBus(ctx, deps); err != nil {
		return nil, err
	}
	if cfg.Addr != "" {
		if s.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", cfg.Addr); err != nil {
			return nil, fmt.Errorf("listen for metrics: %w", err)
		}
	}
	if mailer.server != nil {
		s.log.Info("mails go out", "server", mailer.server.addr(), "starttls", mailer.server.starttls, "implicit_tls", mailer.server.implicitTLS)
	}
	return s, nil
}

func (s *Service) openBus(ctx context.Context, deps run.Deps) (err error) {
	if s.js, err = jetstream.New(deps.NATS); err != nil {
		return fmt.Errorf("open JetStream: %w", err)
	}
	if err := bus.Ensure(ctx, s.js, busConfig(deps.Bus)); err != nil {
		return err
	}
	if s.orgs, err = s.js.KeyValue(ctx, bus.Orgs); err != nil {
		return fmt.Errorf("open bucket %s: %w", bus.Orgs, err)
	}
	deliveries, err := s.js.KeyValue(ctx, bus.Deliveries)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", bus.Deliveries, err)
	}
	if s.keys, err = s.js.Stream(ctx, bus.Keys); err != nil {
		return fmt.Errorf("open stream %s: %w", bus.Keys, err)
	}
	s.hooks = newHooks(s.cfg, s.log)
	s.outbox = &outbox{
		kv: deliveries, log: s.log, now: func() time.Time { return s.now() }, workers: 8,
		// Longer than an attempt can take, so that nobody else takes it for dead.
		lease:   max(s.cfg.Timeout, s.cfg.WebhookTimeout) * 3 / 2,
		backoff: s.backoff, give: s.cfg.RetryFor,
		attempt: s.attempt, done: s.attempted, closeWindow: s.closeWindow,
	}
	return nil
}

func busConfig(cfg bus.Config) bus.Config {
	if cfg.Replicas == 0 {
		cfg.Replicas = 1
	}
	if cfg.Partitions == 0 {
		cfg.Partitions = bus.DefaultPartitions
	}
	return cfg
}

// Addr is where metrics and health are served, nil if nowhere.
func (s *Service) Addr() net.Addr {
	if s.listener == nil {
		return nil
	}
	return s.listener.Addr()
}

// Run tells owners until ctx is done: then intake stops, attempts in flight
// end, and what is left is attempted by the next run.
func (s *Service) Run(ctx context.Context) error {
	hard, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stopHard := context.AfterFunc(ctx, func() { time.AfterFunc(stopGrace, cancel) })
	defer stopHard()

	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	parts := []func(context.Context) error{
		func(ctx context.Context) error { return s.outbox.run(ctx, hard) },
		s.watchHooks,
		func(ctx context.Context) error { return s.consume(ctx, bus.Alerts, s.takeAlert) },
		func(ctx context.Context) error { return s.consume(ctx, bus.Notices, s.takeNotice) },
		s.serve,
	}
	results := make(chan error, len(parts))
	for _, part := range parts {
		go func() {
			err := part(ctx)
			if err != nil {
				stop(err) // one part's end is everybody's
			}
			results <- err
		}()
	}
	var errs []error
	for range parts {
		if err := <-results; err != nil && !errors.Is(err, context.Canceled) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// backoff doubles from RetryMin to RetryMax, with a fifth of chance, so that
// what failed together does not come back together.
func (s *Service) backoff(attempt int) time.Duration {
	pause := s.cfg.RetryMin
	for i := 1; i < attempt && pause < s.cfg.RetryMax; i++ {
		pause *= 2
	}
	pause = min(pause, s.cfg.RetryMax)
	return pause - time.Duration(rand.Int64N(int64(pause)/5+1)) //nolint:gosec // no secret
}

// attempt makes one attempt at a claimed delivery.
func (s *Service) attempt(ctx context.Context, d *delivery.Delivery) outcome {
	if d.Kind == delivery.Hook {
		return s.callHook(ctx, d)
	}
	l, err := s.compose(ctx, d)
	if err != nil {
		return outcome{answer: err.Error()}
	}
	return s.mailer.send(ctx, l)
}

// compose makes the mail of a delivery from its payload and from what is now
// known of the key.
func (s *Service) compose(ctx context.Context, d *delivery.Delivery) (*letter, error) {
	if d.Kind == delivery.Digest {
		var g digest
		if err := json.Unmarshal(d.Payload, &g); err != nil {
			return nil, fmt.Errorf("decode digest: %w", err)
		}
		return s.render.digestLetter(&g, d.To, d.CreatedAt)
	}
	org, err := s.org(ctx, d.OrgID)
	if err != nil {
		return nil, err
	}
	rec, err := s.record(ctx, d.OrgID, d.KeyID)
	if err != nil {
		return nil, err
	}
	if d.Kind == delivery.Notice {
		var n key.Notice
		if err := json.Unmarshal(d.Payload, &n); err != nil {
			return nil, fmt.Errorf("decode notice: %w", err)
		}
		return s.render.noticeLetter(&n, org, rec, d.To, d.CreatedAt)
	}
	var a alert.Alert
	if err := json.Unmarshal(d.Payload, &a); err != nil {
		return nil, fmt.Errorf("decode alert: %w", err)
	}
	return s.render.alertLetter(&a, org, rec, d.To, d.CreatedAt)
}

// attempted tells the log and the metrics of an attempt's end.
func (s *Service) attempted(d *delivery.Delivery, result outcome) {
	s.metrics.attempt(d, result)
	attrs := []any{"kind", d.Kind, "id", d.ID, "attempt", d.Attempts, "answer", d.Answer}
	switch d.State {
	case delivery.Sent:
		s.log.Info("delivered", attrs...)
	case delivery.Pending:
		s.log.Warn("not delivered yet", append(attrs, "next_attempt", d.NextAttemptAt)...)
	default:
		s.log.Error("not delivered", append(attrs, "state", d.State)...)
	}
}

// org is nil where Latchkey does not know the organization.
func (s *Service) org(ctx context.Context, id string) (*key.Org, error) {
	entry, err := s.orgs.Get(ctx, id)
	if errors.Is(err, jetstream.ErrKeyNotFound) || errors.Is(err, jetstream.ErrInvalidKey) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read organization: %w", err)
	}
	var org key.Org
	if err := json.Unmarshal(entry.Value(), &org); err != nil {
		return nil, fmt.Errorf("decode organization: %w", err)
	}
	return &org, nil
}

// record is nil where Latchkey does not manage the key, or where the key is
// another organization's: an event says whose key it is, and nobody is to read
// of a stranger's key by sending events that name it.
func (s *Service) record(ctx context.Context, orgID, keyID string) (*key.Record, error) {
	msg, err := s.keys.GetLastMsgForSubject(ctx, bus.KeySubject(keyID))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read key record: %w", err)
	}
	var change key.Change
	if err := json.Unmarshal(msg.Data, &change); err != nil {
		return nil, fmt.Errorf("decode key record: %w", err)
	}
	if change.Record.OrgID != orgID {
		return nil, nil
	}
	return &change.Record, nil
}
