// Package anomaly is the detector's mathematics: usage events in, alerts out.
//
// It is pure: no clock, no network, no goroutine, no random number and no
// dependence on map order. All time is event time. What it knows of a key is a
// few fixed arrays of about two kilobytes, so a partition with a million keys
// fits in memory, and [Engine.Encode] and [Engine.Decode] carry it across a restart.
//
// One event is judged by each trigger on its own (network.go, volume.go, route.go,
// dormant.go, deny.go); every judgement is a score, the negative decimal logarithm
// of the probability that the key's own habits produce the like, and [Options.Budget]
// is the one knob that says how large a score must be. Scores of an hour combine,
// and what a key does within a day of an alert belongs to the same episode.
package anomaly

import (
	"math"
	"net/netip"
	"time"
	"unique"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/geo"
)

// DefaultBudget is one false alert per key and year, in false alerts per key-month.
const DefaultBudget = 1.0 / 12

// Options of an [Engine].
type Options struct {
	// Budget is the accepted number of false alerts per key and month; 0 is [DefaultBudget].
	Budget float64
	// BudgetOf is the budget of one key where it differs, 0 where it does not. It is
	// asked when a key is first seen, when it is decoded, and by [Engine.Rebudget]. May be nil.
	BudgetOf func(orgID, keyID string) float64
	// Locate tells the country and operator of an address. It may be nil, and it
	// must be a pure function: its answers are cached.
	Locate func(netip.Addr) geo.Location
}

// Engine holds the baselines of the keys of one partition. It is not safe for
// concurrent use.
type Engine struct {
	opts    Options
	keys    table
	sources *sources
	folds   foldTable
	places  map[uint64]place

	ahead   [fetchCount]*profile
	touched int64 // keeps the compiler from dropping the reads of fetch
}

// New returns an engine that knows no key.
func New(opts Options) *Engine {
	if opts.Budget <= 0 {
		opts.Budget = DefaultBudget
	}
	return &Engine{
		opts: opts, keys: newTable(), sources: newSources(),
		folds: newFoldTable(), places: map[uint64]place{},
	}
}

// profile is everything known of one key: its fixed-size state, and the few
// things that have variable length.
type profile struct {
	keyID string
	// strict is ln(default budget / this key's budget): what scores must rise by.
	strict float64
	// mixBase is what planMix makes of it, for the hour in hand.
	mixBase float64
	state
	org     unique.Handle[string]
	parent  string
	names   [routeSlots]unique.Handle[string] // of state.Routes
	episode *episode
}

// lateness is how far an event may lie behind the key's newest and still be judged.
const lateness = 5 * time.Minute

// Observe learns from one event and returns the alerts that it raises: a new one,
// or an open episode that grew (same ID, higher Revision). DetectedAt is left equal
// to Time. The event must be normalized; events of one key should come in the order
// of their time, late ones teach the hour that they belong to and raise nothing.
// With history set, alerts are marked historical.
func (e *Engine) Observe(ev *usage.Event, history bool) []alert.Alert {
	return e.observe(e.keys.get(ev.KeyID), ev, history)
}

// ObserveAll is [Engine.Observe] for each of the events in their order; raised is
// called with each alert, and must not call the engine. It is faster where there
// are more keys than the processor's caches hold.
func (e *Engine) ObserveAll(events []usage.Event, history bool, raised func(alert.Alert)) {
	for len(events) > 0 {
		n := min(len(events), len(e.ahead))
		e.fetch(events[:n])
		for i := range events[:n] {
			p := e.ahead[i]
			if p == nil { // unknown, or known since an event just before
				p = e.keys.get(events[i].KeyID)
			}
			for _, a := range e.observe(p, &events[i], history) {
				raised(a)
			}
		}
		events = events[n:]
	}
}

// fetchCount is how many baselines are fetched side by side: more misses than a
// processor keeps in flight, and few enough to stay in its first cache.
const fetchCount = 16

// fetch looks up the baselines of events into e.ahead and reads from each what the
// event will touch. The reads of one loop do not depend on each other, so the processor
// waits for all of them at once, as far as the loop is short.
func (e *Engine) fetch(events []usage.Event) {
	var hashes [fetchCount]uint64
	for i := range events {
		if id := events[i].KeyID; id != "" {
			e.touched += int64(id[0])
		}
	}
	for i := range events {
		hashes[i] = e.keys.hash(events[i].KeyID)
	}
	for i := range events {
		e.touched += int64(e.keys.home(hashes[i]).hash)
	}
	for i := range events {
		if e.ahead[i] = e.keys.candidate(hashes[i]); e.ahead[i] != nil {
			e.touched += e.ahead[i].First
		}
	}
	for i := range events {
		p := e.ahead[i]
		if p == nil {
			continue
		}
		if p.keyID != events[i].KeyID {
			e.ahead[i] = nil
			continue
		}
		e.touched += p.load(events[i].Time.UnixNano())
	}
}

