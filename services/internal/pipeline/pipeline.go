// Package pipeline tells how the whole pipeline is: rates, lag, owners, the last
// insert, spools and dead letters.
package pipeline

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/services/collector"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

// Status is the pipeline at one moment. What could not be asked is empty, with
// the reason in Problems.
type Status struct {
	Time    time.Time `json:"time"`
	Usage   Stream    `json:"usage"`
	Alerts  Stream    `json:"alerts"`
	Dead    Stream    `json:"dead_letters"`
	Readers []Reader  `json:"readers"`
	Store   Store     `json:"clickhouse"`
	Spool   *Spool    `json:"spool,omitempty"`
	// Problems are for people: what is behind, away or full.
	Problems []string `json:"problems"`
}

// Stream is a stream of JetStream.
type Stream struct {
	Messages uint64 `json:"messages"`
	Bytes    uint64 `json:"bytes"`
	// MaxBytes is 0 if there is no limit.
	MaxBytes uint64    `json:"max_bytes"`
	Last     time.Time `json:"last_message_at,omitzero"`
	// Rate is in messages per second over the last seconds.
	Rate float64 `json:"messages_per_second"`
}

// Reader is a service that reads USAGE.
type Reader struct {
	Service    string      `json:"service"`
	LagEvents  uint64      `json:"lag_events"`
	LagSeconds float64     `json:"lag_seconds"`
	Owned      int         `json:"partitions_owned"`
	Partitions []Partition `json:"partitions"`
}

// LagMessages is how many messages wait for the reader.
func (r Reader) LagMessages() (n uint64) {
	for _, p := range r.Partitions {
		n += p.LagMessages
	}
	return n
}

// Partition is one partition of a reader.
type Partition struct {
	Partition int `json:"partition"`
	// Owned tells whether JetStream has pinned it to a process; one without
	// traffic may have no owner yet. Owner names the one that stored last.
	Owned bool   `json:"owned"`
	Owner string `json:"owner,omitempty"`
	// LagEvents is estimated from the messages that wait and how many events the
	// oldest of them has; LagSeconds is the age of that.
	LagMessages uint64    `json:"lag_messages"`
	LagEvents   uint64    `json:"lag_events"`
	LagSeconds  float64   `json:"lag_seconds"`
	LastBatch   time.Time `json:"last_batch_at,omitzero"`
}

// Store is ClickHouse.
type Store struct {
	Reachable  bool      `json:"reachable"`
	Events     uint64    `json:"events"`
	LastInsert time.Time `json:"last_insert_at,omitzero"`
	// Rate is in events per second over the last minute.
	Rate float64 `json:"events_per_second"`
}

// Spool is what an edge holds back because JetStream is away.
type Spool struct {
	Bytes  uint64 `json:"bytes"`
	Events uint64 `json:"events"`
}

// Source is where a status is read from. Edge may be empty.
type Source struct {
	JS   jetstream.JetStream
	DB   *store.Store
	Edge string // http://host:port
}

// Read asks everyone, and for how fast USAGE grows waits a second.
func (src Source) Read(ctx context.Context) (*Status, error) {
	s := &Status{Time: time.Now().UTC(), Problems: []string{}}
	first, err := src.stream(ctx, bus.Usage)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	src.clickhouse(ctx, s)
	src.spool(ctx, s)
	if s.Alerts, err = src.streamStatus(ctx, bus.Alerts); err != nil {
		return nil, err
	}
	if s.Dead, err = src.streamStatus(ctx, bus.Dead); err != nil {
		return nil, err
	}
	partitions, err := bus.PartitionCount(ctx, src.JS)
	if err != nil {
		return nil, err
	}
	intents, err := collector.ReadIntents(ctx, src.JS, partitions)
	if err != nil {
		return nil, err
	}
	for _, service := range []string{bus.Collector, bus.Detector} {
		r, err := src.reader(ctx, service, partitions, intents)
		if err != nil {
			return nil, err
		}
		s.Readers = append(s.Readers, *r)
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(max(0, time.Second-time.Since(began))):
	}
	if s.Usage, err = src.streamStatus(ctx, bus.Usage); err != nil {
		return nil, err
	}
	info, err := src.stream(ctx, bus.Usage)
	if err != nil {
		return nil, err
	}
	s.Usage.Rate = float64(info.State.LastSeq-first.State.LastSeq) / time.Since(began).Seconds()
	s.judge()
	return s, nil
}

