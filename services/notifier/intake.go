package notifier

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/mail"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
)

// durable is the notifier's consumer on every stream that it reads; several
// notifiers share it.
const durable = "notifier"

// errPoison marks a message that no retry can make readable.
var errPoison = errors.New("cannot be read")

// consume hands every message of a stream to take. A message is acknowledged
// once take has recorded what follows from it; poison goes to the dead letters.
func (s *Service) consume(ctx context.Context, stream string, take func(context.Context, []byte) error) error {
	consumer, err := s.js.CreateOrUpdateConsumer(ctx, stream, jetstream.ConsumerConfig{
		Durable: durable, AckPolicy: jetstream.AckExplicitPolicy, DeliverPolicy: jetstream.DeliverAllPolicy,
		// Short, for recording a delivery takes milliseconds and what a killed
		// notifier was handed waits for as long.
		AckWait: 5 * time.Second, MaxDeliver: -1, MaxAckPending: 1024,
	})
	if err != nil {
		return fmt.Errorf("create consumer on %s: %w", stream, err)
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(128))
	if err != nil {
		return fmt.Errorf("read %s: %w", stream, err)
	}
	defer messages.Stop()
	stop := context.AfterFunc(ctx, messages.Stop)
	defer stop()
	for {
		msg, err := messages.Next()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, jetstream.ErrMsgIteratorClosed):
			return fmt.Errorf("read %s: %w", stream, err)
		case err != nil:
			s.log.Warn("cannot read a stream now", "stream", stream, "error", err)
			continue
		}
		s.takeOne(ctx, stream, msg, take)
	}
}

func (s *Service) takeOne(ctx context.Context, stream string, msg jetstream.Msg, take func(context.Context, []byte) error) {
	err := take(ctx, msg.Data())
	if errors.Is(err, errPoison) {
		s.log.Error("a message goes to the dead letters", "stream", stream, "error", err)
		err = s.bury(ctx, stream, msg, err)
	}
	if err != nil {
		s.log.Warn("a message is taken again later", "stream", stream, "error", err)
		_ = msg.NakWithDelay(2 * time.Second)
		return
	}
	// An acknowledgement that is lost brings the message again, which changes nothing.
	_ = msg.Ack()
}

// bury keeps what cannot be read, with the reason, before it is acknowledged.
func (s *Service) bury(ctx context.Context, stream string, msg jetstream.Msg, reason error) error {
	meta, err := msg.Metadata()
	if err != nil {
		return fmt.Errorf("read metadata: %w", err)
	}
	dead := &nats.Msg{Subject: "dead.notifier", Data: msg.Data(), Header: nats.Header{
		"Latchkey-Reason": []string{headerText(reason.Error())}, "Latchkey-Subject": []string{msg.Subject()},
		"Latchkey-Stream": []string{stream}, "Latchkey-Sequence": []string{fmt.Sprint(meta.Sequence.Stream)},
	}}
	if _, err := s.js.PublishMsg(ctx, dead, jetstream.WithMsgID(fmt.Sprintf("notifier:%s:%d", stream, meta.Sequence.Stream))); err != nil {
		return fmt.Errorf("write dead letter: %w", err)
	}
	s.metrics.dead.Inc()
	return nil
}

// takeAlert records the one mail of an alert, at its first revision that is
// live, and the webhook calls of this revision.
func (s *Service) takeAlert(ctx context.Context, data []byte) error {
	var a alert.Alert
	if err := json.Unmarshal(data, &a); err != nil {
		return fmt.Errorf("%w: alert: %w", errPoison, err)
	}
	if a.ID == "" {
		return fmt.Errorf("%w: alert has no id", errPoison)
	}
	if a.Historical {
		s.metrics.skipped.Inc()
		return nil
	}
	if err := s.hookAlert(ctx, &a); err != nil {
		return err
	}
	org, err := s.org(ctx, a.OrgID)
	if err != nil {
		return err
	}
	rec, err := s.record(ctx, a.OrgID, a.KeyID)
	if err != nil {
		return err
	}
	subject := alertSubject(&a, viewKey(a.KeyID, rec, s.now()))
	return s.enqueue(ctx, &delivery.Delivery{ID: a.ID, Kind: delivery.Alert, OrgID: a.OrgID, KeyID: a.KeyID, Payload: data}, org, heldLine{ID: a.ID, Time: a.Time, Subject: subject})
}

// takeNotice records the mail and the webhook calls of a notice.
func (s *Service) takeNotice(ctx context.Context, data []byte) error {
	var n key.Notice
	if err := json.Unmarshal(data, &n); err != nil {
		return fmt.Errorf("%w: notice: %w", errPoison, err)
	}
	if n.ID == "" {
		return fmt.Errorf("%w: notice has no id", errPoison)
	}
	if err := s.hookNotice(ctx, &n, data); err != nil {
		return err
	}
	if !mailed(&n) {
		return nil
	}
	org, err := s.org(ctx, n.OrgID)
	if err != nil {
		return err
	}
	headline, _, _ := noticeWords(&n, clean(n.Data.Name, 80))
	return s.enqueue(ctx, &delivery.Delivery{ID: n.ID, Kind: delivery.Notice, OrgID: n.OrgID, KeyID: n.KeyID, Payload: data}, org, heldLine{ID: n.ID, Time: n.Time, Subject: headline})
}

// enqueue records a mail as an intent, unless it was recorded before.
func (s *Service) enqueue(ctx context.Context, d *delivery.Delivery, org *key.Org, line heldLine) error {
	bucketKey := delivery.Key(d.Kind, d.ID)
	if before, _, err := s.outbox.get(ctx, bucketKey); err != nil || before != nil {
		return err
	}
	d.CreatedAt, d.State, d.MessageID = s.now().UTC(), delivery.Pending, s.mailer.messageID(d.ID)
	d.To = s.recipient(org)
	if d.To == "" {
		d.State, d.Payload = delivery.Unaddressed, nil
		d.Answer = "the organization is unknown and LATCHKEY_FALLBACK_EMAIL is not set"
	} else {
		admitted, err := s.admit(ctx, d.To, line)
		if err != nil {
			return err
		}
		if !admitted {
			d.State, d.Payload = delivery.Held, nil
			d.Answer = fmt.Sprintf("more than %d mails an hour: told in a digest", s.cfg.MaxPerHour)
		}
	}
	created, err := s.outbox.add(ctx, bucketKey, d)
	if created {
		s.metrics.intent(d)
	}
	return err
}

// recipient is the owner's address, else the fallback, else empty.
func (s *Service) recipient(org *key.Org) string {
	if org != nil {
		if addr, err := mail.ParseAddress(org.OwnerEmail); err == nil {
			return addr.Address
		}
	}
	if addr, err := mail.ParseAddress(s.cfg.FallbackEmail); err == nil {
		return addr.Address
	}
	return ""
}
