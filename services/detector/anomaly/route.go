package anomaly

import (
	"fmt"
	"math"
	"math/bits"
	"strings"
	"time"
	"unique"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// routeState is what a key does: the shares of its routes (method and folded
// path), and the evidence that one of them is taking over.
type routeState struct {
	// InHour is the number of requests counted in Routes.Count; Fresh is 1 if the hour
	// brought a new route, 2 a new area, 3 both.
	InHour uint32
	Fresh  uint32
	// Stirred marks the routes with evidence, by a bit a slot.
	Stirred uint32
	// Turned is the slot of the latest alarm, for its words.
	Turned uint32
	Routes [routeSlots]route
	// Areas are the folded paths' heads ("GET /v1/users"), coarser than routes.
	Areas [areaSlots]slot
	// NewRoute and NewArea say how often an hour of use brings news.
	NewRoute, NewArea novelty
	// MixHours is the number of hours of use that the shares were learned from.
	MixHours float32
	// MixTail are the daily maxima of the evidence.
	MixTail tail
}

// route is one route of a key.
type route struct {
	Hash uint32
	// Share is the mean over hours of use of the route's part of the requests.
	Share float32
	// Evidence is Page's sum in nats; Count the requests in the current hour.
	Evidence float32
	Count    uint32
	Day      uint16
	// Strange is 1 for a route that came after the learning time, 2 where its area
	// was new too.
	Strange uint8
	// Peak is the most requests that an hour brought, packed by packPeak.
	Peak uint8
}

const (
	priorRoute   = 0.1
	mixCommon    = 0.22
	mixLearning  = 7.0  // days
	mixMemory    = 400  // hours of use
	mixMost      = 66.0 // most that a route is taken to rise
	mixOfferings = 0.5  // share of a route under the alternative
	mixCloser    = 17.0 // days until a known area alarms alone: what comes twice a month was seen
	mixBatch     = 10   // requests an hour from which a peak was a batch
	mixStranger  = 0.75 // of the need, for a route whose like never came before
	mixFewest    = 3    // requests to a route, at the least, that alarm
	mixKept      = 0.7  // of the evidence, from hour to hour: what comes now and then is no turn
)

// judgeRoute is a sequential Bayes factor per route: under the key's own habits
// a request is to this route with probability p, the route's posterior mean with the
// missing mass (Good-Turing) for routes never seen; under the alternative with q (see mixSteps). Each
// request to the route adds ln(q/p), each other one takes off ln((1-p)/(1-q)), never
// below zero (Page 1954). Evidence therefore outlives any amount of ordinary traffic
// beside a route that is next to unknown, and is forgotten within few requests
// for one that is merely rare.
func (e *Engine) judgeRoute(p *profile, ev *usage.Event, j *judgement) {
	f := e.folds.fold(ev.Method, ev.Route)
	at := p.findRoute(f.hash)
	if at < 0 {
		at = p.addRoute(f)
	}
	r := &p.Routes[at]
	r.Count++
	p.InHour++
	r.Day = uint16(p.Hour / 24)
	p.otherEvidence(at)
	if float64(r.Share) >= mixCommon || p.MixHours < 3 || r.batched() {
		return
	}
	step, _ := p.mixSteps(r)
	if r.Strange == 1 {
		step *= 0.6 // its area is known
	}
	r.Evidence = float32(min(float64(r.Evidence)+min(step, p.mixBase/mixFewest), 1e3))
	p.Stirred |= 1 << at
	age := p.ageDays(j.now)
	if age < mixLearning {
		p.MixTail.see(min(float64(r.Evidence), mixOutlier*p.mixBase) / 2)
		return
	}
	p.MixTail.see(min(float64(r.Evidence), mixOutlier*p.mixBase))
	if float64(r.Evidence) < p.mixBase*mixStranger/2 {
		return // mixNeed is more, and spared its logarithms
	}
	need := p.mixNeed(r)
	if v := float64(r.Evidence); v >= need/2 {
		p.Turned = uint32(at)
		score := alarm * v / need
		if age < mixCloser && r.Strange < 2 {
			score = min(score, 0.8*alarm)
		}
		j.add(triggerMix, score)
		if v >= need && p.Alarmed&2 == 0 {
			r.Share, r.Evidence = 0.3, 0 // told once, adopted
		}
	}
}

// batched reports whether an earlier hour brought the route about as often: a
// backfill that comes again is no turn.
func (r *route) batched() bool {
	peak := peaks[r.Peak]
	return peak >= mixBatch && float32(r.Count) <= 3*peak // it may have begun in the middle of an hour
}

// packPeak keeps a count in a byte, to 9 %.
func packPeak(n uint32) uint8 { return uint8(min(math.Round(8*math.Log2(float64(n)+1)), 255)) }

// peaks are the counts that packPeak keeps.
var peaks = func() (t [256]float32) {
	for i := range t {
		t[i] = float32(math.Exp2(float64(i)/8) - 1)
	}
	return t
}()

// mixOutlier bounds what one day can add to a key's own threshold, in thresholds.
const mixOutlier = 1.3

// planMix sets mixBase. Page's sum passes h about once in exp(h) requests by chance
// alone, so a key with many requests and routes needs more.
func (p *profile) planMix() {
	perMonth := 0.01 * math.Exp(-p.strict)
	chances := 720*float64(p.Level) + 10
	p.mixBase = max(math.Log(5*chances/perMonth), mixFewest)
}

// mixNeed is the evidence that a route must gather, of a key whose own days are what
// MixTail says.
func (p *profile) mixNeed(r *route) float64 {
	perMonth := 0.01 * math.Exp(-p.strict)
	need := max(p.mixBase, p.MixTail.light(perMonth/10, 1, 1), p.MixTail.heavy(perMonth/10, 0.2))
	if r.Strange == 2 {
		need *= mixStranger // that its like never came before was no chance
	}
	return need
}

// mixSteps is the log-likelihood ratio of a request to the route, and the loss by
// one elsewhere, under an alternative with half of the requests or mixMost times p.
func (p *profile) mixSteps(r *route) (here, elsewhere float64) {
	prob := p.routeShare(r)
	q := min(mixOfferings, prob*mixMost)
	if r.Strange == 1 {
		q = mixOfferings // one more endpoint of a known area is a turn only if it takes over
	}
	return math.Log(q / prob), math.Log((1 - prob) / (1 - q))
}

// routeShare is a route's probability, with what so few hours leave uncertain.
func (p *profile) routeShare(r *route) float64 {
	prob := max(float64(r.Share), 1e-5)
	if r.Strange == 0 || r.Peak > 0 {
		prob += 0.3 / (float64(p.MixHours) + 2)
	}
	return prob
}

func (p *profile) findRoute(hash uint32) int {
	for i := range p.Routes {
		if p.Routes[i].Hash == hash {
			return i
		}
	}
	return -1
}

// addRoute takes a slot for a new route: the one that matters least.
func (p *profile) addRoute(f *folded) int {
	day, at := uint32(p.Hour/24), 0
	worst := float32(math.MaxFloat32)
	for i := range p.Routes {
		r := &p.Routes[i]
		worth := float32(-1)
		if r.Hash != 0 {
			age := float32(day) - float32(r.Day)
			worth = (r.Share+r.Evidence)/(1+age*age/225) + float32(r.Count)
		}
		if worth < worst {
			worst, at = worth, i
		}
	}
	newArea := p.newArea(f.areaHash, day)
	share := p.NewRoute.rate(priorRoute)
	p.Fresh |= 1
	strange := uint8(1)
	if newArea {
		share = min(share, p.NewArea.rate(priorRoute))
		p.Fresh |= 2
		strange = 2
	}
	if p.MixHours < 3 || p.Newest-p.First < int64(mixLearning*24*time.Hour) {
		strange = 0
	}
	p.Routes[at] = route{Hash: f.hash, Share: float32(share * 0.2), Day: uint16(day), Strange: strange}
	p.names[at] = unique.Make(f.name)
	return at
}

// newArea reports whether an area is new, or has been so since earlier today, and notes it.
func (p *profile) newArea(hash uint64, day uint32) bool {
	for i := range p.Areas {
		if a := &p.Areas[i]; a.Key == hash && a.Weight == 1 && a.Day == day {
			return true
		}
	}
	return !touch(p.Areas[:], hash, day)
}

// otherEvidence takes from every other route's evidence what a request elsewhere says.
func (p *profile) otherEvidence(but int) {
	for left := p.Stirred &^ (1 << but); left != 0; left &= left - 1 {
		i := bits.TrailingZeros32(left)
		r := &p.Routes[i]
		_, step := p.mixSteps(r)
		if r.Evidence -= float32(step); r.Evidence <= 0 {
			r.Evidence = 0
			p.Stirred &^= 1 << i
		}
	}
}

// closeRoutes learns the hour of use that ended, so many hours ago.
func (p *profile) closeRoutes(ago int64) {
	if p.InHour == 0 {
		return
	}
	kept := float32(math.Pow(mixKept, float64(ago)))
	p.MixHours = min(p.MixHours+1, mixMemory)
	rate := 1 / float64(p.MixHours)
	for i := range p.Routes {
		r := &p.Routes[i]
		if r.Hash == 0 {
			continue
		}
		part := float64(r.Count) / float64(p.InHour)
		r.Share += float32(rate * (part - float64(r.Share)))
		if r.Evidence *= kept; r.Evidence < 1 {
			r.Evidence = 0
			p.Stirred &^= 1 << i
		}
		if r.Count > 0 && r.Strange == 2 && r.Evidence == 0 {
			r.Strange = 1 // its area has come and gone without a stir: it is known by now
		}
		r.Peak = max(r.Peak, packPeak(r.Count))
		r.Count = 0
	}
	p.NewRoute.trial(p.Fresh&1 != 0)
	p.NewArea.trial(p.Fresh&2 != 0)
	p.InHour, p.Fresh = 0, 0
}

func (p *profile) mixWords() (observed, usual string) {
	r := p.Routes[p.Turned]
	name := p.names[p.Turned].Value()
	observed = fmt.Sprintf("%s, %s: %s of this hour's %s requests", name, never(r), thousands(float64(r.Count)), thousands(float64(p.InHour)))
	var parts []string
	for _, s := range p.usualRoutes(3, int(p.Turned)) {
		parts = append(parts, fmt.Sprintf("%s %.1f %%", s.Value, 100*s.Share))
	}
	if len(parts) == 0 {
		return observed, "nothing known yet"
	}
	return observed, strings.Join(parts, ", ")
}

func never(r route) string {
	if r.Peak == 0 && r.Strange > 0 {
		return "never used by this key before"
	}
	return "rarely used by this key before"
}
