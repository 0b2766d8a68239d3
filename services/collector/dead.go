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

// deadHeaders is more than the headers of a dead letter take, in bytes, with a
// subject as long as it can be.
const deadHeaders = 8 << 10

// bury publishes what could not be read to DEAD, with the reason. The message id
// follows from where it lay, so burying it again changes nothing.
func (c *Service) bury(ctx context.Context, stream string, d dead) error {
	data, reason := d.data, oneLine(d.reason.Error())
	if limit := int(c.nc.MaxPayload()) - deadHeaders; limit > 0 && len(data) > limit {
		data = data[:limit]
		reason += fmt.Sprintf(" (cut from %d bytes)", len(d.data))
	}
	msg := &nats.Msg{Subject: bus.DeadSubject(bus.Collector), Data: data, Header: nats.Header{}}
	msg.Header.Set("Content-Type", short(d.contentType))
	msg.Header.Set(bus.HeaderReason, reason)
	msg.Header.Set(bus.HeaderStream, stream)
	msg.Header.Set(bus.HeaderSubject, d.message.Subject)
	msg.Header.Set(bus.HeaderSequence, strconv.FormatUint(d.message.Sequence, 10))
	if d.index >= 0 {
		msg.Header.Set(bus.HeaderIndex, strconv.Itoa(d.index))
	}
	if mode := d.message.Header.Get(usage.HeaderMode); mode != "" {
		msg.Header.Set(usage.HeaderMode, short(mode))
	}
	id := fmt.Sprintf("dead:%s:%d:%d", stream, d.message.Sequence, d.index)
	if _, err := c.js.PublishMsg(ctx, msg, jetstream.WithMsgID(id)); err != nil {
		return fmt.Errorf("publish dead letter: %w", err)
	}
	return nil
}

// short cuts a header that a dead letter takes over: the two would not fit into
// one message otherwise, if a publisher made it as long as it can be.
func short(header string) string { return header[:min(len(header), 200)] }

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
