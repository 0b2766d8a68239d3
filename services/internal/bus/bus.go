// Package bus names the streams, subjects and buckets that the services share,
// and creates or updates them.
package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Streams.
const (
	Usage  = "USAGE"  // usage.v1.<partition>
	Alerts = "ALERTS" // alerts.<org token>.<key token>
	Keys   = "KEYS"   // keys.<key id>
	Dead   = "DEAD"   // dead.<service>
	// BaselineRows holds baselines in columns for analysts: baselines.<partition>, JSON rows.
	BaselineRows = "BASELINES"
	// Audit holds the changes of what is no key: audit.<kind>.<id>. Those of keys are KEYS itself.
	Audit = "AUDIT"
	// Notices holds what owners may want to hear of a key: notices.<org token>.<key token>, body key.Notice.
	Notices = "NOTICES"
	// Timers holds message schedules: timers.set.<key id>, delivered to timers.due.<key id>.
	Timers = "TIMERS"
)

// Key-value buckets.
const (
	Orgs      = "orgs"      // <org id>
	Verdicts  = "verdicts"  // <alert id>
	Baselines = "baselines" // <partition>.<key token>
	Webhooks  = "webhooks"  // <webhook id>
	// Deliveries is the notifier's outbox and its record of what became of every mail and webhook call.
	Deliveries = "deliveries" // alert.<alert id>, notice.<notice id>, owner.<address hash>, hook.<webhook id>.<event id>
	// Said notes what the keys service told owners, under the key's or alert's id.
	Said = "key_notices"
	// Intents holds what the collector is about to insert: <partition> → first-last.
	Intents = "collector"
)

// DefaultPartitions is how many partitions USAGE has unless told otherwise; the
// number is fixed when the stream is created.
const DefaultPartitions = 16

// Config says how the streams are laid out.
type Config struct {
	// Replicas of every stream: 1 embedded, 3 in a cluster.
	Replicas int `env:"NATS_REPLICAS" envDefault:"1"`
	// Partitions of USAGE; an existing stream keeps its own.
	Partitions int `env:"PARTITIONS" envDefault:"16"`
	// UsageMaxBytes is how large USAGE may grow before it refuses events.
	UsageMaxBytes int64 `env:"USAGE_MAX_BYTES" envDefault:"17179869184"`
}

// Services that consume USAGE, each partition by one replica at a time.
const (
	Collector = "collector"
	Detector  = "detector"
)

var usageServices = []string{Collector, Detector}

// BaselineSubject is where the detector publishes the baselines of a partition.
func BaselineSubject(partition int) string { return "baselines." + strconv.Itoa(partition) }

// DeadSubject is where a service puts what it cannot read.
func DeadSubject(service string) string { return "dead." + service }

// AlertSubject is where an alert of a key is published.
func AlertSubject(orgID, keyID string) string {
	return "alerts." + usage.SubjectToken(orgID) + "." + usage.SubjectToken(keyID)
}

// KeySubject is where the records of a key are published.
func KeySubject(keyID string) string { return "keys." + keyID }

// NoticeSubject is where a notice about a key is published.
func NoticeSubject(orgID, keyID string) string {
	return "notices." + usage.SubjectToken(orgID) + "." + usage.SubjectToken(keyID)
}

// Ensure creates the streams, buckets and the consumers of USAGE, or updates
// them to this version. It may be called by many at once and at every start.
//
// USAGE refuses when it is full (DiscardNew) instead of forgetting, and only
// what every service has consumed is trimmed ([Trim]), so full means that a
// consumer is behind. Its consumers are made here, together with it, so that
// nothing counts as consumed before a service has started for the first time.
func Ensure(ctx context.Context, js jetstream.JetStream, cfg Config) error {
	cfg = cfg.withDefaults()
	partitions, err := existingPartitions(ctx, js, cfg.Partitions)
	if err != nil {
		return err
	}
	cfg.Partitions = partitions
	for _, sc := range streams(cfg) {
		sc.Storage, sc.Replicas = jetstream.FileStorage, cfg.Replicas
		if err := ensureStream(ctx, js, sc); err != nil {
			return err
		}
	}
	for _, name := range []string{Orgs, Verdicts, Baselines, Webhooks, Intents, Deliveries, Said} {
		_, err := js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: name, Storage: jetstream.FileStorage, Replicas: cfg.Replicas, Compression: name == Baselines,
		})
		if err != nil {
			return fmt.Errorf("create bucket %s: %w", name, err)
		}
	}
	for _, service := range usageServices {
		for p := range cfg.Partitions {
			if err := ensureConsumer(ctx, js, Usage, partitionConsumer(service, p)); err != nil {
				return err
			}
		}
	}
	for stream, subject := range map[string]string{Alerts: "", Keys: "", Audit: "", BaselineRows: ""} {
		if err := ensureConsumer(ctx, js, stream, singleConsumer(Collector, subject)); err != nil {
			return err
		}
	}
	return nil
}

