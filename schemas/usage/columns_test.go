package usage_test

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	usagev1 "github.com/latchkey-dev/latchkey/schemas/usage/v1"
)

var update = flag.Bool("update", false, "write the golden files anew")

// traffic is what an edge sends in a few milliseconds: some keys, some dozen
// addresses, routes and agents.
func traffic(n int, seed uint64) []usage.Event {
	r := rand.New(rand.NewPCG(seed, 1))
	agents := []string{"terraform/1.9.5 (+https://www.terraform.io)", "python-requests/2.32.3", "Go-http-client/2.0", "curl/8.7.1"}
	events := make([]usage.Event, n)
	at := now.Add(-time.Hour)
	for i := range events {
		at = at.Add(time.Duration(r.IntN(200_000)))
		key := r.IntN(12)
		route := r.IntN(20)
		ev := usage.Event{
			Time: at, OrgID: fmt.Sprintf("org_01J9Z8XK%04d", key%4), KeyID: fmt.Sprintf("key_01J9Z8XKQ2W3E4R5T6Y7%04d", key),
			SourceIP: netip.AddrFrom4([4]byte{203, 0, byte(key), byte(r.IntN(8))}), Method: []string{"GET", "GET", "POST"}[route%3],
			Route: fmt.Sprintf("/v1/devices/{id}/resource-%d", route), Status: []uint16{200, 200, 200, 404}[r.IntN(4)],
			Scope: []string{"devices:read", "devices:read", "devices:write"}[route%3], Decision: usage.Allow,
			UserAgent: agents[key%4], LatencyUS: uint32(200 + r.IntN(20_000)), RequestBytes: uint64(r.IntN(2000)),
			ResponseBytes: uint64(r.IntN(20_000)), Gateway: "edge-1",
		}
		if key == 11 {
			ev.SourceIP = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(r.IntN(8))})
			ev.Decision, ev.DenyReason, ev.Status = usage.Deny, usage.DenyRateLimited, 429
		}
		ev.ID = randomV7(r, at)
		events[i] = ev
	}
	return events
}

// randomV7 is a UUID of version 7: 48 bits of time, the rest random.
func randomV7(r *rand.Rand, at time.Time) string {
	var id [16]byte
	binary.BigEndian.PutUint64(id[:], uint64(at.UnixMilli())<<16|0x7000|r.Uint64N(1<<12))
	binary.BigEndian.PutUint64(id[8:], 1<<63|r.Uint64N(1<<62))
	return usage.UUID(id)
}

func decodeAll(t testing.TB, body []byte) []usage.Event {
	t.Helper()
	var events []usage.Event
	if err := usage.Decode(usage.ContentTypeProtobuf, body, now, func(i int, ev *usage.Event, err error) {
		if err != nil {
			t.Fatalf("event %d: %v", i, err)
		}
		events = append(events, *ev)
	}); err != nil {
		t.Fatal(err)
	}
	return events
}

func TestColumnsRoundTrip(t *testing.T) {
	t.Parallel()
	counting := traffic(300, 2)
	for i := range counting {
		counting[i].ID = usage.UUID([16]byte{1, 2, 6: 0x70, 8: 0x80, 13: 7, 14: byte((i + 250) >> 8), 15: byte(i + 250)})
	}
	noIDs, texts, mixed, upper := traffic(50, 3), traffic(50, 4), traffic(50, 5), traffic(5, 6)
	for i := range noIDs {
		noIDs[i].ID = ""
		texts[i].ID = fmt.Sprint("evt.", i)
	}
	mixed[20].ID, mixed[40].ID = "", "x"
	upper[1].ID = "ABCDEFAB-0000-7000-8000-000000000000"
	lateFirst := traffic(10, 7)
	lateFirst[0].ID = ""
	for name, events := range map[string][]usage.Event{
		"uuids": traffic(200, 1), "one": traffic(1, 1), "counting": counting, "no ids": noIDs, "texts": texts, "mixed": mixed,
		"upper case": upper, "first without": lateFirst, "not in order": append(traffic(20, 1), traffic(20, 9)...),
	} {
		body := usage.AppendBatch(nil, events)
		if got := decodeAll(t, body); !reflect.DeepEqual(got, events) {
			for i := range events {
				if i >= len(got) || !reflect.DeepEqual(got[i], events[i]) {
					t.Errorf("%s: event %d\ngot  %+v\nwant %+v", name, i, got[min(i, len(got)-1)], events[i])
					break
				}
			}
		}
	}
}

