package simulate

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Attack is a kind of misuse.
type Attack string

// The ten attacks on a key's habits, and three that show in refusals.
const (
	Abroad        Attack = "abroad"         // same rate and routes from another country
	VPS           Attack = "vps"            // from a data centre in the same country
	BusySpike     Attack = "busy_spike"     // ten times in the busy hour
	NightSpike    Attack = "night_spike"    // ten times at night
	ListUsers     Attack = "list_users"     // an ingest key lists users
	RareRoute     Attack = "rare_route"     // 97:3 turns to the 3
	Woken         Attack = "woken"          // dormant, used five times from its usual address
	WokenStolen   Attack = "woken_stolen"   // dormant and stolen
	ProxyNetwork  Attack = "proxy_network"  // another address for every request
	RoamedTooFar  Attack = "roamed_too_far" // a roaming key where it never roamed
	Guessing      Attack = "guessing"       // many denied keys from one source
	RevokedUse    Attack = "revoked_use"
	ScopeProbing  Attack = "scope_probing"
	nightFraction        = 1.0
)

// Attacks are all kinds of misuse.
var Attacks = []Attack{
	Abroad, VPS, BusySpike, NightSpike, ListUsers, RareRoute, Woken, WokenStolen, ProxyNetwork, RoamedTooFar,
	Guessing, RevokedUse, ScopeProbing,
}

// victims are the lives that an attack is made on.
func (a Attack) victims() []Kind {
	switch a {
	case Woken, WokenStolen:
		return []Kind{Silent}
	case RoamedTooFar:
		return []Kind{Roaming}
	case BusySpike, NightSpike:
		return []Kind{Fixed, Growth, Privacy}
	case ListUsers, RareRoute:
		return []Kind{Fixed, Growth, Privacy}
	case Abroad, VPS, ProxyNetwork:
		return []Kind{Fixed, Person, Cron, Growth, Privacy, CI}
	default:
		return []Kind{Fixed, Person, Growth, Cron}
	}
}

// prepare gives a life the habits that an attack is defined against.
func (l *Life) prepare(a Attack) {
	switch a {
	case ListUsers:
		l.routes = l.routes[:0]
		l.routes = append(l.routes, choice{"POST", "/v1/ingest", "ingest:write", 1})
		if chance(l.r, 0.5) {
			l.routes = append(l.routes, choice{"POST", "/v1/ingest/batch", "ingest:write", 0.3})
		}
		l.perDay = max(l.perDay, 50)
	case RareRoute:
		l.routes = []choice{{"GET", "/v1/orders/{id}", "orders:read", 97}, {"GET", "/v1/exports/{id}", "exports:read", 3}}
		l.perDay = max(l.perDay, 100)
	case NightSpike:
		l.perDay = min(max(l.perDay, 60), 2000)
		l.hours(true)
		l.batch = min(l.batch, 1.5)
	case BusySpike:
		l.perDay = max(l.perDay, 80)
	}
}

// Attack makes the events of a misuse that begins at a time, and the time of its
// last one. Some attacks replace the key's ordinary traffic while they last: see
// [Attack.replaces].
func (l *Life) Attack(a Attack, from time.Time) []usage.Event {
	r := seedOf(l.seed, "attack", string(a), l.KeyID)
	var out []usage.Event
	switch a {
	case Abroad, VPS, ProxyNetwork, RoamedTooFar, WokenStolen:
		out = l.stolen(r, a, from)
	case BusySpike, NightSpike:
		out = l.spike(r, a, from)
	case ListUsers:
		n := 8 + r.IntN(40)
		at := from
		for range n {
			at = at.Add(time.Duration(r.ExpFloat64() * float64(40*time.Second)))
			out = append(out, l.event(r, at, []choice{{"GET", "/v1/users", "users:read", 3}, {"GET", "/v1/users/{id}", "users:read", 1}}, l.site(r, at)))
		}
	case RareRoute:
		for h := range 4 + r.IntN(8) {
			hour := from.Add(time.Duration(h) * time.Hour)
			for _, at := range l.arrivals(r, hour, max(l.mean(hour), 4)) {
				out = append(out, l.event(r, at, l.routes[1:2], l.site(r, at)))
			}
		}
	case Woken:
		at := from
		for range 5 {
			out = append(out, l.event(r, at, l.routes, l.site(r, at)))
			at = at.Add(time.Duration(r.ExpFloat64() * float64(2*time.Minute)))
		}
	case Guessing, RevokedUse, ScopeProbing:
		out = l.refused(r, a, from)
	}
	return sortEvents(out)
}

// replaces reports whether the misuse takes the place of the key's own traffic.
func (a Attack) replaces() bool { return a == RareRoute }

