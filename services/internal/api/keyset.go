package api

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// Keyset holds the last record of every key in memory, as the KEYS stream tells
// them. A record never goes back: one with a lower stream sequence is ignored.
type Keyset struct {
	log    *slog.Logger
	hasher apikey.Hasher

	mu     sync.RWMutex
	byID   map[string]*entry
	byHash map[apikey.Hash]*entry
	// sorted are the ids in order, all and by organization; ids are made so that
	// their order is that of creation.
	sorted map[string][]string
	last   uint64
	ready  chan struct{}

	consume jetstream.ConsumeContext
}

type entry struct {
	record key.Record
	scopes apikey.Scopes
	seq    uint64
	hash   apikey.Hash
}

// allOrgs is the index of sorted over every organization; no id is empty.
const allOrgs = ""

// OpenKeyset reads the KEYS stream and goes on reading it until Close. It
// returns once everything that was there when it began has been read.
func OpenKeyset(ctx context.Context, js jetstream.JetStream, hasher apikey.Hasher, log *slog.Logger) (*Keyset, error) {
	s := &Keyset{
		log: log, hasher: hasher,
		byID: map[string]*entry{}, byHash: map[apikey.Hash]*entry{}, sorted: map[string][]string{}, ready: make(chan struct{}),
	}
	stream, err := js.Stream(ctx, bus.Keys)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", bus.Keys, err)
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask about stream %s: %w", bus.Keys, err)
	}
	target := info.State.LastSeq
	if target == 0 {
		close(s.ready)
	}
	consumer, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverLastPerSubjectPolicy})
	if err != nil {
		return nil, fmt.Errorf("read stream %s: %w", bus.Keys, err)
	}
	s.consume, err = consumer.Consume(func(m jetstream.Msg) { s.receive(m, target) }, jetstream.ConsumeErrHandler(func(_ jetstream.ConsumeContext, err error) {
		log.Warn("reading keys was interrupted, it goes on by itself", "error", err)
	}))
	if err != nil {
		return nil, fmt.Errorf("read stream %s: %w", bus.Keys, err)
	}
	select {
	case <-s.ready:
		return s, nil
	case <-ctx.Done():
		s.Close()
		return nil, fmt.Errorf("read stream %s: %w", bus.Keys, ctx.Err())
	}
}

// Close stops reading.
func (s *Keyset) Close() { s.consume.Stop() }

func (s *Keyset) receive(m jetstream.Msg, target uint64) {
	meta, err := m.Metadata()
	if err != nil {
		s.log.Error("message on KEYS without metadata", "error", err)
		return
	}
	var change key.Change
	if err := json.Unmarshal(m.Data(), &change); err != nil {
		s.log.Error("record on KEYS cannot be read, its key stays as it was", "subject", m.Subject(), "sequence", meta.Sequence.Stream, "error", err)
	} else {
		s.Apply(meta.Sequence.Stream, change.Record)
	}
	if meta.Sequence.Stream >= target || meta.NumPending == 0 {
		s.mu.Lock()
		select {
		case <-s.ready:
		default:
			close(s.ready)
		}
		s.mu.Unlock()
	}
}

// Apply takes a record that was stored under a stream sequence. Writers call it
// too, so that they read what they wrote.
func (s *Keyset) Apply(seq uint64, record key.Record) {
	scopes, err := apikey.CompileScopes(record.Scopes)
	if err != nil {
		// A scope that cannot be read grants nothing; the others must not either.
		s.log.Error("key holds a scope that cannot be read, it grants nothing", "key_id", record.ID, "error", err)
	}
	hash, err := apikey.ParseHash(record.Hash)
	if err != nil {
		s.log.Error("key has a hash that cannot be read, nobody can use it", "key_id", record.ID, "error", err)
	}
	e := &entry{record: record, scopes: scopes, seq: seq, hash: hash}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last, seq)
	old := s.byID[record.ID]
	if old != nil && old.seq >= seq {
		return
	}
	if old != nil && s.byHash[old.hash] == old {
		delete(s.byHash, old.hash)
	}
	if old == nil {
		s.index(allOrgs, record.ID)
		s.index(record.OrgID, record.ID)
	}
	s.byID[record.ID] = e
	if hash != (apikey.Hash{}) {
		s.byHash[hash] = e
	}
}

func (s *Keyset) index(org, id string) {
	ids := s.sorted[org]
	i, found := slices.BinarySearch(ids, id)
	if !found {
		s.sorted[org] = slices.Insert(ids, i, id)
	}
}

// Get is the record of a key. Records are shared: do not change what they refer to.
func (s *Keyset) Get(id string) (key.Record, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	e, ok := s.byID[id]
	if !ok {
		return key.Record{}, false
	}
	return e.record, true
}

// At is [Keyset.Get] with the stream sequence of the record, 0 if there is none.
func (s *Keyset) At(id string) (key.Record, uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	e, ok := s.byID[id]
	if !ok {
		return key.Record{}, 0
	}
	return e.record, e.seq
}

// Len is the number of keys, whatever their status.
func (s *Keyset) Len() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.byID)
}

// Walk calls visit with the keys of an organization, or of all for an empty
// org, newest first and beginning after the id "after" (empty: at the newest),
// until visit returns false. It takes no lock while visit runs.
func (s *Keyset) Walk(org, after string, visit func(key.Record) bool) {
	for {
		page := s.page(org, after, 256)
		for _, r := range page {
			if !visit(*r) {
				return
			}
			after = r.ID
		}
		if len(page) == 0 {
			return
		}
	}
}

// page points into entries, which are replaced and never changed.
func (s *Keyset) page(org, after string, n int) []*key.Record {
	s.mu.RLock()
	defer s.mu.RUnlock()
	ids := s.sorted[org]
	end := len(ids)
	if after != "" {
		end, _ = slices.BinarySearch(ids, after)
	}
	page := make([]*key.Record, 0, min(n, end))
	for i := end - 1; i >= 0 && len(page) < n; i-- {
		page = append(page, &s.byID[ids[i]].record)
	}
	return page
}

// Lookup is the key of a secret, if it may be used at now. The last result
// tells why not, for the log and the metrics alone: "invalid", "expired",
// "revoked" or "suspended".
func (s *Keyset) Lookup(secret string, now time.Time) (key.Record, apikey.Scopes, string) {
	e := s.find(secret)
	switch {
	case e == nil:
		return key.Record{}, apikey.Scopes{}, "invalid"
	case e.record.Status == key.Revoked:
		return e.record, apikey.Scopes{}, "revoked"
	case e.record.Status != key.Active:
		return e.record, apikey.Scopes{}, "suspended"
	case e.record.ExpiresAt != nil && !now.Before(*e.record.ExpiresAt):
		return e.record, apikey.Scopes{}, "expired"
	}
	return e.record, e.scopes, ""
}

func (s *Keyset) find(secret string) *entry {
	prefix, _, _ := strings.Cut(secret, "_")
	format, err := apikey.NewFormat(prefix)
	if err != nil {
		return nil
	}
	if _, err := format.Parse(secret); err != nil {
		return nil
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i := range s.hasher.Len() {
		if e := s.byHash[s.hasher.At(i, secret)]; e != nil {
			return e
		}
	}
	return nil
}