func TestColumnsAreSmall(t *testing.T) {
	t.Parallel()
	events := traffic(200, 1)
	body := usage.AppendBatch(nil, events)
	if size := float64(len(body)) / float64(len(events)); size > 40 {
		t.Errorf("%.1f bytes an event with random UUIDs, want at most 40", size)
	} else {
		t.Logf("%.1f bytes an event with random UUIDs", size)
	}
	for i := range events {
		events[i].ID = usage.UUID([16]byte{1, 2, 6: 0x70, 8: 0x80, 15: byte(i)})
	}
	t.Logf("%.1f bytes an event with a publisher's ids", float64(len(usage.AppendBatch(nil, events)))/200)
}

// TestColumnsGolden keeps the format: what was written once is read for ever.
func TestColumnsGolden(t *testing.T) {
	t.Parallel()
	events := traffic(200, 1)
	var lines []byte
	for i := range events {
		lines = append(events[i].AppendJSON(lines), '\n')
	}
	batch := usage.AppendBatch(nil, events)
	for name, content := range map[string][]byte{"columns-v1.bin": batch, "columns-v1.ndjson": lines} {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		golden, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(golden, content) {
			t.Errorf("%s differs from what is written now", path)
		}
	}
}

func TestColumnsRefuse(t *testing.T) {
	t.Parallel()
	good := &usagev1.UsageColumns{
		Version: 1, Count: 2, Time: []int64{now.UnixNano(), 5}, OrgId: []string{"o"}, KeyId: []string{"k"},
		Method: []string{"GET"}, Route: []string{"/"}, Scope: []string{""}, Decision: []string{"allow"}, DenyReason: []string{""},
		Status: []uint32{200}, UserAgent: []string{"a"}, Gateway: []string{""}, Ip4: []byte{1, 2, 3, 4},
	}
	for name, tc := range map[string]struct {
		change func(*usagev1.UsageColumns)
		want   []string
	}{
		"nothing":             {func(*usagev1.UsageColumns) {}, []string{"ok", "ok"}},
		"version":             {func(c *usagev1.UsageColumns) { c.Version = 2 }, []string{"columns: version 2 is not known, only 1; none of the batch can be read"}},
		"too many":            {func(c *usagev1.UsageColumns) { c.Count = 1 << 30 }, []string{"columns: there are fewer times than events; none of the batch can be read"}},
		"key not there":       {func(c *usagev1.UsageColumns) { c.Caller = []uint32{0, 7} }, []string{"ok", "org_id is required; key_id is required"}},
		"address not there":   {func(c *usagev1.UsageColumns) { c.Source = []uint32{1, 0} }, []string{"source_ip is required", "ok"}},
		"client not there":    {func(c *usagev1.UsageColumns) { c.Client = []uint32{0, 9} }, []string{"ok", "client 9 is not in the dictionary"}},
		"column ends":         {func(c *usagev1.UsageColumns) { c.LatencyUs = []uint64{5} }, []string{"columns: column 24 ends early; none of the batch can be read"}},
		"status":              {func(c *usagev1.UsageColumns) { c.Status = []uint32{5000} }, []string{"status 5000 is no HTTP status", "status 5000 is no HTTP status"}},
		"dictionaries differ": {func(c *usagev1.UsageColumns) { c.Route = []string{"/", "/b"} }, []string{"columns: method, route and scope differ in length; none of the batch can be read"}},
		"time ahead":          {func(c *usagev1.UsageColumns) { c.Time[1] = int64(time.Hour) }, []string{"ok", "time 2026-11-21T19:00:00Z is more than 5m0s in the future"}},
	} {
		c := proto.Clone(good).(*usagev1.UsageColumns)
		tc.change(c)
		body, err := proto.Marshal(&usagev1.UsageBatch{Columns: c})
		if err != nil {
			t.Fatal(err)
		}
		if _, got := decode(t, usage.ContentTypeProtobuf, string(body)); !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

// checkColumns compares the events of Columns, if it takes the batch, with those of Decode.
func checkColumns(t testing.TB, body []byte, want []usage.Event) bool {
	t.Helper()
	var d usage.Decoder
	c, ok := d.Columns(usage.ContentTypeProtobuf, body, now)
	if !ok {
		return false
	}
	if c.Rows != len(want) {
		t.Fatalf("%d rows, want %d", c.Rows, len(want))
	}
	for i := range want {
		var got usage.Event
		if err := c.Event(i, &got); err != nil {
			t.Fatalf("row %d: %v", i, err)
		}
		if got != want[i] {
			t.Fatalf("row %d is %+v, want %+v", i, got, want[i])
		}
	}
	return true
}

// TestColumnsAreTaken checks which batches go the short way: those without a flaw and
// with UUIDs.
func TestColumnsAreTaken(t *testing.T) {
	t.Parallel()
	odd := func(change func(*usage.Event)) []usage.Event {
		events := traffic(20, 3)
		change(&events[7])
		return events
	}
	for name, tc := range map[string]struct {
		events []usage.Event
		taken  bool
	}{
		"plain":        {traffic(200, 1), true},
		"one":          {traffic(1, 1), true},
		"denied":       {odd(func(ev *usage.Event) { ev.Decision, ev.DenyReason = usage.Deny, "" }), true},
		"an id":        {odd(func(ev *usage.Event) { ev.ID = "evt-1" }), false},
		"no id":        {odd(func(ev *usage.Event) { ev.ID = "" }), false},
		"no key":       {odd(func(ev *usage.Event) { ev.KeyID = "" }), false},
		"a bad org":    {odd(func(ev *usage.Event) { ev.OrgID = "a b" }), false},
		"no route":     {odd(func(ev *usage.Event) { ev.Route = "" }), false},
		"ahead":        {odd(func(ev *usage.Event) { ev.Time = now.Add(time.Hour) }), false},
		"just ahead":   {odd(func(ev *usage.Event) { ev.Time = now.Add(usage.MaxAhead) }), true},
		"ancient":      {odd(func(ev *usage.Event) { ev.Time = time.Unix(0, 0) }), false},
		"bad decision": {odd(func(ev *usage.Event) { ev.Decision = "perhaps" }), false},
		"bad status":   {odd(func(ev *usage.Event) { ev.Status = 60_000 }), false},
	} {
		body := usage.AppendBatch(nil, tc.events)
		var want []usage.Event
		_ = usage.Decode(usage.ContentTypeProtobuf, body, now, func(_ int, ev *usage.Event, err error) {
			if err == nil {
				want = append(want, *ev)
			}
		})
		if taken := checkColumns(t, body, want); taken != tc.taken {
			t.Errorf("%s: taken %v, want %v", name, taken, tc.taken)
		}
		var d usage.Decoder
		if _, ok := d.Columns(usage.ContentTypeProtobuf, append(body, body...), now); ok {
			t.Errorf("%s: two batches in one body are taken", name)
		}
	}
}

// FuzzColumns has the generated code as its oracle for what the columns say.
func FuzzColumns(f *testing.F) {
	f.Add(usage.AppendBatch(nil, traffic(3, 1)))
	f.Add(usage.AppendBatch(nil, traffic(20, 2)))
	f.Fuzz(func(t *testing.T, data []byte) {
		var got []usage.Event
		_ = usage.Decode(usage.ContentTypeProtobuf, data, now, func(_ int, ev *usage.Event, err error) {
			if err == nil {
				got = append(got, *ev)
			}
		})
		var batch usagev1.UsageBatch
		if proto.Unmarshal(data, &batch) != nil || len(batch.Events) > 0 || len(got) == 0 || uint32(len(got)) != batch.GetColumns().GetCount() {
			return
		}
		c, ns := batch.Columns, int64(0)
		for i, ev := range got {
			if i < len(c.Time) {
				ns += c.Time[i]
			}
			at := uint32(0)
			if i < len(c.Caller) {
				at = c.Caller[i]
			}
			if ev.Time.UnixNano() != ns || ev.KeyID != c.KeyId[at] {
				t.Fatalf("event %d is %+v", i, ev)
			}
		}
		checkColumns(t, data, got)
		// What was read can be written and read again.
		if again := decodeAll(t, usage.AppendBatch(nil, got)); !reflect.DeepEqual(again, got) {
			t.Errorf("round trip differs")
		}
	})
}

func BenchmarkColumns(b *testing.B) {
	events := traffic(200, 1)
	body := usage.AppendBatch(nil, events)
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		var out []byte
		for b.Loop() {
			out = usage.AppendBatch(out[:0], events)
		}
		b.ReportMetric(float64(b.N)*200/b.Elapsed().Seconds(), "events/s")
	})
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		var d usage.Decoder
		for b.Loop() {
			if err := d.Decode(usage.ContentTypeProtobuf, body, now, func(_ int, _ *usage.Event, err error) {
				if err != nil {
					b.Fatal(err)
				}
			}); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(b.N)*200/b.Elapsed().Seconds(), "events/s")
	})
	b.Run("columns", func(b *testing.B) {
		b.ReportAllocs()
		var d usage.Decoder
		for b.Loop() {
			if _, ok := d.Columns(usage.ContentTypeProtobuf, body, now); !ok {
				b.Fatal("not taken")
			}
		}
		b.ReportMetric(float64(b.N)*200/b.Elapsed().Seconds(), "events/s")
	})
}