func (l *Life) mean(at time.Time) float64 {
	n := int(at.Sub(l.born) / (24 * time.Hour))
	return l.perDay / 24 * l.shape[(int(at.Weekday())+6)%7*24+at.Hour()] * l.level(n)
}

// stolen is the key's own behaviour from elsewhere.
func (l *Life) stolen(r *rand.Rand, a Attack, from time.Time) []usage.Event {
	neighbours := slices.ContainsFunc(plan, func(n network) bool {
		return n.use == hosting && n.country == l.home.country && n.asn != l.home.asn
	})
	thief := pick(r, func(n *network) bool {
		if n.asn == l.home.asn {
			return false
		}
		switch a {
		case VPS:
			return n.use == hosting && (n.country == l.home.country || !neighbours)
		case RoamedTooFar:
			return n.use != hosting && !slices.Contains(l.visited, n.country)
		default:
			return n.country != l.home.country
		}
	})
	addr := thief.address(r, false)
	n := 10 + r.IntN(60)
	pause := around(r, 5, 300)
	var out []usage.Event
	at := from
	for range n {
		ip := addr
		if a == ProxyNetwork {
			ip = pick(r, func(n *network) bool { return n.use != hosting && n.country != l.home.country }).address(r, false)
		}
		out = append(out, l.event(r, at, l.routes, ip))
		at = at.Add(time.Duration(r.ExpFloat64() * pause * float64(time.Second)))
	}
	return out
}

// spike is ten times the usual: in the busy hour, or for one to four hours of the
// night. What is added is nine times the hours' mean and no random draw: the victim's own
// noise and batches made 3 to 6 times of many a spike, which its ordinary nights hold too,
// so that not even the true rates told them apart.
func (l *Life) spike(r *rand.Rand, a Attack, from time.Time) []usage.Event {
	hours := 1
	if a == NightSpike {
		hours = 1 + r.IntN(4)
	}
	var out []usage.Event
	for h := range hours {
		hour := from.Add(time.Duration(h) * time.Hour)
		for range int(math.Ceil(9 * l.mean(hour))) {
			at := hour.Add(time.Duration(r.Int64N(int64(time.Hour))))
			out = append(out, l.event(r, at, l.routes, l.site(r, at)))
		}
	}
	return out
}

// begin moves an attack's start to the hour that it is about.
func (l *Life) begin(a Attack, day time.Time, r *rand.Rand) time.Time {
	best := 0
	switch a {
	case BusySpike, NightSpike:
		for h := range 24 {
			x, y := l.mean(day.Add(time.Duration(h)*time.Hour)), l.mean(day.Add(time.Duration(best)*time.Hour))
			if a == BusySpike && x > y || a == NightSpike && x < y && x > nightFraction {
				best = h
			}
			if a == NightSpike && y <= nightFraction {
				best = h
			}
		}
		return day.Add(time.Duration(best) * time.Hour)
	case RareRoute:
		return day.Add(time.Duration(r.IntN(24)) * time.Hour)
	}
	return day.Add(time.Duration(r.Int64N(int64(24 * time.Hour)))).Truncate(time.Second)
}

func (l *Life) refused(r *rand.Rand, a Attack, from time.Time) []usage.Event {
	source := pick(r, func(n *network) bool { return n.use == hosting && n.country != l.home.country }).address(r, false)
	var out []usage.Event
	at := from
	deny := func(ip netip.Addr, key, reason string, routes []choice) {
		ev := l.event(r, at, routes, ip)
		ev.KeyID, ev.Decision, ev.DenyReason, ev.Status = key, usage.Deny, reason, 401
		out = append(out, ev)
		at = at.Add(time.Duration(r.ExpFloat64() * float64(8*time.Second)))
	}
	switch a {
	case Guessing:
		for i := range 30 + r.IntN(120) {
			key := l.KeyID
			if i%10 != 0 {
				key = fmt.Sprintf("key_guess_%x", r.Uint64())
			}
			deny(source, key, usage.DenyInvalidKey, l.routes)
		}
	case RevokedUse:
		for range 1 + r.IntN(10) {
			deny(source, l.KeyID, usage.DenyRevokedKey, l.routes)
		}
	case ScopeProbing:
		for i := range 12 + r.IntN(40) {
			p := choose(r, "users", "keys", "billing", "exports", "admin", "webhooks", "audit", "tokens")
			ip := l.site(r, at)
			deny(ip, l.KeyID, usage.DenyInsufficientScope, []choice{{choose(r, "GET", "POST"), fmt.Sprintf("/v1/%s", p), p + ":read", 1}})
			out[i].Status = 403
		}
	}
	return out
}

// CheckAttacks reports names that are no attack.
func CheckAttacks(names []Attack) error {
	for _, a := range names {
		if !slices.Contains(Attacks, a) {
			return fmt.Errorf("no attack is called %q: there are %v", a, Attacks)
		}
	}
	return nil
}
