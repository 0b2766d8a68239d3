package rows

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

type placed struct {
	ev usage.Event
	at Place
}

func shuffled(n int) []placed {
	r := rand.New(rand.NewPCG(1, 2))
	events := make([]placed, n)
	start := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for i := range events {
		events[i] = placed{usage.Event{
			ID: fmt.Sprint("evt-", r.IntN(n), "-", i), Time: start.Add(time.Duration(r.IntN(n))), OrgID: fmt.Sprint("org_", r.IntN(3)),
			KeyID: fmt.Sprint("key_", r.IntN(5)), SourceIP: netip.AddrFrom4([4]byte{192, 0, 2, byte(r.IntN(256))}), Method: "GET",
			Route: fmt.Sprint("/", r.IntN(300)), Status: uint16(r.IntN(600)), Decision: usage.Allow, LatencyUS: r.Uint32(),
			RequestBytes: r.Uint64(), ResponseBytes: r.Uint64(),
		}, Place{"USAGE", uint16(r.IntN(16)), r.Uint64(), r.Uint32(), start.Add(time.Duration(r.IntN(1000)) * time.Millisecond), r.IntN(2) == 0}}
	}
	return events
}

// TestSort compares with rows that were sorted before they were added, column
// by column as they are sent.
func TestSort(t *testing.T) {
	t.Parallel()
	block := New()
	for _, n := range []int{0, 1, 700, 20} { // the memory of the larger one is used for the smaller one
		block.Reset()
		events := shuffled(n)
		for i := range events {
			block.Add(&events[i].ev, &events[i].at)
		}
		block.Sort()
		slices.SortStableFunc(events, func(a, b placed) int {
			return cmp.Or(cmp.Compare(a.ev.OrgID, b.ev.OrgID), cmp.Compare(a.ev.KeyID, b.ev.KeyID), a.ev.Time.Compare(b.ev.Time))
		})
		want := New()
		for i := range events {
			want.Add(&events[i].ev, &events[i].at)
		}
		for i, c := range block.Input() {
			if got, want := texts(c.Data), texts(want.Input()[i].Data); !reflect.DeepEqual(got, want) {
				t.Errorf("%d rows, column %s: got %v, want %v", n, c.Name, got, want)
			}
		}
	}
}

// texts are a column's values; those of a dictionary do not depend on the order of its words.
func texts(c proto.ColInput) []string {
	var out []string
	switch c := c.(type) {
	case *dict:
		for i := range c.Rows() {
			out = append(out, c.row(i))
		}
	case *proto.ColStr:
		for i := range c.Rows() {
			out = append(out, c.Row(i))
		}
	default:
		var b proto.Buffer
		c.EncodeColumn(&b)
		out = append(out, string(b.Buf))
	}
	return out
}

func TestSortDoesNotAllocate(t *testing.T) {
	events := shuffled(5000)
	block := New()
	fill := func() {
		block.Reset()
		for i := range events {
			block.Add(&events[i].ev, &events[i].at)
		}
		block.Sort()
	}
	fill()
	if n := testing.AllocsPerRun(10, fill); n > 5 {
		t.Errorf("a sort allocates %.0f times", n)
	}
}

func BenchmarkSort(b *testing.B) {
	events := shuffled(50_000)
	slices.SortFunc(events, func(a, b placed) int { return a.ev.Time.Compare(b.ev.Time) })
	block := New()
	for b.Loop() {
		b.StopTimer()
		block.Reset()
		for i := range events {
			block.Add(&events[i].ev, &events[i].at)
		}
		b.StartTimer()
		block.Sort()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/50_000, "ns/row")
}
