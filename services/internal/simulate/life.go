// Package simulate makes labelled traffic of API keys: ten benign lives that
// must stay quiet and the attacks that must not pass, seeded and reproducible.
//
// Nothing in it is measured from real keys; what is simulated is only as good as
// its assumptions. So that no detector fits one generator by accident, its parameters are
// drawn widely, and there are two variants that differ in their distributions, rates,
// names and address plans: [VariantA] is for development, [VariantB] with other seeds for
// the figures that are published.
package simulate

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Kind is a benign life.
type Kind string

// The ten benign lives.
const (
	Fixed    Kind = "fixed"    // a server around the clock
	Person   Kind = "person"   // office and home
	Roaming  Kind = "roaming"  // a device that roams over carriers
	Cron     Kind = "cron"     // at 6 am, hourly or weekly
	CI       Kind = "ci"       // runners anywhere in a cloud's address space
	Growth   Kind = "growth"   // a percent a day, or a step to 2.5 times
	Privacy  Kind = "ipv6"     // IPv6 privacy addresses
	Backfill Kind = "backfill" // a backfill twice a month
	Monthly  Kind = "monthly"  // a monthly job
	Silent   Kind = "silent"   // falls silent
)

// Kinds are all benign lives.
var Kinds = []Kind{Fixed, Person, Roaming, Cron, CI, Growth, Privacy, Backfill, Monthly, Silent}

// Variant is a way of drawing lives.
type Variant string

// VariantA draws Poisson and gamma-Poisson counts, route templates and office
// hours in Europe; VariantB log-normal rates in sessions, raw paths with identifiers, and
// other hours, rates and networks.
const (
	VariantA Variant = "a"
	VariantB Variant = "b"
)

// Life is one key's benign traffic, made day by day.
type Life struct {
	Kind  Kind
	KeyID string
	OrgID string

	seed    uint64
	variant Variant
	born    time.Time
	r       *rand.Rand // habits only, never the days

	perDay  float64
	shape   [168]float64 // of the week, mean 1
	noise   float64      // shape of the gamma, or sigma of the log-normal; 0 is Poisson
	batch   float64      // mean requests a session
	routes  []choice
	raw     bool // paths carry identifiers
	withIDs bool
	agent   string
	home    *network
	site    func(r *rand.Rand, at time.Time) netip.Addr
	level   func(day int) float64
	visited []string // countries of a roamer
	late    bool     // backfills carry their old times
	jobs    []job
	ends    int // day of falling silent
	serial  int
}

type choice struct {
	method, path, scope string
	weight              float64
}

// job is a burst at fixed times.
type job struct {
	due    func(day time.Time, n int) bool
	at     time.Duration
	jitter time.Duration
	size   float64
	spread time.Duration
	routes []choice
}

