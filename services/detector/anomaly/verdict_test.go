package anomaly

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

func TestVerdicts(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		verdict string
		again   bool // the same network alerts anew a week later
		other   bool // a further strange network alerts
	}{
		{Expected, false, false},
		{Planned, false, true},
		{Compromised, true, true},
	} {
		t.Run(c.verdict, func(t *testing.T) {
			t.Parallel()
			f := &feed{Engine: New(Options{Locate: world})}
			at := f.month("k")
			first := f.send("k", at, "145.10.1.1", "POST", "/v1/readings")
			if len(first) != 1 {
				t.Fatalf("%d alerts, want 1", len(first))
			}
			f.Verdict("k", first[0].ID, c.verdict, at)
			f.Verdict("k", "alrt_unknown", Compromised, at)
			at = at.Add(8 * 24 * time.Hour)
			for i := range 10 {
				f.send("k", at.Add(time.Duration(i-10)*time.Hour), "84.128.1.9", "POST", "/v1/readings")
			}
			if got := len(f.send("k", at, "145.10.1.1", "POST", "/v1/readings")) > 0; got != c.again {
				t.Errorf("the same network: alert %v, want %v", got, c.again)
			}
			if c.again {
				return
			}
			if got := len(f.send("k", at.Add(time.Minute), "49.12.1.1", "POST", "/v1/readings")) > 0; got != c.other {
				t.Errorf("another network: alert %v, want %v", got, c.other)
			}
		})
	}
}

func TestInheritance(t *testing.T) {
	t.Parallel()
	f := &feed{Engine: New(Options{Locate: world})}
	at := f.month("old")
	f.Inherit("new", "old")
	if out := f.send("new", at, "84.128.1.9", "POST", "/v1/readings"); len(out) != 0 {
		t.Errorf("the successor's ordinary use raised %s", out[0].Summary)
	}
	if out := f.send("new", at.Add(time.Minute), "145.10.1.1", "POST", "/v1/readings"); len(out) != 1 {
		t.Error("a stolen successor raised nothing")
	}
	row, ok := f.Baseline("new")
	if !ok || row.ParentKeyID != "old" || row.Maturity < 0.9 || len(row.HourOfWeek) != 168 {
		t.Errorf("baseline %+v", row)
	}
	if row.Networks[0].Value != "84.128.1.0/24" || row.Countries[0].Value != "DE" || !strings.HasPrefix(row.ASNs[0].Value, "AS3320 Deutsche") {
		t.Errorf("networks %v, countries %v, ASNs %v", row.Networks, row.Countries, row.ASNs)
	}
	if row.Routes[0].Value != "POST /v1/readings" || row.Routes[0].Share < 0.9 {
		t.Errorf("routes %v", row.Routes)
	}
	if _, ok := f.Baseline("unknown"); ok {
		t.Error("an unknown key has a baseline")
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		reason, want string
		keys, tries  int
	}{
		{usage.DenyInvalidKey, alert.KeyGuessing, 10, 10},
		{usage.DenyInvalidKey, alert.KeyGuessing, 1, 50},
		{usage.DenyRevokedKey, alert.RevokedKey, 1, 1},
		{usage.DenyInsufficientScope, alert.ScopeProbing, 1, 8},
		{usage.DenyInvalidKey, "", 1, 5},
		{usage.DenyRateLimited, "", 1, 5},
		{usage.DenyInsufficientScope, "", 1, 2},
		{usage.DenyIPNotAllowed, "", 1, 20},
	} {
		f := &feed{Engine: New(Options{Locate: world})}
		at := f.month("k0")
		seen := map[string]bool{}
		for i := range c.tries {
			ev := usage.Event{
				ID: fmt.Sprintf("d%d", i), Time: at.Add(time.Duration(i) * time.Second), OrgID: "org", KeyID: fmt.Sprintf("k%d", i%c.keys),
				SourceIP: netip.MustParseAddr("84.128.1.9"), Method: "POST", Route: "/v1/readings", Decision: usage.Deny, DenyReason: c.reason,
			}
			for _, a := range f.Observe(&ev, false) {
				seen[a.ID] = true
				if !slices.Contains(a.Triggers, c.want) {
					t.Errorf("%s: triggers %v, want %s", c.reason, a.Triggers, c.want)
				}
			}
		}
		if c.want != "" && len(seen) != 1 {
			t.Errorf("%s of %d keys, %d times: %d alerts, want 1", c.reason, c.keys, c.tries, len(seen))
		}
	}
}

func TestGuessedKeysFillNoMemory(t *testing.T) {
	t.Parallel()
	e := New(Options{})
	for i := range 20_000 {
		ev := usage.Event{
			Time: start.Add(time.Duration(i) * time.Millisecond), OrgID: "org", KeyID: fmt.Sprintf("guess-%d", i),
			SourceIP: netip.MustParseAddr("203.0.113.5"), Route: "/", Decision: usage.Deny, DenyReason: usage.DenyInvalidKey,
		}
		e.Observe(&ev, false)
	}
	if e.Keys() > 5 {
		t.Errorf("%d baselines of keys that do not exist", e.Keys())
	}
}

func TestOrdinaryEventsAllocateNothing(t *testing.T) {
	f := &feed{Engine: New(Options{Locate: world})}
	at := f.month("k")
	ev := usage.Event{
		OrgID: "org", KeyID: "k", SourceIP: netip.MustParseAddr("84.128.1.9"), Method: "POST", Route: "/v1/readings", Decision: usage.Allow,
	}
	if n := testing.AllocsPerRun(200, func() {
		at = at.Add(2 * time.Minute)
		ev.Time = at
		f.Observe(&ev, false)
	}); n != 0 {
		t.Errorf("%.2f allocations an event", n)
	}
}

// TestClockAhead: one event from a clock that runs days ahead must not make the
// key blind to what follows.
func TestClockAhead(t *testing.T) {
	t.Parallel()
	f := &feed{Engine: New(Options{Locate: world})}
	at := f.month("k")
	f.send("k", at.Add(5*24*time.Hour), "84.128.1.9", "POST", "/v1/readings")
	f.send("k", at.Add(time.Minute), "84.128.1.9", "POST", "/v1/readings")
	if out := f.send("k", at.Add(2*time.Minute), "145.10.1.1", "POST", "/v1/readings"); len(out) != 1 {
		t.Errorf("%d alerts after a leap of the clock, want 1", len(out))
	}
}
