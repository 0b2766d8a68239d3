package keys

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// Notices are made from two durable consumers that replicas share. One reads
// KEYS: every change becomes a notice and sets the key's one timer, a JetStream
// message schedule at the next moment when something will have to be said. The
// other reads the timers that went off, says it, and sets the next.

const (
	timerSet = "timers.set."
	timerDue = "timers.due."
	// retryLater is how long a failed message waits for its next delivery.
	retryLater = 5 * time.Second
	// unknownUse is when use is asked for again that was not known.
	unknownUse = 6 * time.Hour
	// successorCheck is how often a rotated key whose grace period has not begun
	// is looked at.
	successorCheck = 10 * time.Minute
)

// work hands the messages of a shared durable consumer to handle until ctx is
// done; what fails is delivered again, to this replica or another.
func (s *Service) work(ctx context.Context, stream string, cfg jetstream.ConsumerConfig, handle func(context.Context, jetstream.Msg) error) error {
	cfg.AckPolicy, cfg.AckWait, cfg.MaxDeliver = jetstream.AckExplicitPolicy, 30*time.Second, -1
	consumer, err := s.js.CreateOrUpdateConsumer(ctx, stream, cfg)
	if err != nil {
		return fmt.Errorf("create consumer %s: %w", cfg.Durable, err)
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(64))
	if err != nil {
		return fmt.Errorf("read stream %s: %w", stream, err)
	}
	defer context.AfterFunc(ctx, messages.Stop)()
	for {
		msg, err := messages.Next()
		if errors.Is(err, jetstream.ErrMsgIteratorClosed) {
			return ctx.Err()
		}
		if err != nil {
			s.log.Warn("reading was interrupted, it goes on by itself", "stream", stream, "error", err)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Second):
			}
			continue
		}
		handleCtx, cancel := context.WithTimeout(ctx, 20*time.Second)
		err = handle(handleCtx, msg)
		cancel()
		if err != nil {
			s.log.Warn("message could not be handled and will come again", "subject", msg.Subject(), "error", err)
			err = msg.NakWithDelay(retryLater)
		} else {
			err = msg.Ack()
		}
		if err != nil {
			s.log.Warn("acknowledgement failed, the message will come again", "subject", msg.Subject(), "error", err)
		}
	}
}

func (s *Service) runNotices(ctx context.Context) error {
	cfg := jetstream.ConsumerConfig{Durable: "keys-notices", DeliverPolicy: jetstream.DeliverAllPolicy}
	return s.work(ctx, bus.Keys, cfg, func(ctx context.Context, m jetstream.Msg) error {
		var c key.Change
		if err := json.Unmarshal(m.Data(), &c); err != nil {
			s.log.Error("change cannot be read, nobody is told of it", "subject", m.Subject(), "error", err)
			return nil
		}
		n := key.Notice{ID: c.ID, Type: c.Type, Time: c.Time, OrgID: c.Record.OrgID, KeyID: c.Record.ID, Data: s.noticeData(c.Record)}
		n.Data.Actor, n.Data.Reason = c.Actor, c.Reason
		if err := s.notify(ctx, n); err != nil {
			return err
		}
		return s.evaluate(ctx, c.Record.ID)
	})
}

func (s *Service) runTimers(ctx context.Context) error {
	cfg := jetstream.ConsumerConfig{Durable: "keys-timers", FilterSubject: timerDue + "*", DeliverPolicy: jetstream.DeliverAllPolicy}
	return s.work(ctx, bus.Timers, cfg, func(ctx context.Context, m jetstream.Msg) error {
		return s.evaluate(ctx, strings.TrimPrefix(m.Subject(), timerDue))
	})
}

func (s *Service) noticeData(r key.Record) key.Data {
	now := s.now()
	return key.Data{
		Name: r.Name, Prefix: r.Prefix, Status: status(r, now), Owner: r.Owner, ExpiresAt: r.ExpiresAt,
		RotationDueAt: rotationDue(r, effective(r.Policy, s.orgs.policy(r.OrgID)), now),
		ParentKeyID:   r.ParentKeyID, SuccessorID: r.SuccessorID, RevokeReason: r.RevokeReason, Unclaimed: r.Unclaimed,
	}
}

func (s *Service) notify(ctx context.Context, n key.Notice) error {
	body, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("encode notice: %w", err)
	}
	ack, err := s.js.Publish(ctx, bus.NoticeSubject(n.OrgID, n.KeyID), body, jetstream.WithMsgID(n.ID))
	if err != nil {
		return fmt.Errorf("publish notice: %w", err)
	}
	if !ack.Duplicate {
		s.metrics.notices.WithLabelValues(n.Type).Inc()
	}
	return nil
}

// moment is a time at which something is to be said of a key.
type moment struct {
	typ string
	at  time.Time
}

// moments are those of a key that has not said them yet; used is nil if use is
// not known.
func moments(r key.Record, p key.Policy, used map[string]time.Time, known bool, now time.Time) []moment {
	var out []moment
	if r.Status == key.Revoked {
		return nil
	}
	if r.ExpiresAt != nil {
		// A key that was rotated, or made for less than a day, needs no warning.
		if r.SuccessorID == "" && r.ExpiresAt.Sub(r.CreatedAt) >= day && now.Before(*r.ExpiresAt) {
			out = append(out, moment{key.Expiring, r.ExpiresAt.Add(-expiryWarning)})
		}
		out = append(out, moment{key.Expired, *r.ExpiresAt})
	}
	if due := rotationDue(r, p, now); due != nil {
		out = append(out, moment{key.RotationDue, *due})
	}
	if known && !ended(r, now) && r.SuccessorID == "" {
		out = append(out, moment{key.Unused, idleSince(r, used).Add(time.Duration(p.UnusedDays) * day)})
	}
	return out
}

