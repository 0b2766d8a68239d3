package collector

import (
	"context"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// bury publishes what could not be read to DEAD, with the reason. The message id
// follows from where it lay, so burying it again changes nothing.
func (c *Service) bury(ctx context.Context, stream string, d dead) error {
	data := d.data
	if limit := int(c.nc.MaxPayload()) - 16<<10; limit > 0 && len(data) > limit {
		data = data[:limit]
	}
	msg := &nats.Msg{Subject: bus.DeadSubject(bus.Collector), Data: data, Header: nats.Header{}}
	msg.Header.Set("Content-Type", d.contentType)
	msg.Header.Set(bus.HeaderReason, oneLine(d.reason.Error()))
	msg.Header.Set(bus.HeaderStream, stream)
	msg.Header.Set(bus.HeaderSubject, d.message.Subject)
	msg.Header.Set(bus.HeaderSequence, strconv.FormatUint(d.message.Sequence, 10))
	if d.index >= 0 {
		msg.Header.Set(bus.HeaderIndex, strconv.Itoa(d.index))
	}
	if mode := d.message.Header.Get(usage.HeaderMode); mode != "" {
		msg.Header.Set(usage.HeaderMode, mode)
	}
	id := fmt.Sprintf("dead:%s:%d:%d", stream, d.message.Sequence, d.index)
	if _, err := c.js.PublishMsg(ctx, msg, jetstream.WithMsgID(id)); err != nil {
		return fmt.Errorf("publish dead letter: %w", err)
	}
	return nil
}

// oneLine makes a text fit for a header.
func oneLine(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c == '\r' || c == '\n' {
			b[i] = ' '
		}
	}
	return string(b[:min(len(b), 1000)])
}
