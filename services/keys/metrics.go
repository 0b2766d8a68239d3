package keys

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/internal/api"
)

type metrics struct {
	changes *prometheus.CounterVec
	notices *prometheus.CounterVec
}

func newMetrics(reg *prometheus.Registry, set *api.Keyset) metrics {
	m := metrics{
		changes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "latchkey_policy_actions_total", Help: "Keys that a policy rotated or suspended, by action and cause."}, []string{"action", "cause"}),
		notices: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "latchkey_key_notices_total", Help: "Notices about keys, by type."}, []string{"type"}),
	}
	for _, action := range []string{"rotate", "suspend"} {
		m.changes.WithLabelValues(action, "alert")
	}
	m.changes.WithLabelValues("rotate", "schedule")
	if reg != nil {
		reg.MustRegister(m.changes, m.notices, prometheus.NewGaugeFunc(
			prometheus.GaugeOpts{Name: "latchkey_keys", Help: "Keys known, whatever their status."},
			func() float64 { return float64(set.Len()) }))
	}
	return m
}
