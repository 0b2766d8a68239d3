package detector

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/schemas/alert"
)

type metrics struct {
	events     *prometheus.CounterVec
	refused    prometheus.Counter
	misplaced  prometheus.Counter
	alerts     *prometheus.CounterVec
	panics     prometheus.Counter
	partitions prometheus.Gauge
	keys       prometheus.Gauge
	latency    prometheus.Histogram
	snapshots  *prometheus.HistogramVec
	profiles   prometheus.Counter
	unread     prometheus.Gauge
	repairs    *prometheus.CounterVec
}

var triggers = []string{
	alert.NewIPRange, alert.VolumeSpike, alert.EndpointMix, alert.DormantKey, alert.KeyGuessing, alert.RevokedKey, alert.ScopeProbing,
}

func newMetrics(registry *prometheus.Registry) *metrics {
	m := &metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_detector_events_total", Help: "Events learned from, by mode: live or history.",
		}, []string{"mode"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_detector_refused_events_total", Help: "Events that could not be read or broke a rule.",
		}),
		misplaced: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_detector_misplaced_events_total", Help: "Events that came on another partition than their key's and were sent on.",
		}),
		alerts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_detector_alerts_total", Help: "New alerts by each of their triggers and by mode; one alert may have several triggers.",
		}, []string{"trigger", "mode"}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_detector_panics_total", Help: "Messages given up because they made the detector panic.",
		}),
		partitions: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "latchkey_detector_partitions", Help: "Partitions that this process owns.",
		}),
		keys: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "latchkey_detector_keys", Help: "Keys with a baseline in this process.",
		}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "latchkey_detector_alert_latency_seconds", Help: "From an event's storage in JetStream to that of its alert, live events only.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60},
		}),
		snapshots: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "latchkey_detector_snapshot_duration_seconds", Help: "Time to write down a snapshot of a partition, by outcome.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"outcome"}),
		profiles: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_detector_profiles_written_total", Help: "Baselines written to the bucket.",
		}),
		unread: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "latchkey_detector_unreadable_partitions", Help: "Partitions of this process whose baselines are of another version and wait to be rebuilt from ClickHouse.",
		}),
		repairs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_detector_rebuilds_total", Help: "Rebuilds of unreadable baselines, by outcome.",
		}, []string{"outcome"}),
	}
	for _, mode := range []string{modeLive, modeHistory} {
		m.events.WithLabelValues(mode)
		for _, t := range triggers {
			m.alerts.WithLabelValues(t, mode)
		}
	}
	for _, outcome := range []string{"ok", "error"} {
		m.snapshots.WithLabelValues(outcome)
		m.repairs.WithLabelValues(outcome)
	}
	if registry != nil {
		registry.MustRegister(m.events, m.refused, m.misplaced, m.alerts, m.panics, m.partitions, m.keys, m.latency, m.snapshots, m.profiles, m.unread, m.repairs)
	}
	return m
}

const (
	modeLive    = "live"
	modeHistory = "history"
)

func modeOf(history bool) string {
	if history {
		return modeHistory
	}
	return modeLive
}
