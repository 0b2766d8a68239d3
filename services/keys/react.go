package keys

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// runReactions does what policies want done about alerts.
func (s *Service) runReactions(ctx context.Context) error {
	cfg := jetstream.ConsumerConfig{Durable: "keys-reactions", DeliverPolicy: jetstream.DeliverAllPolicy}
	return s.work(ctx, bus.Alerts, cfg, func(ctx context.Context, m jetstream.Msg) error {
		var a alert.Alert
		if err := json.Unmarshal(m.Data(), &a); err != nil {
			s.log.Error("alert cannot be read, no policy acts on it", "subject", m.Subject(), "error", err)
			return nil
		}
		return s.react(ctx, a)
	})
}

// react rotates or suspends the key of an alert, once an alert: when a person
// resumes the key, the alert's growing does not stop it again.
func (s *Service) react(ctx context.Context, a alert.Alert) error {
	if a.Historical || !validKeyID(a.KeyID) || !validKeyID(a.ID) {
		return nil
	}
	stored, err := s.store.read(ctx, a.KeyID)
	if errors.Is(err, errNoKey) {
		return nil
	}
	if err != nil {
		return err
	}
	r := stored.Record
	action := reaction(effective(r.Policy, s.orgs.policy(r.OrgID)), a.Severity)
	if action == key.ReactNotify || r.OrgID != a.OrgID || ended(r, s.now()) {
		return nil
	}
	if _, err := s.said.Get(ctx, a.ID); !errors.Is(err, jetstream.ErrKeyNotFound) {
		return err
	}
	reason := "alert " + a.ID + " (" + a.Severity + ")"
	switch action {
	case key.ReactRotate:
		_, err = s.rotate(ctx, system, r.ID, rotateOptions{grace: grace(effective(r.Policy, s.orgs.policy(r.OrgID))), unclaimed: true, reason: reason}, rotatable)
	case key.ReactSuspend:
		_, err = s.suspend(ctx, system, r.ID, reason, s.keepOneAdmin)
	}
	if err == nil {
		s.metrics.changes.WithLabelValues(action, "alert").Inc()
		s.log.Info("policy acted on an alert", "action", action, "key_id", r.ID, "org_id", r.OrgID, "alert_id", a.ID, "severity", a.Severity)
	}
	if err = ignoreProblem(err); err != nil {
		return err
	}
	_, err = s.said.Put(ctx, a.ID, []byte(`{"action":"`+action+`"}`))
	return err
}

// ignoreProblem drops what trying again cannot mend: the key is in a state that
// does not allow the action, for instance because it was rotated already.
func ignoreProblem(err error) error {
	var p *api.Problem
	if errors.As(err, &p) {
		return nil
	}
	return err
}
