package detector

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

// Baselines that another version of the detector wrote cannot be read. Their keys
// begin anew, which is quiet, and the partition is rebuilt from all events that
// ClickHouse holds. A mark in the bucket keeps that from being forgotten: once the
// keys have been seen again, nothing else would tell how little is known of them.

// repair sees to it that a restored partition is rebuilt if it must be.
func (w *worker) repair(ctx context.Context, st *stored, unreadable int) error {
	if unreadable == 0 && !st.unreadable && !st.due {
		return nil
	}
	w.log.Warn("baselines of another version cannot be read: their keys begin anew until they are rebuilt from ClickHouse", "keys", unreadable)
	if !st.due {
		if _, err := w.s.states.Put(ctx, strconv.Itoa(w.p.Number)+"."+nameRebuild, nil); err != nil {
			return fmt.Errorf("ask for a rebuild: %w", err)
		}
	}
	w.s.mu.Lock()
	w.s.unread[w.p.Number] = true
	w.s.metrics.unread.Set(float64(len(w.s.unread)))
	w.s.mu.Unlock()
	select {
	case w.s.repairs <- struct{}{}:
	default:
	}
	return nil
}

// Between two attempts at a rebuild, and before the first, so that it is one for
// all partitions of the process.
const (
	repairDelay = 2 * time.Second
	repairPause = time.Minute
)

// repair rebuilds unreadable partitions until ctx is done.
func (s *Service) repair(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.repairs:
		}
		for pause := repairDelay; ; pause = repairPause {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			if err := s.rebuildUnread(ctx); err == nil {
				break
			} else if ctx.Err() == nil {
				s.metrics.repairs.WithLabelValues("error").Inc()
				s.log.Error("unreadable baselines are not rebuilt yet: detection begins anew for their keys", "error", err, "again_in", repairPause)
			}
		}
	}
}

// rebuildUnread rebuilds the partitions that wait for it.
func (s *Service) rebuildUnread(ctx context.Context) (err error) {
	s.mu.Lock()
	parts := maps.Clone(s.unread)
	s.mu.Unlock()
	if len(parts) == 0 {
		return nil
	}
	if s.cfg.ClickHouseURL == "" {
		return errors.New("LATCHKEY_CLICKHOUSE_URL is not set")
	}
	db, err := store.Open(ctx, s.cfg.ClickHouseURL)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	done, err := s.rebuild(ctx, db.Conn, time.Unix(0, 0), parts, func(int64) {})
	if err != nil {
		return err
	}
	for p := range parts {
		if err := s.forgetUnreadable(ctx, p); err != nil {
			return err
		}
	}
	s.mu.Lock()
	for p := range parts {
		delete(s.unread, p)
	}
	s.metrics.unread.Set(float64(len(s.unread)))
	s.mu.Unlock()
	s.metrics.repairs.WithLabelValues("ok").Inc()
	s.log.Info("unreadable baselines were rebuilt", "events", done.Events, "keys", done.Keys, "partitions", len(parts))
	return nil
}

// forgetUnreadable removes what cannot be read and has no events to be rebuilt
// from, and the mark. The partition's owner fails at what was removed, and takes it again.
func (s *Service) forgetUnreadable(ctx context.Context, partition int) error {
	st, err := s.readState(ctx, partition)
	if err != nil {
		return err
	}
	if _, err := st.overlay(); err != nil {
		return err
	}
	stream, err := s.js.Stream(ctx, "KV_"+bus.Baselines)
	if err != nil {
		return fmt.Errorf("look up bucket %s: %w", bus.Baselines, err)
	}
	engine := s.newEngine()
	names := []string{nameRebuild}
	for token, it := range st.values {
		_, state, err := decodeProfile(it.value)
		if err == nil {
			keyID := keyOfToken(token)
			err = engine.Decode(keyID, state)
			engine.Forget(keyID)
		}
		if token != nameSources && err != nil {
			names = append(names, token)
		}
	}
	for _, name := range names {
		subject := fmt.Sprintf("$KV.%s.%d.%s", bus.Baselines, partition, name)
		if err := stream.Purge(ctx, jetstream.WithPurgeSubject(subject)); err != nil {
			return fmt.Errorf("forget an unreadable baseline: %w", err)
		}
	}
	return nil
}