// evaluate says what is due of a key and sets its timer for what will be. It
// may run twice or side by side with itself: a notice has an id that follows
// from its moment, and what was said is noted.
func (s *Service) evaluate(ctx context.Context, id string) error {
	stored, err := s.store.read(ctx, id)
	if errors.Is(err, errNoKey) {
		return nil
	}
	if err != nil {
		return err
	}
	r, now := stored.Record, s.now().UTC()
	p := effective(r.Policy, s.orgs.policy(r.OrgID))
	used, factsErr := s.lastUseOf(ctx, r, p, now)
	said, err := s.readSaid(ctx, id)
	if err != nil {
		return err
	}
	var next time.Time
	later := func(at time.Time) {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	if factsErr != nil && !errors.Is(factsErr, errNoClickHouse) {
		later(now.Add(unknownUse))
	}
	if r.GraceAfterUse != "" && !ended(r, now) {
		if begun, err := s.startGrace(ctx, r); begun || err != nil {
			return err // the change itself has the key evaluated anew
		}
		later(now.Add(successorCheck))
	}
	changed := false
	for _, m := range moments(r, p, used, factsErr == nil, now) {
		switch {
		case m.at.After(now):
			later(m.at)
		case said.Moments[m.typ].Equal(m.at):
		default:
			if err := s.due(ctx, r, p, m, used); err != nil {
				return err
			}
			said.Moments[m.typ], changed = m.at, true
		}
	}
	if changed {
		if err := s.writeSaid(ctx, id, said); err != nil {
			return err
		}
	}
	if next.IsZero() {
		return nil
	}
	return s.setTimer(ctx, id, next)
}

// lastUseOf asks when a key was last used, unless it is too young to be called
// unused: most changes are of keys that are.
func (s *Service) lastUseOf(ctx context.Context, r key.Record, p key.Policy, now time.Time) (map[string]time.Time, error) {
	if now.Sub(r.CreatedAt) < time.Duration(p.UnusedDays)*day {
		return nil, nil
	}
	return s.lastUsed(ctx, []string{r.ID})
}

// due says that a moment has come, or does what the policy wants done then.
func (s *Service) due(ctx context.Context, r key.Record, p key.Policy, m moment, used map[string]time.Time) error {
	if m.typ == key.RotationDue && p.AutoRotate != nil && *p.AutoRotate && r.Status == key.Active && !r.Unclaimed {
		opts := rotateOptions{grace: grace(p), unclaimed: true, reason: "rotation interval of " + fmt.Sprint(p.RotationDays) + " days is over"}
		_, err := s.rotate(ctx, system, r.ID, opts, rotatable)
		if err == nil {
			s.metrics.changes.WithLabelValues("rotate", "schedule").Inc()
		}
		return ignoreProblem(err)
	}
	n := key.Notice{
		ID: "ntc_" + r.ID + "_" + strings.TrimPrefix(m.typ, "api_key.") + "_" + fmt.Sprint(m.at.Unix()), Type: m.typ, Time: s.now().UTC(),
		OrgID: r.OrgID, KeyID: r.ID, Data: s.noticeData(r),
	}
	if at, ok := used[r.ID]; ok {
		n.Data.LastUsedAt = &at
	}
	return s.notify(ctx, n)
}

// setTimer sets the one timer of a key. Schedules have whole seconds; a timer
// goes off after its moment, not before.
func (s *Service) setTimer(ctx context.Context, id string, at time.Time) error {
	at = at.Add(time.Second - 1).Truncate(time.Second)
	_, err := s.js.Publish(ctx, timerSet+id, []byte(id), jetstream.WithScheduleAt(at), jetstream.WithScheduleTarget(timerDue+id))
	if err != nil {
		return fmt.Errorf("set timer of %s: %w", id, err)
	}
	return nil
}

// wake has every key of an organization evaluated anew, since its policy changed.
func (s *Service) wake(ctx context.Context, org string) error {
	var failed error
	s.set.Walk(org, "", func(r key.Record) bool {
		if ended(r, s.now()) {
			return true
		}
		_, failed = s.js.PublishAsync(timerDue+r.ID, []byte(r.ID))
		return failed == nil
	})
	if failed != nil {
		return fmt.Errorf("wake keys of %s: %w", org, failed)
	}
	select {
	case <-s.js.PublishAsyncComplete():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wake keys of %s: %w", org, ctx.Err())
	}
}

// said is what was said of a key, in bucket key_notices.
type said struct {
	Moments  map[string]time.Time `json:"moments"`
	revision uint64
}

func (s *Service) readSaid(ctx context.Context, id string) (said, error) {
	out := said{Moments: map[string]time.Time{}}
	entry, err := s.said.Get(ctx, id)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return out, nil
	}
	if err != nil {
		return out, fmt.Errorf("read notices of %s: %w", id, err)
	}
	out.revision = entry.Revision()
	if err := json.Unmarshal(entry.Value(), &out); err != nil || out.Moments == nil {
		return said{Moments: map[string]time.Time{}, revision: entry.Revision()}, nil
	}
	return out, nil
}

func (s *Service) writeSaid(ctx context.Context, id string, v said) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode notices of %s: %w", id, err)
	}
	if _, err := s.said.Update(ctx, id, body, v.revision); err != nil {
		return fmt.Errorf("note notices of %s: %w", id, err)
	}
	return nil
}