func seedOf(seed uint64, words ...string) *rand.Rand {
	h := fnv.New64a()
	for _, w := range words {
		h.Write([]byte(w))
		h.Write([]byte{0})
	}
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

// NewLife draws the habits of a key that is first used on the given day.
func NewLife(kind Kind, variant Variant, seed uint64, orgID, keyID string, born time.Time) *Life {
	l := &Life{
		Kind: kind, KeyID: keyID, OrgID: orgID, seed: seed, variant: variant, born: born.UTC().Truncate(24 * time.Hour),
		r: seedOf(seed, "life", string(variant), keyID), level: func(int) float64 { return 1 }, ends: math.MaxInt,
	}
	l.manners()
	l.hours(chance(l.r, 0.5))
	l.site = l.fixedSite(1 + l.r.IntN(3))
	switch kind {
	case Fixed:
		l.hours(chance(l.r, 0.4))
	case Person:
		l.person()
	case Roaming:
		l.roaming()
	case Cron:
		l.cron()
	case CI:
		l.runners()
	case Growth:
		l.growth()
	case Privacy:
		l.privacy()
	case Backfill:
		l.backfill()
	case Monthly:
		l.monthly()
	case Silent:
		l.ends = 8 + l.r.IntN(16)
	}
	return l
}

// manners draws rates, noise and routes.
func (l *Life) manners() {
	r := l.r
	if l.variant == VariantA {
		l.perDay = around(r, 30, 3000)
		l.noise = choose[float64](r, 0, 0, 20, 8, 4)
		l.batch = choose[float64](r, 1, 1, 1, 2)
	} else {
		l.perDay = around(r, 12, 6000)
		l.noise = between(r, 0.05, 0.5)
		l.batch = around(r, 1, 6)
	}
	l.raw = chance(r, map[Variant]float64{VariantA: 0.3, VariantB: 0.7}[l.variant])
	l.withIDs = chance(r, 0.9)
	l.routes = l.drawRoutes(1 + r.IntN(7))
	l.agent = choose(r, "curl/8.9.1", "python-requests/2.32", "Go-http-client/2.0", "okhttp/4.12", "axios/1.7.2", "terraform/1.9")
	l.home = pick(r, func(n *network) bool {
		return n.use == hosting && len(n.prefixes) > 0 && n.prefixes[0].Addr().Is4() && l.region(n)
	})
	if chance(r, 0.3) {
		l.home = pick(r, func(n *network) bool { return n.use == access && l.region(n) })
	}
}

// region keeps the two variants' keys in different parts of the world.
func (l *Life) region(n *network) bool {
	switch n.country {
	case "DE", "FR", "NL", "PL", "CH":
		return l.variant == VariantA
	case "US", "GB", "JP", "AU", "ES", "IT":
		return true
	}
	switch n.country {
	case "IN", "BR", "CN":
		return l.variant == VariantB
	}
	return false // the other countries are where thieves sit
}

var (
	nounsA = []string{"readings", "devices", "orders", "invoices", "customers", "events", "shipments", "products", "carts", "sessions", "reports", "files"}
	nounsB = []string{"Telemetry", "assets", "payments", "tickets", "contacts", "jobs", "builds", "artifacts", "messages", "threads", "locations", "metrics", "alerts", "tags"}
)

func (l *Life) drawRoutes(n int) []choice {
	r := l.r
	nouns, prefix := nounsA, "/v1/"
	if l.variant == VariantB {
		nouns, prefix = nounsB, choose(r, "/api/v2/", "/", "/rest/", "/2024-10/", "/api/")
	}
	nouns = slices.Clone(nouns)
	r.Shuffle(len(nouns), func(i, j int) { nouns[i], nouns[j] = nouns[j], nouns[i] })
	nouns = nouns[:1+min(len(nouns)-1, n/2)]
	seen := map[string]bool{}
	var out []choice
	for i := 0; len(out) < n && i < 200; i++ {
		noun := nouns[r.IntN(len(nouns))]
		method := choose(r, "GET", "GET", "POST", "PUT", "PATCH")
		path := prefix + noun
		action := "read"
		switch {
		case method == "PUT" || method == "PATCH":
			path += "/{id}"
		case method == "GET" && chance(r, 0.6):
			path += "/{id}" + choose(r, "", "", "/history", "/items")
		}
		if method != "GET" {
			action = "write"
		}
		if seen[method+path] {
			continue
		}
		seen[method+path] = true
		weight := around(r, 0.02, 1)
		if len(out) == 0 {
			weight = 2
		}
		out = append(out, choice{method, path, noun + ":" + action, weight})
	}
	return out
}

// hours draws the shape of the week: by day or around the clock.
func (l *Life) hours(daily bool) {
	r := l.r
	peak, depth := between(r, 8, 18), between(r, 0.0, 0.5)
	weekend := between(r, 0.7, 1.1)
	if daily {
		depth, weekend = between(r, 0.75, 0.97), between(r, 0.2, 1)
	}
	if l.variant == VariantB {
		peak = between(r, 0, 24)
	}
	sum := 0.0
	for h := range l.shape {
		x := 1 + depth*math.Cos(2*math.Pi*(float64(h%24)-peak)/24)
		if l.variant == VariantB && daily { // a plateau with steep flanks
			x = 1/(1+math.Exp(-8*depth*math.Cos(2*math.Pi*(float64(h%24)-peak)/24))) + (1-depth)*0.2
		}
		if h/24 >= 5 {
			x *= weekend
		}
		l.shape[h] = x
		sum += x
	}
	for h := range l.shape {
		l.shape[h] *= 168 / sum
	}
}

func (l *Life) fixedSite(n int) func(*rand.Rand, time.Time) netip.Addr {
	first := l.home.address(l.r, false)
	addrs := []netip.Addr{first}
	for len(addrs) < n {
		addrs = append(addrs, within(l.r, in(first, choose(l.r, 24, 24, 24, 20))))
	}
	return func(r *rand.Rand, _ time.Time) netip.Addr { return addrs[r.IntN(len(addrs))] }
}

func (l *Life) person() {
	r := l.r
	l.perDay = around(r, 8, 250)
	l.batch = between(r, 1, 8)
	l.routes = l.drawRoutes(4 + r.IntN(10))
	l.home = pick(r, func(n *network) bool { return n.use == access && l.region(n) })
	house := pick(r, func(n *network) bool { return n.use == access && n.country == l.home.country })
	office, flat := l.home.address(r, false), house.address(r, false)
	rotates := chance(r, 0.4) // the provider changes the address every day
	homeDays := between(r, 0.1, 0.6)
	for h := range l.shape {
		x := math.Exp(-sq(float64(h%24)-between(r, 12.5, 13.5)) / 18)
		if h/24 >= 5 {
			x *= 0.1
		}
		l.shape[h] = x * 4
	}
	seed := r.Uint64()
	l.site = func(_ *rand.Rand, at time.Time) netip.Addr {
		n := uint64(at.Unix() / 86400)
		d := rand.New(rand.NewPCG(seed, n))
		away := chance(d, homeDays)
		if at.Weekday() == time.Saturday || at.Weekday() == time.Sunday || at.Hour() >= 19 || at.Hour() < 7 || away {
			if rotates {
				return within(d, in(flat, 18))
			}
			return flat
		}
		return office
	}
}

func sq(x float64) float64 { return x * x }

func (l *Life) roaming() {
	r := l.r
	l.perDay = around(r, 15, 500)
	l.home = pick(r, func(n *network) bool { return n.use == mobile && l.region(n) })
	nets := []*network{l.home}
	countries := map[string]bool{l.home.country: true}
	for range 1 + r.IntN(4) {
		n := pick(r, func(n *network) bool {
			return n.use != hosting && l.region(n) && (countries[n.country] || len(countries) < 4)
		})
		nets = append(nets, n)
		countries[n.country] = true
	}
	for c := range countries {
		l.visited = append(l.visited, c)
	}
	slices.Sort(l.visited)
	weights := make([]float64, len(nets))
	for i := range weights {
		weights[i] = around(r, 0.25, 1)
	}
	hold := choose(r, time.Hour, 3*time.Hour, 12*time.Hour)
	stay := choose(r, hold, 12*time.Hour, 24*time.Hour)
	seed := r.Uint64()
	l.site = func(_ *rand.Rand, at time.Time) netip.Addr {
		d := rand.New(rand.NewPCG(seed, uint64(at.UnixNano()/int64(hold))))
		trip := rand.New(rand.NewPCG(seed+1, uint64(at.UnixNano()/int64(stay))))
		return nets[weighted(trip, weights)].address(d, false)
	}
}

func weighted(r *rand.Rand, weights []float64) int {
	sum := 0.0
	for _, w := range weights {
		sum += w
	}
	x := r.Float64() * sum
	for i, w := range weights {
		if x -= w; x < 0 {
			return i
		}
	}
	return len(weights) - 1
}

func (l *Life) cron() {
	r := l.r
	l.perDay = 0
	l.noise = 0
	size := around(r, 3, 300)
	jitter := choose(r, time.Second, time.Minute, 20*time.Minute)
	j := job{size: size, jitter: jitter, spread: time.Duration(around(r, 5, 1500)) * time.Second}
	switch r.IntN(3) {
	case 0:
		j.due = func(time.Time, int) bool { return true }
		j.at = 6 * time.Hour
		if l.variant == VariantB {
			j.at = time.Duration(r.IntN(24*60)) * time.Minute
		}
		l.jobs = []job{j}
	case 1:
		j.size = around(r, 1.5, 40)
		j.due = func(time.Time, int) bool { return true }
		at := time.Duration(r.IntN(60)) * time.Minute
		for h := range 24 {
			j.at = time.Duration(h)*time.Hour + at
			l.jobs = append(l.jobs, j)
		}
	default:
		w := time.Weekday(r.IntN(7))
		j.due = func(day time.Time, _ int) bool { return day.Weekday() == w }
		j.at = time.Duration(r.IntN(24)) * time.Hour
		l.jobs = []job{j}
	}
}

func (l *Life) runners() {
	r := l.r
	l.home = pick(r, func(n *network) bool { return n.asn == 8075 || n.asn == 14618 })
	if l.variant == VariantB {
		l.home = pick(r, func(n *network) bool { return n.asn == 14618 || n.asn == 16276 })
	}
	l.hours(true)
	l.perDay = around(r, 40, 1500)
	hold := choose(r, 5*time.Minute, 15*time.Minute, time.Hour)
	seed := r.Uint64()
	l.site = func(_ *rand.Rand, at time.Time) netip.Addr {
		return l.home.address(rand.New(rand.NewPCG(seed, uint64(at.UnixNano()/int64(hold)))), false)
	}
}

func (l *Life) growth() {
	r := l.r
	if chance(r, 0.5) {
		rate := between(r, 0.007, 0.015)
		l.level = func(day int) float64 { return math.Pow(1+rate, float64(day)) }
		return
	}
	step := 18 + r.IntN(38)
	to := between(r, 2, 2.6)
	l.level = func(day int) float64 {
		if day >= step {
			return to
		}
		return 1
	}
}

func (l *Life) privacy() {
	r := l.r
	l.perDay = around(r, 20, 800)
	l.home = pick(r, func(n *network) bool { return n.use != hosting && n.hasSix() })
	site := in(l.home.address(r, true), choose(r, 64, 64, 56))
	four := l.home.address(r, false)
	dual := choose[float64](r, 0, 0, 0.1, 0.4)
	hold := choose(r, time.Hour, 24*time.Hour)
	seed := r.Uint64()
	l.site = func(d *rand.Rand, at time.Time) netip.Addr {
		if dual > 0 && chance(d, dual) {
			return four
		}
		return within(rand.New(rand.NewPCG(seed, uint64(at.UnixNano()/int64(hold)))), site)
	}
}

func (l *Life) backfill() {
	r := l.r
	first := 1 + r.IntN(14)
	l.late = l.variant == VariantB && chance(r, 0.5)
	mean := l.perDay / 24
	l.jobs = []job{{
		due:  func(_ time.Time, n int) bool { return n%15 == first },
		at:   time.Duration(r.IntN(24)) * time.Hour,
		size: max(60, mean*between(r, 10, 40)), jitter: 4 * time.Hour, spread: time.Duration(around(r, 300, 7000)) * time.Second,
	}}
}

func (l *Life) monthly() {
	r := l.r
	date := 1 + r.IntN(28)
	if chance(r, 0.6) {
		l.perDay = 0
	}
	l.jobs = []job{{
		due: func(day time.Time, _ int) bool { return day.Day() == date },
		at:  time.Duration(r.IntN(24)) * time.Hour, jitter: 10 * time.Minute, size: around(r, 5, 600), spread: time.Duration(around(r, 30, 3600)) * time.Second,
	}}
	if l.perDay > 0 { // it stands out from the rest no more than a job may
		l.jobs[0].size = min(l.jobs[0].size, max(5, l.perDay/24))
	}
}

// Day makes the events of the day that begins at a time, in their order; a few
// may lie beyond its end.
func (l *Life) Day(day time.Time) []usage.Event {
	n := int(day.Sub(l.born) / (24 * time.Hour))
	if n < 0 || n >= l.ends {
		return nil
	}
	r := seedOf(l.seed, "day", l.KeyID, day.Format(time.DateOnly))
	var out []usage.Event
	for h := range 24 {
		from := day.Add(time.Duration(h) * time.Hour)
		mean := l.perDay / 24 * l.shape[(int(day.Weekday())+6)%7*24+h] * l.level(n)
		for _, at := range l.arrivals(r, from, mean) {
			out = append(out, l.event(r, at, l.routes, l.site(r, at)))
		}
	}
	for _, j := range l.jobs {
		if j.due(day, n) {
			out = append(out, l.run(r, day, j)...)
		}
	}
	return sortEvents(out)
}

// arrivals draws the times of one hour's requests.
func (l *Life) arrivals(r *rand.Rand, from time.Time, mean float64) []time.Time {
	switch {
	case l.noise == 0:
	case l.variant == VariantA:
		mean *= gamma(r, l.noise)
	default:
		mean *= math.Exp(l.noise*r.NormFloat64() - l.noise*l.noise/2)
	}
	var out []time.Time
	for range poisson(r, mean/l.batch) {
		at := from.Add(time.Duration(r.Int64N(int64(time.Hour))))
		n := 1
		if l.batch > 1 {
			n = 1 + poisson(r, l.batch-1)
		}
		for range n {
			out = append(out, at)
			at = at.Add(time.Duration(r.ExpFloat64() * float64(4*time.Second)))
		}
	}
	return out
}

func (l *Life) run(r *rand.Rand, day time.Time, j job) []usage.Event {
	at := day.Add(j.at)
	if j.jitter > 0 {
		at = at.Add(time.Duration(r.Int64N(int64(j.jitter))))
	}
	n := max(1, int(math.Round(j.size*math.Exp(0.15*r.NormFloat64()))))
	routes := j.routes
	if routes == nil {
		routes = l.routes
	}
	var out []usage.Event
	for range n {
		t := at.Add(time.Duration(r.Int64N(int64(max(j.spread, time.Second)))))
		ev := l.event(r, t, routes, l.site(r, t))
		if l.late && l.Kind == Backfill {
			ev.Time = ev.Time.Add(-time.Duration(r.Int64N(int64(9 * 24 * time.Hour))))
			if ev.Time.Before(l.born) {
				ev.Time = l.born
			}
		}
		out = append(out, ev)
	}
	return out
}

func (l *Life) event(r *rand.Rand, at time.Time, routes []choice, ip netip.Addr) usage.Event {
	c := draw(r, routes)
	ev := usage.Event{
		Time: at.Truncate(time.Millisecond), OrgID: l.OrgID, KeyID: l.KeyID, SourceIP: ip, Method: c.method, Route: l.path(r, c.path),
		Status: 200, Scope: c.scope, Decision: usage.Allow, UserAgent: l.agent, LatencyUS: uint32(300 + 5000*r.ExpFloat64()),
		RequestBytes: uint64(r.IntN(900)), ResponseBytes: uint64(r.IntN(4000)), Gateway: "edge-1",
	}
	if l.withIDs {
		l.serial++
		ev.ID = l.KeyID + "-" + strconv.FormatInt(at.UnixMilli(), 36) + "-" + strconv.Itoa(l.serial)
	}
	if chance(r, 0.002) {
		ev.Decision, ev.DenyReason, ev.Status = usage.Deny, usage.DenyRateLimited, 429
	}
	return ev
}

// draw picks a route by its weight.
func draw(r *rand.Rand, routes []choice) *choice {
	sum := 0.0
	for i := range routes {
		sum += routes[i].weight
	}
	x := r.Float64() * sum
	for i := range routes {
		if x -= routes[i].weight; x < 0 {
			return &routes[i]
		}
	}
	return &routes[len(routes)-1]
}

// path fills a template with identifiers where the key sends raw paths.
func (l *Life) path(r *rand.Rand, template string) string {
	if !l.raw {
		return template
	}
	before, after, ok := cutID(template)
	if !ok {
		return template
	}
	var id string
	switch {
	case l.variant == VariantA:
		id = strconv.Itoa(1000 + r.IntN(1_000_000))
	case l.perDay > 200:
		id = fmt.Sprintf("%08x-%04x-4%03x-a%03x-%012x", r.Uint32(), r.IntN(1<<16), r.IntN(1<<12), r.IntN(1<<12), r.Int64N(1<<48))
	default:
		id = fmt.Sprintf("obj_%s", strconv.FormatUint(r.Uint64()|1<<60, 36))
	}
	return before + id + after
}

func cutID(s string) (before, after string, ok bool) {
	for i := 0; i+4 <= len(s); i++ {
		if s[i:i+4] == "{id}" {
			return s[:i], s[i+4:], true
		}
	}
	return s, "", false
}

// sortEvents sorts by time; only their numbers are moved about, for events are large.
func sortEvents(events []usage.Event) []usage.Event {
	order := make([]int, len(events))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int {
		a, b := &events[i], &events[j]
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.KeyID, b.KeyID), cmp.Compare(a.ID, b.ID))
	})
	out := make([]usage.Event, len(events))
	for i, at := range order {
		out[i] = events[at]
	}
	return out
}
