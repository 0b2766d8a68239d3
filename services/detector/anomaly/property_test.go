package anomaly

import (
	"bytes"
	"cmp"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// script draws the events of one key over some weeks: habits, and now and then
// something else. Times ascend but for a few late ones.
func script(t *rapid.T, key string) []usage.Event {
	n := rapid.IntRange(1, 400).Draw(t, "events of "+key)
	at := start
	out := make([]usage.Event, 0, n)
	for i := range n {
		pause := rapid.SampledFrom([]time.Duration{
			0, time.Second, time.Minute, time.Hour, 5 * time.Hour, 24 * time.Hour, 200 * time.Hour, 900 * time.Hour,
		}).Draw(t, "pause")
		at = at.Add(pause + time.Duration(rapid.IntRange(0, 5000).Draw(t, "ms"))*time.Millisecond)
		when := at
		if rapid.IntRange(0, 30).Draw(t, "late") == 0 {
			when = at.Add(-rapid.SampledFrom([]time.Duration{time.Second, time.Hour, 90 * time.Hour}).Draw(t, "by"))
		}
		ev := usage.Event{
			ID: fmt.Sprintf("%s-%d", key, i), Time: when, OrgID: "org", KeyID: key,
			SourceIP: netip.AddrFrom4([4]byte{rapid.SampledFrom([]byte{84, 84, 84, 49, 145, 9}).Draw(t, "net"), 128, byte(rapid.IntRange(0, 2).Draw(t, "sub")), 7}),
			Method:   "POST", Route: rapid.SampledFrom([]string{"/a", "/a", "/b", "/c/7", "/d/{id}", "/e"}).Draw(t, "route"),
			Decision: usage.Allow,
		}
		if rapid.IntRange(0, 12).Draw(t, "denied") == 0 {
			ev.Decision, ev.DenyReason = usage.Deny, rapid.SampledFrom([]string{usage.DenyInsufficientScope, usage.DenyRevokedKey, usage.DenyRateLimited}).Draw(t, "reason")
		}
		out = append(out, ev)
	}
	return out
}

// observe plays events and collects the alerts, in the order of their key.
func observe(e *Engine, events []usage.Event) []alert.Alert {
	var out []alert.Alert
	for i := range events {
		out = append(out, e.Observe(&events[i], false)...)
	}
	slices.SortStableFunc(out, func(a, b alert.Alert) int { return cmp.Compare(a.KeyID, b.KeyID) })
	return out
}

// notGuessing leaves out refusals that count per source: guessing is about many
// keys by its nature.
func notGuessing(events []usage.Event) []usage.Event {
	return slices.DeleteFunc(events, func(ev usage.Event) bool { return ev.DenyReason == usage.DenyRevokedKey })
}

func TestShufflingKeysChangesNothing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		keys := []string{"k1", "k2", "k3"}
		var apart []usage.Event
		scripts := map[string][]usage.Event{}
		for _, k := range keys {
			s := notGuessing(script(t, k))
			scripts[k] = s
			apart = append(apart, s...)
		}
		var mixed []usage.Event
		for len(mixed) < len(apart) {
			k := rapid.SampledFrom(keys).Draw(t, "next")
			if s := scripts[k]; len(s) > 0 {
				mixed, scripts[k] = append(mixed, s[0]), s[1:]
			}
		}
		a, b := New(Options{Locate: world}), New(Options{Locate: world})
		if x, y := observe(a, apart), observe(b, mixed); !reflect.DeepEqual(x, y) {
			t.Fatalf("alerts differ: %d and %d", len(x), len(y))
		}
		for _, k := range keys {
			if !bytes.Equal(a.Encode(k), b.Encode(k)) {
				t.Fatalf("baselines of %s differ", k)
			}
		}
	})
}

func TestFloodStaysWithItsKey(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		quiet := notGuessing(script(t, "quiet"))
		flood := rapid.IntRange(1, 300).Draw(t, "flood per event")
		a, b := New(Options{Locate: world}), New(Options{Locate: world})
		alone := observe(a, quiet)
		var beside []alert.Alert
		for i := range quiet {
			for n := range flood {
				ev := quiet[i]
				ev.KeyID, ev.ID = "flood", fmt.Sprintf("f%d-%d", i, n)
				ev.SourceIP = netip.AddrFrom4([4]byte{byte(n), byte(i), byte(n * 7), 1})
				ev.Route = fmt.Sprintf("/flood/x%c%c/y", 'a'+n%26, 'a'+i%26)
				b.Observe(&ev, false)
			}
			beside = append(beside, b.Observe(&quiet[i], false)...)
		}
		if !reflect.DeepEqual(alone, beside) {
			t.Fatalf("another key's flood changed %d alerts into %d", len(alone), len(beside))
		}
		if !bytes.Equal(a.Encode("quiet"), b.Encode("quiet")) {
			t.Fatal("another key's flood changed a baseline")
		}
	})
}

