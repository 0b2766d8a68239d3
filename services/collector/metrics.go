package collector

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

type metrics struct {
	events     *prometheus.CounterVec
	inserts    *prometheus.CounterVec
	insertTime prometheus.Histogram
	insertRows prometheus.Histogram
	batchTime  prometheus.Histogram
	retries    prometheus.Counter
	lagEvents  *prometheus.GaugeVec
	lagSeconds *prometheus.GaugeVec
	owned      *prometheus.GaugeVec
	lastInsert prometheus.Gauge
	sinkRows   *prometheus.CounterVec
}

// Results of an event.
const (
	resultStored    = "stored"
	resultDuplicate = "duplicate"
	resultDead      = "dead"
	resultRerouted  = "rerouted"
)

func newMetrics(reg prometheus.Registerer, partitions int) *metrics {
	m := &metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_collector_events_total", Help: "Usage events that were read, by what became of them.",
		}, []string{"result"}),
		inserts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_collector_inserts_total", Help: "Inserts of usage events into ClickHouse.",
		}, []string{"result"}),
		insertTime: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "latchkey_collector_insert_duration_seconds", Help: "How long an insert of usage events takes.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 14),
		}),
		insertRows: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "latchkey_collector_insert_rows", Help: "Rows of an insert of usage events.",
			Buckets: prometheus.ExponentialBuckets(1, 4, 10),
		}),
		batchTime: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "latchkey_collector_batch_duration_seconds", Help: "From the intent of a batch to its acknowledgment.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 14),
		}),
		retries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_collector_retries_total", Help: "Steps that failed and were tried again.",
		}),
		lagEvents: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "latchkey_collector_lag_events", Help: "Events of the partition that are not stored yet, estimated from the messages.",
		}, []string{"partition"}),
		lagSeconds: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "latchkey_collector_lag_seconds", Help: "Age of the oldest message of the partition that is not stored yet.",
		}, []string{"partition"}),
		owned: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "latchkey_collector_partition_owned", Help: "Whether this process owns the partition.",
		}, []string{"partition"}),
		lastInsert: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "latchkey_collector_last_insert_timestamp_seconds", Help: "When usage events were last stored.",
		}),
		sinkRows: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_collector_rows_total", Help: "Rows of the smaller tables that were stored.",
		}, []string{"table"}),
	}
	for _, r := range []string{resultStored, resultDuplicate, resultDead, resultRerouted} {
		m.events.WithLabelValues(r)
	}
	m.inserts.WithLabelValues("ok")
	m.inserts.WithLabelValues("error")
	for p := range partitions {
		m.owned.WithLabelValues(strconv.Itoa(p))
		m.lagEvents.WithLabelValues(strconv.Itoa(p))
		m.lagSeconds.WithLabelValues(strconv.Itoa(p))
	}
	for _, s := range sinkTables {
		m.sinkRows.WithLabelValues(s)
	}
	if reg != nil {
		reg.MustRegister(m.events, m.inserts, m.insertTime, m.insertRows, m.batchTime, m.retries,
			m.lagEvents, m.lagSeconds, m.owned, m.lastInsert, m.sinkRows)
	}
	return m
}

func (m *metrics) owns(partition int, owned bool) {
	v := 0.0
	if owned {
		v = 1
	}
	m.owned.WithLabelValues(strconv.Itoa(partition)).Set(v)
	if !owned {
		m.lag(partition, bus.Lag{})
	}
}

func (m *metrics) lag(partition int, lag bus.Lag) {
	label := strconv.Itoa(partition)
	m.lagEvents.WithLabelValues(label).Set(float64(lag.Events))
	m.lagSeconds.WithLabelValues(label).Set(lag.Age.Seconds())
}

func (m *metrics) insert(rows int, took time.Duration, err error) {
	if err != nil {
		m.inserts.WithLabelValues("error").Inc()
		return
	}
	m.inserts.WithLabelValues("ok").Inc()
	m.insertTime.Observe(took.Seconds())
	m.insertRows.Observe(float64(rows))
	m.lastInsert.SetToCurrentTime()
}

func (m *metrics) stored(b *batch, duplicates, rerouted int, took time.Duration) {
	m.events.WithLabelValues(resultStored).Add(float64(b.rows))
	m.events.WithLabelValues(resultDuplicate).Add(float64(duplicates))
	m.events.WithLabelValues(resultDead).Add(float64(len(b.dead)))
	m.events.WithLabelValues(resultRerouted).Add(float64(rerouted))
	m.batchTime.Observe(took.Seconds())
}
