package usage_test

import (
	"context"
	"log"
	"net/netip"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/latchkey-dev/latchkey/pkg/usage"
	schema "github.com/latchkey-dev/latchkey/schemas/usage"
)

// A gateway tells of each request without waiting for anybody.
func Example() {
	nc, err := nats.Connect("nats://127.0.0.1:4222")
	if err != nil {
		log.Print(err)
		return
	}
	defer nc.Close()
	p, err := usage.New(context.Background(), nc, usage.Options{})
	if err != nil {
		log.Print(err)
		return
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := p.Close(ctx); err != nil { // flushes first
			log.Printf("%v: %+v", err, p.Stats())
		}
	}()

	event := schema.Event{
		Time: time.Now(), OrgID: "org_acme", KeyID: "key_01J", SourceIP: netip.MustParseAddr("203.0.113.7"),
		Method: "GET", Route: "/v1/devices/{id}", Status: 200,
	}
	event.Normalize()
	if err := event.Validate(time.Now()); err != nil {
		log.Print(err)
		return
	}
	if !p.Enqueue(&event) {
		log.Print("the queue is full, the event is dropped and counted")
	}
}
