package notifier

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
)

type metrics struct {
	registry *prometheus.Registry
	attempts *prometheus.CounterVec
	intents  *prometheus.CounterVec
	delay    *prometheus.HistogramVec
	skipped  prometheus.Counter
	dead     prometheus.Counter
}

func newMetrics(registry *prometheus.Registry) *metrics {
	if registry == nil {
		registry = prometheus.NewRegistry()
	}
	m := &metrics{
		registry: registry,
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_notifier_attempts_total", Help: "Attempts to deliver, by kind and outcome.",
		}, []string{"kind", "outcome"}),
		intents: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_notifier_deliveries_total", Help: "Deliveries recorded, by kind and first state.",
		}, []string{"kind", "state"}),
		delay: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "latchkey_notifier_delivery_seconds", Help: "From the record of a delivery to its acceptance.",
			Buckets: prometheus.ExponentialBuckets(0.005, 4, 10),
		}, []string{"kind"}),
		skipped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_notifier_historical_alerts_total", Help: "Alerts from imported history, which mail nobody.",
		}),
		dead: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_notifier_dead_letters_total", Help: "Messages that could not be read.",
		}),
	}
	for _, kind := range []string{delivery.Alert, delivery.Notice, delivery.Digest, delivery.Hook} {
		for _, outcome := range []string{"sent", "refused", "retry", "abandoned"} {
			m.attempts.WithLabelValues(kind, outcome)
		}
		for _, state := range []string{delivery.Pending, delivery.Held, delivery.Unaddressed} {
			m.intents.WithLabelValues(kind, state)
		}
		m.delay.WithLabelValues(kind)
	}
	registry.MustRegister(m.attempts, m.intents, m.delay, m.skipped, m.dead)
	return m
}

func (m *metrics) intent(d *delivery.Delivery) { m.intents.WithLabelValues(d.Kind, d.State).Inc() }

func (m *metrics) attempt(d *delivery.Delivery, result outcome) {
	label := "retry"
	switch {
	case result.sent:
		label = "sent"
		m.delay.WithLabelValues(d.Kind).Observe(d.SentAt.Sub(d.CreatedAt).Seconds())
	case result.refused:
		label = "refused"
	case d.State == delivery.Abandoned:
		label = "abandoned"
	}
	m.attempts.WithLabelValues(d.Kind, label).Inc()
}

// serve answers /metrics and health where an address is configured.
func (s *Service) serve(ctx context.Context) error {
	if s.listener == nil {
		<-ctx.Done()
		return nil
	}
	mux := http.NewServeMux()
	health := new(api.Health)
	health.Add("nats", func(context.Context) error {
		if status := s.js.Conn().Status(); status != nats.CONNECTED {
			return fmt.Errorf("connection is %s", status)
		}
		return nil
	})
	api.Operate(mux, health, s.metrics.registry)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
