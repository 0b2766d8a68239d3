package edge

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// metrics of an edge. The counters of the request path are looked up once: a
// label look-up costs more than the decision.
type metrics struct {
	decisions map[string]prometheus.Counter
	drops     map[string]*drop
	published prometheus.Counter
	retries   prometheus.Counter
	ingested  map[string]prometheus.Counter
	reloads   map[string]prometheus.Counter
	backlog   func() (events int, bytes int64)
	all       []prometheus.Collector
}

// drop counts one reason, and says at most once a second that it is worth a line
// in the log.
type drop struct {
	count prometheus.Counter
	said  atomic.Int64
}

const allowed = "allowed"

func newMetrics() *metrics {
	m := &metrics{
		decisions: map[string]prometheus.Counter{}, drops: map[string]*drop{},
		ingested: map[string]prometheus.Counter{}, reloads: map[string]prometheus.Counter{},
		backlog: func() (int, int64) { return 0, 0 },
	}
	vec := func(name, help, label string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "latchkey_edge_" + name, Help: help}, []string{label})
		m.all = append(m.all, v)
		return v
	}
	decisions := vec("decisions_total", "Requests decided, by the reason of the denial or \"allowed\".", "reason")
	for _, r := range []string{
		allowed, usage.DenyMissingKey, usage.DenyInvalidKey, usage.DenyExpiredKey, usage.DenyRevokedKey,
		usage.DenyInsufficientScope, usage.DenyIPNotAllowed, edge.Unavailable, reasonBadRequest,
	} {
		m.decisions[r] = decisions.WithLabelValues(r)
	}
	drops := vec("events_dropped_total", "Usage events that were lost, by reason.", "reason")
	for _, r := range dropReasons {
		m.drops[r] = &drop{count: drops.WithLabelValues(r)}
	}
	ingested := vec("ingested_events_total", "Events of POST /v1/usage, by result.", "result")
	for _, r := range []string{"accepted", "rejected", "not_stored"} {
		m.ingested[r] = ingested.WithLabelValues(r)
	}
	reloads := vec("policy_loads_total", "Loads of the policy file, by result.", "result")
	for _, r := range []string{"ok", "failed"} {
		m.reloads[r] = reloads.WithLabelValues(r)
	}
	m.published = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "latchkey_edge_events_published_total", Help: "Usage events of decisions that JetStream has stored.",
	})
	m.retries = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "latchkey_edge_publish_retries_total", Help: "Times that publishing began again because JetStream refused a frame, did not answer or was away.",
	})
	m.all = append(m.all, m.published, m.retries)
	return m
}

func (m *metrics) decided(reason string) {
	if reason == "" {
		reason = allowed
	}
	if c := m.decisions[reason]; c != nil {
		c.Inc()
	}
}

// dropped counts events and reports whether to log it.
func (m *metrics) dropped(reason string, events int) bool {
	d := m.drops[reason]
	d.count.Add(float64(events))
	now, last := time.Now().UnixNano(), d.said.Load()
	return now-last > int64(time.Second) && d.said.CompareAndSwap(last, now)
}

// counterValue is what a counter stands at.
func counterValue(c prometheus.Metric) float64 {
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		return 0
	}
	return m.GetCounter().GetValue()
}

// registerMetrics adds the metrics, and the gauges that ask the service.
func (s *Service) registerMetrics(reg *prometheus.Registry) error {
	if reg == nil {
		return nil
	}
	gauge := func(name, help string, f func() float64) {
		s.metrics.all = append(s.metrics.all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "latchkey_edge_" + name, Help: help}, f))
	}
	gauge("keys", "Keys in memory, whatever their status.", func() float64 { return float64(s.keys.Len()) })
	gauge("keys_age_seconds", "Time since the keys were last proven complete; -1 before the first load.", func() float64 {
		if s.keys.Synced().IsZero() {
			return -1
		}
		return s.edge.Stale(s.now()).Seconds()
	})
	gauge("keys_unreadable", "Key records that could not be read; their keys are refused.", func() float64 { return float64(s.keys.Stats().Bad) })
	gauge("spool_bytes", "Bytes of events that wait for JetStream, on disk or in memory.", func() float64 {
		_, bytes := s.metrics.backlog()
		return float64(bytes)
	})
	gauge("spool_events", "Events written down that JetStream has not acknowledged.", func() float64 {
		events, _ := s.metrics.backlog()
		return float64(events)
	})
	gauge("nats_connected", "1 while the connection to NATS is up.", func() float64 {
		if s.nc.IsConnected() {
			return 1
		}
		return 0
	})
	s.metrics.all = append(s.metrics.all, prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "latchkey_edge_denied_events_suppressed_total", Help: "Denied attempts beyond the limit of their source, which made no event.",
	}, func() float64 { return float64(s.edge.Suppressed()) }))
	var errs []error
	for _, c := range s.metrics.all {
		errs = append(errs, reg.Register(c))
	}
	return errors.Join(errs...)
}

func (s *Service) unregisterMetrics(reg *prometheus.Registry) {
	if reg == nil {
		return
	}
	for _, c := range s.metrics.all {
		reg.Unregister(c)
	}
}