func (src Source) stream(ctx context.Context, name string) (*jetstream.StreamInfo, error) {
	s, err := src.JS.Stream(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", name, err)
	}
	return s.CachedInfo(), nil
}

func (src Source) streamStatus(ctx context.Context, name string) (Stream, error) {
	info, err := src.stream(ctx, name)
	if err != nil {
		return Stream{}, err
	}
	st := Stream{Messages: info.State.Msgs, Bytes: info.State.Bytes, MaxBytes: uint64(max(0, info.Config.MaxBytes))}
	if info.State.Msgs > 0 {
		st.Last = info.State.LastTime.UTC()
	}
	return st, nil
}

func (src Source) reader(ctx context.Context, service string, partitions int, intents map[int]collector.Intent) (*Reader, error) {
	r := &Reader{Service: service}
	stream, err := src.JS.Stream(ctx, bus.Usage)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", bus.Usage, err)
	}
	for i := range partitions {
		c, err := src.JS.Consumer(ctx, bus.Usage, bus.ConsumerName(service, i))
		if err != nil {
			return nil, fmt.Errorf("look up consumer %s: %w", bus.ConsumerName(service, i), err)
		}
		info := c.CachedInfo()
		lag, err := bus.ReadLag(ctx, stream, info)
		if err != nil {
			return nil, err
		}
		p := Partition{Partition: i, LagMessages: lag.Messages, LagEvents: lag.Events, LagSeconds: lag.Age.Seconds()}
		for _, g := range info.PriorityGroups {
			p.Owned = p.Owned || g.PinnedClientID != ""
		}
		if it, ok := intents[i]; ok && service == bus.Collector {
			p.Owner, p.LastBatch = it.Owner, it.Time
		}
		if p.Owned {
			r.Owned++
		}
		r.LagEvents += p.LagEvents
		r.LagSeconds = max(r.LagSeconds, p.LagSeconds)
		r.Partitions = append(r.Partitions, p)
	}
	return r, nil
}

func (src Source) clickhouse(ctx context.Context, s *Status) {
	if src.DB == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var lately uint64
	row := src.DB.Conn.QueryRow(ctx, `SELECT count(), max(ingested_at), countIf(ingested_at > now() - 60) FROM usage_events`)
	if err := row.Scan(&s.Store.Events, &s.Store.LastInsert, &lately); err != nil {
		s.Problems = append(s.Problems, "ClickHouse does not answer: "+err.Error())
		return
	}
	s.Store.Reachable, s.Store.Rate = true, float64(lately)/60
	if s.Store.Events == 0 {
		s.Store.LastInsert = time.Time{}
	}
}

// spool reads an edge's metrics; an edge that is away is no problem of the pipeline.
func (src Source) spool(ctx context.Context, s *Status) {
	if src.Edge == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, src.Edge+"/metrics", nil)
	if err != nil {
		return
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return
	}
	defer func() { _ = res.Body.Close() }()
	spool := &Spool{}
	for lines := bufio.NewScanner(res.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			continue
		}
		switch name {
		case "latchkey_edge_spool_bytes":
			spool.Bytes, s.Spool = uint64(v), spool
		case "latchkey_edge_spool_events":
			spool.Events = uint64(v)
		}
	}
}

// judge says in words what wants attention.
func (s *Status) judge() {
	add := func(format string, args ...any) { s.Problems = append(s.Problems, fmt.Sprintf(format, args...)) }
	if s.Usage.MaxBytes > 0 && s.Usage.Bytes > s.Usage.MaxBytes*9/10 {
		add("USAGE is %d %% full; when it is, events are refused", s.Usage.Bytes*100/s.Usage.MaxBytes)
	}
	for _, r := range s.Readers {
		if r.LagSeconds > 30 {
			add("the %s is %.0f s behind, about %d events", r.Service, r.LagSeconds, r.LagEvents)
		}
		for _, p := range r.Partitions {
			if !p.Owned && p.LagMessages > 0 && p.LagSeconds > 15 {
				add("nobody reads partition %d for the %s", p.Partition, r.Service)
			}
		}
	}
	if s.Dead.Messages > 0 {
		add("%d dead letters, see `latchkey dead list`", s.Dead.Messages)
	}
}