func TestDecodeContinuesWhereEncodeStopped(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		events := script(t, "k")
		cut := rapid.IntRange(0, len(events)-1).Draw(t, "cut")
		whole, first := New(Options{Locate: world}), New(Options{Locate: world})
		want := observe(whole, events)
		got := observe(first, events[:cut])
		second := New(Options{Locate: world})
		if data := first.Encode("k"); data != nil {
			if err := second.Decode("k", data); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(second.Encode("k"), data) {
				t.Fatal("decode and encode change the bytes")
			}
			if err := second.DecodeSources(first.EncodeSources()); err != nil {
				t.Fatal(err)
			}
		}
		got = append(got, observe(second, events[cut:])...)
		if !sameAlerts(want, got) {
			t.Fatalf("alerts differ after a restart at %d: %v and %v", cut, want, got)
		}
		if !bytes.Equal(whole.Encode("k"), second.Encode("k")) {
			t.Fatal("baselines differ after a restart")
		}
	})
}

func sameAlerts(a, b []alert.Alert) bool {
	return slices.EqualFunc(a, b, func(x, y alert.Alert) bool {
		x.Time, y.Time = x.Time.UTC(), y.Time.UTC()
		x.DetectedAt, y.DetectedAt = x.DetectedAt.UTC(), y.DetectedAt.UTC()
		return reflect.DeepEqual(x, y)
	})
}

// stateBound is the promise of the package's README, in bytes a key.
const stateBound = 8 << 10

func TestStateIsBounded(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := New(Options{Locate: world})
		events := script(t, "k")
		for i := range events {
			events[i].Route = "/" + rapid.StringMatching(`[a-z/]{1,300}`).Draw(t, "path")
			e.Observe(&events[i], false)
			if n := len(e.Encode("k")); n > stateBound {
				t.Fatalf("%d bytes", n)
			}
		}
	})
}

func TestDuplicatesAndLateEventsRaiseNothing(t *testing.T) {
	t.Parallel()
	f := &feed{Engine: New(Options{Locate: world})}
	end := f.month("k")
	stranger := usage.Event{
		ID: "x", Time: end.Add(-50 * time.Hour), OrgID: "org", KeyID: "k", SourceIP: netip.MustParseAddr("145.1.2.3"),
		Method: "GET", Route: "/v1/users", Decision: usage.Allow,
	}
	for i := range 5000 {
		ev := stranger
		ev.ID = fmt.Sprintf("late-%d", i)
		if out := f.Observe(&ev, false); len(out) > 0 {
			t.Fatalf("a backfill raised %s", out[0].Summary)
		}
	}
	now := stranger
	now.Time = end
	first := f.Observe(&now, false)
	if len(first) != 1 {
		t.Fatalf("%d alerts, want 1", len(first))
	}
	before := f.Encode("k")
	for range 10 {
		if out := f.Observe(&now, false); len(out) > 0 {
			t.Fatal("a duplicate raised an alert")
		}
	}
	if !bytes.Equal(before, f.Encode("k")) {
		t.Error("a duplicate changed the baseline")
	}
}

func FuzzDecode(f *testing.F) {
	feed := &feed{Engine: New(Options{Locate: world})}
	at := feed.month("k")
	f.Add(feed.Encode("k"))
	feed.send("k", at, "145.1.1.1", "GET", "/v1/users")
	f.Add(feed.Encode("k"))
	f.Fuzz(func(t *testing.T, data []byte) {
		e := New(Options{Locate: world})
		if e.Decode("k", data) != nil {
			return
		}
		ev := usage.Event{
			ID: "1", Time: at, OrgID: "org", KeyID: "k", SourceIP: netip.MustParseAddr("145.1.1.1"),
			Method: "GET", Route: "/v1/other", Decision: usage.Allow,
		}
		for range 3 {
			ev.Time = ev.Time.Add(20 * time.Minute)
			e.Observe(&ev, false)
		}
		e.Baseline("k")
		e.Encode("k")
	})
}