// load reads from the cache lines that an event at a time is going to use.
func (p *profile) load(now int64) int64 {
	sum := p.First + int64(p.RecentAt) + p.Bin + int64(p.Gaps) + int64(p.InHour) + int64(p.Routes[1].Hash) +
		int64(p.MixHours) + int64(p.LastPrefix)
	if hourOf(now) == p.Hour {
		return sum
	}
	w := weekHour(p.Hour)
	sum += int64(p.Week[w]) + int64(p.Day[w%24]) + int64(p.Excess) + int64(p.HourTail.Days)
	for i := 0; i < prefixSlots; i += 4 {
		sum += int64(p.Prefixes[i].Day)
	}
	return sum + int64(p.Coarse[0].Day) + int64(p.Coarse[4].Day) + int64(p.Operators[0].Day) + int64(p.Operators[4].Day) +
		int64(p.Operators[8].Day) + int64(p.Countries[0].Day) + int64(p.Countries[4].Day)
}

// observe is Observe with the key's baseline found, nil if there is none.
func (e *Engine) observe(p *profile, ev *usage.Event, history bool) []alert.Alert {
	now := ev.Time.UnixNano()
	if p == nil {
		if ev.Decision == usage.Deny && !usesKey(ev.DenyReason) && ev.DenyReason != usage.DenyRevokedKey {
			return e.observeStranger(ev, now, history) // guessed keys must not fill the memory
		}
		p = e.create(ev.OrgID, ev.KeyID, ev.Time)
	}
	if ev.ID != "" && p.duplicate(ev.ID, now) {
		return nil
	}
	if ev.Decision == usage.Deny && !usesKey(ev.DenyReason) {
		return e.observeDenied(p, ev, now, history)
	}
	if now < p.Newest && !p.unskew(now) {
		if hourOf(now) < p.Hour || p.Newest-now > int64(lateness) {
			p.teachLate(now)
			return nil
		}
	}
	p.Events++
	var j judgement
	j.now = now
	e.judgeDormancy(p, now, &j)
	p.advance(now)
	e.judgeVolume(p, now, &j)
	e.judgeNetwork(p, ev, &j)
	e.judgeRoute(p, ev, &j)
	if ev.Decision == usage.Deny {
		e.judgeScope(p, ev, now, &j)
	}
	p.Previous = now
	if now > p.Newest {
		p.Newest = now
	}
	if j.best < noticed {
		return nil
	}
	return e.decide(p, ev, &j, history)
}

// create begins the baseline of a key that is first seen at a time.
func (e *Engine) create(orgID, keyID string, at time.Time) *profile {
	now := at.UnixNano()
	p := &profile{org: unique.Make(orgID)}
	p.First, p.Newest, p.Previous = now, now, now
	p.Hour = hourOf(now)
	p.initVolume()
	p.strict = strictness(e.opts, orgID, keyID)
	p.plan()
	e.keys.put(keyID, p)
	return p
}

// strictness is how much stricter a key is judged than at the default budget, in nats.
func strictness(opts Options, orgID, keyID string) float64 {
	b := opts.Budget
	if opts.BudgetOf != nil {
		if own := opts.BudgetOf(orgID, keyID); own > 0 {
			b = own
		}
	}
	return math.Log(DefaultBudget / b)
}

// Rebudget asks anew for the budget of a key, or of every key for an empty id.
func (e *Engine) Rebudget(keyID string) {
	if keyID == "" {
		for _, s := range e.keys.slots {
			if s.profile != nil {
				e.Rebudget(s.profile.keyID)
			}
		}
		return
	}
	if p := e.keys.get(keyID); p != nil {
		p.strict = strictness(e.opts, p.org.Value(), keyID)
		p.plan()
	}
}

// Knows reports whether there is a baseline of a key. A key that was only ever refused has none.
func (e *Engine) Knows(keyID string) bool { return e.keys.get(keyID) != nil }

// Keys is the number of keys known.
func (e *Engine) Keys() int { return e.keys.count }

// usesKey reports whether a denied request was one that the key's holder made
// with a valid key: it tells of the key's habits like an allowed one.
func usesKey(reason string) bool {
	return reason == usage.DenyInsufficientScope || reason == usage.DenyRateLimited
}

func hourOf(nanos int64) int64 {
	h := nanos / int64(time.Hour)
	if nanos < 0 && nanos%int64(time.Hour) != 0 {
		h--
	}
	return h
}

func (p *profile) ageDays(now int64) float64 {
	return float64(now-p.First) / float64(24*time.Hour)
}

// duplicate reports whether an event with this id and time was among the key's
// latest, and remembers it.
func (p *profile) duplicate(id string, now int64) bool {
	h := uint32(hashString(id, uint64(now)) >> 16)
	if h == 0 {
		h = 1
	}
	for _, r := range p.Recent {
		if r == h {
			return true
		}
	}
	p.Recent[p.RecentAt%recentEvents] = h
	p.RecentAt = (p.RecentAt + 1) % recentEvents
	return false
}

// unskew takes back a leap of the key's newest time by a clock that ran ahead:
// when events go on where they were before the leap, the leap was the error.
func (p *profile) unskew(now int64) bool {
	if p.Leap == 0 || p.Count > 2 || now < p.Leap-int64(time.Minute) || now > p.Leap+int64(6*time.Hour) {
		return false
	}
	p.Newest, p.Hour, p.Leap, p.Count = now, hourOf(now), 0, 0
	p.plan()
	return true
}

// hashString is FNV-1a over s, from a seed, with a final mix.
func hashString(s string, seed uint64) uint64 {
	h := uint64(14695981039346656037) ^ mix(seed)
	for i := range len(s) {
		h ^= uint64(s[i])
		h *= 1099511628211
	}
	return mix(h)
}

// mix is the finalizer of MurmurHash3.
func mix(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	h ^= h >> 33
	return h
}