func (c Config) withDefaults() Config {
	if c.Replicas == 0 {
		c.Replicas = 1
	}
	if c.Partitions == 0 {
		c.Partitions = DefaultPartitions
	}
	if c.UsageMaxBytes == 0 {
		c.UsageMaxBytes = 16 << 30
	}
	return c
}

func streams(cfg Config) []jetstream.StreamConfig {
	transform := &jetstream.SubjectTransformConfig{
		Source:      usage.RawSubject + "*",
		Destination: fmt.Sprintf("%s{{partition(%d,1)}}", usage.PartitionSubject, cfg.Partitions),
	}
	return []jetstream.StreamConfig{
		{
			Name: Usage, Subjects: usageSubjects(cfg.Partitions), SubjectTransform: transform,
			Discard: jetstream.DiscardNew, MaxBytes: cfg.UsageMaxBytes, Duplicates: 2 * time.Minute, AllowDirect: true,
			Metadata: map[string]string{metaPartitions: strconv.Itoa(cfg.Partitions)},
		},
		{Name: Alerts, Subjects: []string{"alerts.>"}, Duplicates: 24 * time.Hour},
		{Name: Keys, Subjects: []string{"keys.*"}, AllowDirect: true, AllowAtomicPublish: true, DenyDelete: true},
		{Name: Audit, Subjects: []string{"audit.>"}, AllowDirect: true, DenyDelete: true},
		{Name: Notices, Subjects: []string{"notices.>"}, Duplicates: 24 * time.Hour, MaxAge: 30 * 24 * time.Hour},
		{Name: Timers, Subjects: []string{"timers.>"}, AllowMsgSchedules: true, AllowRollup: true, MaxMsgsPerSubject: 1},
		{Name: BaselineRows, Subjects: []string{"baselines.*"}, Duplicates: 2 * time.Minute, MaxAge: 30 * 24 * time.Hour},
		{Name: Dead, Subjects: []string{"dead.>"}, MaxAge: 30 * 24 * time.Hour, AllowDirect: true},
	}
}

// usageSubjects names each partition, so that a publisher who counts more of them
// is refused: nobody would read what it sends.
func usageSubjects(partitions int) []string {
	subjects := []string{usage.RawSubject + "*"}
	for p := range partitions {
		subjects = append(subjects, usage.Subject(p))
	}
	return subjects
}

// ensureStream leaves a stream alone that is as it should be: an update costs a
// write to disk, and a quorum in a cluster.
func ensureStream(ctx context.Context, js jetstream.JetStream, sc jetstream.StreamConfig) error {
	version := layout(sc)
	if s, err := js.Stream(ctx, sc.Name); err == nil {
		have := s.CachedInfo().Config
		if have.Metadata[metaLayout] == version {
			return nil
		}
		// What an operator chose stays.
		sc.Replicas = have.Replicas
	}
	if sc.Metadata == nil {
		sc.Metadata = map[string]string{}
	}
	sc.Metadata[metaLayout] = version
	if _, err := js.CreateOrUpdateStream(ctx, sc); err != nil {
		return fmt.Errorf("create stream %s: %w", sc.Name, err)
	}
	return nil
}

// layout tells one version of a stream's configuration from another.
func layout(sc jetstream.StreamConfig) string {
	sc.Replicas = 0
	text, err := json.Marshal(sc)
	if err != nil {
		return "unknown"
	}
	h := fnv.New64a()
	h.Write(text)
	return strconv.FormatUint(h.Sum64(), 36)
}

// existingPartitions is how many partitions USAGE was made with, or want if
// there is none yet: a key must keep its partition.
func existingPartitions(ctx context.Context, js jetstream.JetStream, want int) (int, error) {
	n, err := PartitionCount(ctx, js)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return want, nil
	}
	return n, err
}

// PartitionCount is how many partitions USAGE has.
func PartitionCount(ctx context.Context, js jetstream.JetStream) (int, error) {
	s, err := js.Stream(ctx, Usage)
	if err != nil {
		return 0, fmt.Errorf("look up stream %s: %w", Usage, err)
	}
	n, err := strconv.Atoi(s.CachedInfo().Config.Metadata[metaPartitions])
	if err != nil || n < 1 {
		return 0, fmt.Errorf("stream %s does not tell its partitions (metadata %s)", Usage, metaPartitions)
	}
	return n, nil
}

// Metadata of streams.
const (
	metaPartitions = "latchkey.partitions"
	metaLayout     = "latchkey.layout"
)

// Connect dials NATS and never gives up reconnecting.
func Connect(url, name string, opts ...nats.Option) (*nats.Conn, error) {
	opts = append([]nats.Option{
		nats.Name(name), nats.MaxReconnects(-1), nats.ReconnectWait(250 * time.Millisecond),
		// A connection that died without a word is noticed in half a minute, by default it takes four.
		nats.PingInterval(10 * time.Second), nats.MaxPingsOutstanding(2),
	}, opts...)
	nc, err := nats.Connect(url, opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS at %s: %w", url, err)
	}
	return nc, nil
}
