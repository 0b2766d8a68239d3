package console

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

const (
	// maxAlerts is how many of the newest alerts the console holds; all others
	// are in ClickHouse.
	maxAlerts = 20_000
	// maxRevisions is how many steps of an episode are shown.
	maxRevisions = 20
)

// verdict is an owner's word on an alert, the value in bucket bus.Verdicts.
type verdict struct {
	Verdict   string     `json:"verdict"`
	Actor     string     `json:"actor"`
	Time      time.Time  `json:"time"`
	ExpiresAt *time.Time `json:"expires_at,omitempty"`
}

// episode is an alert with the steps in which it grew.
type episode struct {
	alert.Alert
	Revisions []alert.Alert // oldest first, the last is the alert itself
	Verdict   *verdict
}

// alertIndex holds the newest alerts in memory, straight from the ALERTS
// stream: an alert is on the page the moment it is raised, and also while
// ClickHouse is away.
type alertIndex struct {
	log *slog.Logger

	mu       sync.RWMutex
	byID     map[string]*episode
	order    []*episode // oldest first, by time and id
	verdicts map[string]verdict

	consume jetstream.ConsumeContext
	watcher jetstream.KeyWatcher
}

func openAlerts(ctx context.Context, js jetstream.JetStream, log *slog.Logger) (*alertIndex, error) {
	x := &alertIndex{log: log, byID: map[string]*episode{}, verdicts: map[string]verdict{}}
	stream, err := js.Stream(ctx, bus.Alerts)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", bus.Alerts, err)
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask about stream %s: %w", bus.Alerts, err)
	}
	cfg := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy}
	if info.State.LastSeq > 2*maxAlerts { // room for revisions
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, info.State.LastSeq-2*maxAlerts
	}
	consumer, err := stream.OrderedConsumer(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("read stream %s: %w", bus.Alerts, err)
	}
	x.consume, err = consumer.Consume(func(m jetstream.Msg) { x.receive(m.Data()) }, interrupted(log, bus.Alerts))
	if err != nil {
		return nil, fmt.Errorf("read stream %s: %w", bus.Alerts, err)
	}
	if err := x.watchVerdicts(js); err != nil {
		x.close()
		return nil, err
	}
	return x, nil
}

func interrupted(log *slog.Logger, stream string) jetstream.PullConsumeOpt {
	return jetstream.ConsumeErrHandler(func(_ jetstream.ConsumeContext, err error) {
		log.Warn("reading a stream was interrupted, it goes on by itself", "stream", stream, "error", err)
	})
}

func (x *alertIndex) watchVerdicts(js jetstream.JetStream) error {
	// The watch lives as long as the index; close ends it.
	kv, err := js.KeyValue(context.Background(), bus.Verdicts)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", bus.Verdicts, err)
	}
	if x.watcher, err = kv.WatchAll(context.Background()); err != nil {
		return fmt.Errorf("watch bucket %s: %w", bus.Verdicts, err)
	}
	go func() {
		for entry := range x.watcher.Updates() {
			if entry == nil {
				continue
			}
			var v verdict
			if entry.Operation() == jetstream.KeyValuePut {
				if err := json.Unmarshal(entry.Value(), &v); err != nil {
					x.log.Warn("a verdict cannot be read", "alert", entry.Key(), "error", err)
					continue
				}
			}
			x.setVerdict(entry.Key(), v)
		}
	}()
	return nil
}

func (x *alertIndex) close() {
	if x.consume != nil {
		x.consume.Stop()
	}
	if x.watcher != nil {
		_ = x.watcher.Stop()
	}
}

func (x *alertIndex) setVerdict(id string, v verdict) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if v.Verdict == "" {
		delete(x.verdicts, id)
		return
	}
	x.verdicts[id] = v
}

func (x *alertIndex) receive(data []byte) {
	var a alert.Alert
	if err := json.Unmarshal(data, &a); err != nil || a.ID == "" {
		x.log.Warn("an alert cannot be read", "error", err)
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if e, ok := x.byID[a.ID]; ok {
		if a.Revision <= e.Revision {
			return
		}
		// Readers hold the old episode: replace, never change.
		grown := &episode{Alert: a, Revisions: append(slices.Clone(e.Revisions), a)}
		if n := len(grown.Revisions); n > maxRevisions {
			grown.Revisions = slices.Delete(grown.Revisions, 1, n-maxRevisions+1) // the first tells how it began
		}
		if !a.Time.Equal(e.Time) {
			grown.Time = e.Time // an episode keeps its place
		}
		i, _ := slices.BinarySearchFunc(x.order, e, byTime)
		x.order[i], x.byID[a.ID] = grown, grown
		return
	}
	e := &episode{Alert: a, Revisions: []alert.Alert{a}}
	i, _ := slices.BinarySearchFunc(x.order, e, byTime)
	x.order = slices.Insert(x.order, i, e)
	x.byID[a.ID] = e
	if len(x.order) > maxAlerts {
		delete(x.byID, x.order[0].ID)
		x.order = slices.Delete(x.order, 0, 1)
	}
}

func byTime(a, b *episode) int {
	return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.ID, b.ID))
}

// get is one episode with its verdict.
func (x *alertIndex) get(id string) (episode, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.byID[id]
	if !ok {
		return episode{}, false
	}
	return x.withVerdict(e), true
}

func (x *alertIndex) withVerdict(e *episode) episode {
	out := *e
	if v, ok := x.verdicts[e.ID]; ok {
		out.Verdict = &v
	}
	return out
}

// alertFilter says which alerts a listing shows; empty fields ask nothing.
type alertFilter struct {
	Org, Key, Trigger, Severity string
	Since                       time.Time
	// Open leaves out what has a verdict, Live what came from imported history.
	Open, Live bool
	// Before begins the page below this place.
	Before position
	Limit  int
}

// position is a place in the order of alerts.
type position struct {
	Time time.Time
	ID   string
}

// list gives a page, newest first; more tells that there are others below.
func (x *alertIndex) list(f alertFilter) (page []episode, more bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, e := range slices.Backward(x.order) {
		if f.Before.ID != "" && byTime(e, &episode{Alert: alert.Alert{Time: f.Before.Time, ID: f.Before.ID}}) >= 0 {
			continue
		}
		if !f.Since.IsZero() && e.Time.Before(f.Since) {
			break
		}
		if !f.keeps(e) || (f.Open && x.verdicts[e.ID].Verdict != "") {
			continue
		}
		if len(page) == f.Limit {
			return page, true
		}
		page = append(page, x.withVerdict(e))
	}
	return page, false
}

func (f *alertFilter) keeps(e *episode) bool {
	return (f.Org == "" || e.OrgID == f.Org) &&
		(f.Key == "" || e.KeyID == f.Key) &&
		(f.Trigger == "" || slices.Contains(e.Triggers, f.Trigger)) &&
		(f.Severity == "" || e.Severity == f.Severity) &&
		!(f.Live && e.Historical)
}
