package collector

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// TestSeenForgetsTheOldest: of more events than it remembers each one that comes
// again is suspected, and of the new ones hardly any.
func TestSeenForgetsTheOldest(t *testing.T) {
	t.Parallel()
	const n = 3 * maxSeen
	start := time.Now().UTC()
	event := func(i int) *usage.Event {
		// A little out of order, as several gateways publish.
		at := start.Add(time.Duration(i-i%7*3) * 10 * time.Microsecond)
		return &usage.Event{ID: fmt.Sprint(i), KeyID: "key_a", Time: at}
	}
	s := &seen{complete: math.MinInt64}
	suspects := 0
	for i := range n {
		if s.testAndAdd(event(i)) {
			suspects++
		}
	}
	if suspects > n/1000 {
		t.Errorf("%d of %d new events are suspects", suspects, n)
	}
	if s.complete == math.MinInt64 {
		t.Fatal("nothing was forgotten")
	}
	for i := range n {
		if !s.testAndAdd(event(i)) {
			t.Fatalf("event %d came again and is no suspect", i)
		}
	}
	size := 0
	for _, table := range s.tables {
		size += 4 * len(table.slots)
	}
	if size > 8<<20 {
		t.Errorf("%d bytes for one partition", size)
	}
}
