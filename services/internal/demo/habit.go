package demo

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// habit is how a key is used when nobody has stolen it.
type habit struct {
	// perDay is the mean number of requests on a working day.
	perDay float64
	// weekend is the share of a working day that a Saturday or Sunday has.
	weekend float64
	// from and to are the hours (UTC) in which it works; equal: around the clock.
	from, to int
	// every, if set, makes requests in bursts: one each such interval, offset
	// after midnight, of burst requests.
	every, offset time.Duration
	burst         int
	// growth is how much more each day has than the day before.
	growth float64
	places []place
	calls  []call
	agent  string
}

// place is a network that the key is used from. Of an IPv6 prefix the host part
// changes daily, as privacy addresses do; of an IPv4 prefix only few hosts are used.
type place struct {
	cidr   string
	weight float64
}

type call struct {
	method, route, scope string
	weight               float64
}

// day is the events of one UTC day, in order of time. They follow from the key
// and the day alone, so that any span can be made again and is stored once.
func (h habit) day(keyID, orgID string, day time.Time, first time.Time) []usage.Event {
	rng := rngFor(keyID, day)
	var events []usage.Event
	for i, at := range h.times(rng, day, first) {
		e := h.event(rng, keyID, orgID, at)
		e.ID = fmt.Sprintf("%s.%s.%d", keyID, day.Format("20060102"), i)
		events = append(events, e)
	}
	return events
}

func (h habit) times(rng *rand.Rand, day, first time.Time) []time.Time {
	var times []time.Time
	if h.every > 0 {
		for at := h.offset; at < 24*time.Hour; at += h.every {
			start := day.Add(at + time.Duration(rng.ExpFloat64()*float64(4*time.Second)))
			for range max(1, poisson(rng, float64(h.burst))) {
				start = start.Add(time.Duration(rng.ExpFloat64() * float64(700*time.Millisecond)))
				times = append(times, start)
			}
		}
	} else {
		mean := h.perDay
		if wd := day.Weekday(); wd == time.Saturday || wd == time.Sunday {
			mean *= h.weekend
		}
		mean *= math.Pow(1+h.growth, day.Sub(first).Hours()/24)
		span := float64((h.to-h.from+24)%24) * float64(time.Hour)
		if h.from == h.to {
			span = float64(24 * time.Hour)
		}
		for range poisson(rng, mean) {
			at := time.Duration(h.from)*time.Hour + time.Duration(rng.Float64()*span)
			times = append(times, day.Add(at%(24*time.Hour)))
		}
	}
	slices.SortFunc(times, time.Time.Compare)
	return times
}

func (h habit) event(rng *rand.Rand, keyID, orgID string, at time.Time) usage.Event {
	c := pick(rng, h.calls, func(c call) float64 { return c.weight })
	p := pick(rng, h.places, func(p place) float64 { return p.weight })
	status := uint16(200)
	if c.method == "POST" {
		status = 201
	}
	return usage.Event{
		Time: at.Truncate(time.Microsecond), OrgID: orgID, KeyID: keyID, SourceIP: p.addr(rng, at),
		Method: c.method, Route: c.route, Status: status, Scope: c.scope, Decision: usage.Allow, UserAgent: h.agent,
		LatencyUS: uint32(800 + rng.ExpFloat64()*4000), RequestBytes: uint64(200 + rng.IntN(600)),
		ResponseBytes: uint64(300 + rng.IntN(4000)), Gateway: "demo",
	}
}

// addr is an address within the place.
func (p place) addr(rng *rand.Rand, at time.Time) netip.Addr {
	prefix := netip.MustParsePrefix(p.cidr)
	if prefix.Bits() == prefix.Addr().BitLen() {
		return prefix.Addr()
	}
	if prefix.Addr().Is4() {
		b := prefix.Addr().As4()
		span := uint32(1) << (32 - prefix.Bits())
		host := rng.Uint32N(span)
		if prefix.Bits() >= 24 {
			host = 10 + rng.Uint32N(8)
		}
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+host)
		return netip.AddrFrom4(b)
	}
	b := prefix.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], rngFor(p.cidr, at.Truncate(24*time.Hour)).Uint64())
	return netip.AddrFrom16(b)
}

// path is a request path for a route template: its parameters filled in.
func path(rng *rand.Rand, route string) string {
	for {
		open := strings.IndexByte(route, '{')
		if open < 0 {
			return route
		}
		end := strings.IndexByte(route[open:], '}')
		route = route[:open] + fmt.Sprint(1000+rng.IntN(9000)) + route[open+end+1:]
	}
}

func rngFor(name string, day time.Time) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(name))
	return rand.New(rand.NewPCG(h.Sum64(), uint64(day.Unix())))
}

func pick[T any](rng *rand.Rand, from []T, weight func(T) float64) T {
	var sum float64
	for _, x := range from {
		sum += weight(x)
	}
	r := rng.Float64() * sum
	for _, x := range from {
		if r -= weight(x); r < 0 {
			return x
		}
	}
	return from[len(from)-1]
}

// poisson draws by Knuth's method for small means and by the normal
// approximation for large ones, which is good enough for a demo.
func poisson(rng *rand.Rand, mean float64) int {
	if mean > 50 {
		return max(0, int(math.Round(mean+math.Sqrt(mean)*rng.NormFloat64())))
	}
	n, limit, p := 0, math.Exp(-mean), rng.Float64()
	for p > limit {
		n++
		p *= rng.Float64()
	}
	return n
}
