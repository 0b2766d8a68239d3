// Package bus names the streams, subjects and buckets that the services share,
// and creates or updates them.
package bus

import (
	"context"
	"fmt"
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
	// Audit holds the changes of what is no key: audit.<kind>.<id>. Those of keys are KEYS itself.
	Audit = "AUDIT"
	// Notices holds what owners may want to hear of a key: notices.<org token>.<key token>, body key.Notice.
	Notices = "NOTICES"
	// Timers holds message schedules: timers.set.<kind>.<key id>, delivered to timers.due.<kind>.<key id>.
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
}

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

// Ensure creates the streams and buckets, or updates them to this version.
func Ensure(ctx context.Context, js jetstream.JetStream, cfg Config) error {
	transform := &jetstream.SubjectTransformConfig{
		Source:      usage.RawSubject + "*",
		Destination: fmt.Sprintf("%s{{partition(%d,1)}}", usage.PartitionSubject, cfg.Partitions),
	}
	streams := []jetstream.StreamConfig{
		{
			Name: Usage, Subjects: []string{usage.PartitionSubject + "*", usage.RawSubject + "*"}, SubjectTransform: transform,
			Discard: jetstream.DiscardNew, MaxBytes: 16 << 30, Duplicates: 2 * time.Minute,
			Metadata: map[string]string{"latchkey.partitions": fmt.Sprint(cfg.Partitions)},
		},
		{Name: Alerts, Subjects: []string{"alerts.>"}, Duplicates: 24 * time.Hour},
		{Name: Keys, Subjects: []string{"keys.*"}, AllowDirect: true, AllowAtomicPublish: true, DenyDelete: true},
		{Name: Audit, Subjects: []string{"audit.>"}, AllowDirect: true, DenyDelete: true},
		{Name: Notices, Subjects: []string{"notices.>"}, Duplicates: 24 * time.Hour, MaxAge: 30 * 24 * time.Hour},
		{Name: Timers, Subjects: []string{"timers.>"}, AllowMsgSchedules: true, AllowRollup: true, MaxMsgsPerSubject: 1},
		{Name: Dead, Subjects: []string{"dead.>"}, MaxAge: 30 * 24 * time.Hour},
	}
	for _, sc := range streams {
		sc.Storage, sc.Replicas = jetstream.FileStorage, cfg.Replicas
		if _, err := js.CreateOrUpdateStream(ctx, sc); err != nil {
			return fmt.Errorf("create stream %s: %w", sc.Name, err)
		}
	}
	for _, name := range []string{Orgs, Verdicts, Baselines, Webhooks, Deliveries} {
		_, err := js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: name, Storage: jetstream.FileStorage, Replicas: cfg.Replicas, Compression: name == Baselines,
		})
		if err != nil {
			return fmt.Errorf("create bucket %s: %w", name, err)
		}
	}
	return nil
}

// Connect dials NATS and never gives up reconnecting.
func Connect(url, name string, opts ...nats.Option) (*nats.Conn, error) {
	opts = append([]nats.Option{nats.Name(name), nats.MaxReconnects(-1), nats.ReconnectWait(250 * time.Millisecond)}, opts...)
	nc, err := nats.Connect(url, opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS at %s: %w", url, err)
	}
	return nc, nil
}
