package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/mailbox"
)

// follow subscribes to alerts from now on.
func (d *demo) follow(ctx context.Context) (<-chan alert.Alert, error) {
	consumer, err := d.cfg.JetStream.OrderedConsumer(ctx, bus.Alerts, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverNewPolicy})
	if err != nil {
		return nil, fmt.Errorf("follow alerts: %w", err)
	}
	out := make(chan alert.Alert, 64)
	consuming, err := consumer.Consume(func(msg jetstream.Msg) {
		var a alert.Alert
		if err := json.Unmarshal(msg.Data(), &a); err != nil {
			d.log.Warn("an alert cannot be read", "error", err)
			return
		}
		select {
		case out <- a:
		case <-ctx.Done():
		}
	})
	if err != nil {
		return nil, fmt.Errorf("follow alerts: %w", err)
	}
	context.AfterFunc(ctx, consuming.Stop)
	return out, nil
}

// watch tells of each alert and each mail as it comes, and closes complete once
// each of the four attacks has led to its mail.
func (d *demo) watch(ctx context.Context, alerts <-chan alert.Alert, complete chan<- struct{}) error {
	seen := map[string]bool{}
	if d.cfg.Mails != nil {
		for _, m := range d.cfg.Mails.List() {
			seen[m.ID] = true
		}
	}
	ticker := time.NewTicker(250 * time.Millisecond)
	defer ticker.Stop()
	var mails []*mailbox.Mail
	for {
		select {
		case <-ctx.Done():
			return nil
		case a := <-alerts:
			d.onAlert(a)
		case <-ticker.C:
			mails = append(mails, d.newMails(seen)...)
		}
		if d.match(mails) && complete != nil {
			close(complete)
			complete = nil
		}
	}
}

// newMails are those not seen before, told of on the terminal.
func (d *demo) newMails(seen map[string]bool) []*mailbox.Mail {
	if d.cfg.Mails == nil {
		return nil
	}
	var out []*mailbox.Mail
	for _, s := range d.cfg.Mails.List() {
		if seen[s.ID] {
			continue
		}
		seen[s.ID] = true
		d.say("%s  ✉ to %s: %s", stamp(d.now()), strings.Join(s.To, ", "), s.Subject)
		m, err := d.cfg.Mails.Get(s.ID)
		if err != nil {
			d.log.Warn("a mail cannot be read", "error", err)
			continue
		}
		out = append(out, m)
	}
	return out
}

// match finds the mail of each attack's alert by the alert's id in its headers,
// and tells whether every attack has one.
func (d *demo) match(mails []*mailbox.Mail) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for part, a := range d.alerts {
		for _, m := range mails {
			for _, values := range m.Headers {
				if slices.ContainsFunc(values, func(v string) bool { return strings.Contains(v, a.ID) }) {
					d.mails[part] = m.Subject
				}
			}
		}
	}
	return len(d.mails) == len(attacks())
}

func (d *demo) onAlert(a alert.Alert) {
	if a.Historical || a.Revision > 1 {
		return
	}
	name := a.KeyID
	for _, k := range d.keys {
		if k.ID != a.KeyID {
			continue
		}
		name = k.Name
		for _, at := range attacks() {
			if at.part == k.Part && slices.Contains(a.Triggers, at.trigger) {
				d.mu.Lock()
				d.alerts[k.Part] = a
				d.mu.Unlock()
			}
		}
	}
	d.say("%s  ▲ %-8s %s: %s", stamp(d.now()), strings.ToUpper(a.Severity), name, a.Summary)
}