// TestRefusedFrameIsKeptWhole: a service that was taught to read a frame reads what
// was kept of it.
func TestRefusedFrameIsKeptWhole(t *testing.T) {
	t.Parallel()
	newer := &usagev1.UsageColumns{Version: 2, Count: 1, Time: []int64{now.UnixNano()}, OrgId: []string{"o"}, KeyId: []string{"k"}}
	short := &usagev1.UsageColumns{Version: 1, Count: 2, Time: []int64{now.UnixNano()}}
	for _, c := range []*usagev1.UsageColumns{newer, short} {
		body, err := proto.Marshal(&usagev1.UsageBatch{Columns: c})
		if err != nil {
			t.Fatal(err)
		}
		first := usage.AppendBatch(nil, traffic(2, 1))
		var d usage.Decoder
		refused := 0
		if err := d.Decode(usage.ContentTypeProtobuf, append(first, body...), now, func(_ int, _ *usage.Event, err error) {
			if err == nil {
				return
			}
			refused++
			if data, contentType := d.Element(); !bytes.Equal(data, body) || contentType != usage.ContentTypeProtobuf {
				t.Errorf("%v: kept %q (%s), want %q", err, data, contentType, body)
			}
		}); err != nil || refused != 1 {
			t.Errorf("%d refused, %v", refused, err)
		}
	}
	if _, got := decode(t, usage.ContentTypeProtobuf, "\x10\x07"); !reflect.DeepEqual(got, []string{"not valid protobuf: field 2 has wire type 0"}) {
		t.Errorf("%q", got)
	}
}
