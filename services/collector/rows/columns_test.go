package rows

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// TestAddColumns compares with the same events added one by one, some of them left out.
func TestAddColumns(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 21, 18, 0, 0, 0, time.UTC)
	varied := make([]usage.Event, 60)
	for i := range varied {
		varied[i] = usage.Event{
			ID: usage.UUID([16]byte{1, 6: 0x70, 8: 0x80, 15: byte(i * 7)}), Time: now.Add(time.Duration(i*i) * time.Millisecond),
			OrgID: fmt.Sprint("org_", i%3), KeyID: fmt.Sprint("key_", i%5), SourceIP: netip.AddrFrom4([4]byte{192, 0, 2, byte(i % 9)}),
			Method: []string{"GET", "POST"}[i%2], Route: fmt.Sprint("/", i%7), Status: uint16(200 + i%3), Scope: []string{"", "a:read"}[i%2],
			Decision: usage.Allow, UserAgent: fmt.Sprint("agent/", i%4), LatencyUS: uint32(i), RequestBytes: uint64(i * 1000),
			ResponseBytes: uint64(i) << 40, Gateway: "edge-1",
		}
		if i%10 == 3 {
			varied[i].SourceIP = netip.MustParseAddr("2001:db8::1")
			varied[i].Decision, varied[i].DenyReason = usage.Deny, usage.DenyRateLimited
		}
	}
	alike := slices.Repeat([]usage.Event{{
		Time: now, OrgID: "org_a", KeyID: "key_a", SourceIP: netip.MustParseAddr("192.0.2.1"), Route: "/", Decision: usage.Allow,
	}}, 5)
	for i := range alike {
		alike[i].ID = usage.UUID([16]byte{1, 15: byte(i)})
	}
	columns, plain := New(), New()
	var d usage.Decoder
	for n, events := range [][]usage.Event{varied, alike, varied[:1], varied[10:]} {
		c, ok := d.Columns(usage.ContentTypeProtobuf, usage.AppendBatch(nil, events), now)
		if !ok {
			t.Fatalf("batch %d is not taken", n)
		}
		at := Place{Stream: "USAGE", Partition: 3, Sequence: uint64(100 + n), IngestedAt: now, History: n%2 == 0}
		columns.Enter(c)
		left := len(events) / 2 // this one is left out
		columns.AddColumns(c, 0, left, &at)
		columns.AddColumns(c, min(left+1, len(events)), len(events), &at)
		for i := range events {
			if i != left {
				at.Index = uint32(i)
				plain.Add(&events[i], &at)
			}
		}
	}
	for i, c := range columns.Input() {
		if got, want := texts(c.Data), texts(plain.Input()[i].Data); !reflect.DeepEqual(got, want) {
			t.Errorf("column %s: got %v, want %v", c.Name, got, want)
		}
	}
}
