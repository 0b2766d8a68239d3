package anomaly

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// networkState is where a key is used from, at four levels that back off from
// fine to coarse: prefix (/24, /64), neighbourhood (/16, /48), operator (the
// autonomous system, or /16 and /32 where none is known) and country (or the
// registry's region where none is known).
type networkState struct {
	// LastPrefix and LastVisit (hour) are the latest visit; Strange is the latest
	// prefix that was news, for the words of an alert.
	LastPrefix, LastOperator, LastCountry uint64
	// WideDay is the day of the latest trial of operator and country.
	WideDay   uint32
	LastVisit int64
	Strange   place
	Prefixes  [prefixSlots]slot
	Coarse    [coarseSlots]slot
	Operators [opSlots]slot
	Countries [countrySlots]slot
	// NewPrefix and so on say how often a visit brings news at that level. A visit is
	// an hour of use from a prefix, or a change of prefix.
	NewPrefix, NewCoarse, NewOperator, NewCountry novelty
	// Hosted and Housed count the visits from hosting and from other networks.
	Hosted, Housed float32
}

// place is an address as the levels see it.
type place struct {
	Prefix, Coarse, Operator, Country uint64
	Hosting                           uint8
	Known                             uint8 // 1: operator known, 2: country known
	_                                 [6]uint8
}

const (
	operatorKnown = 1
	countryKnown  = 2
	pseudo        = 1 << 63 // marks stand-ins for what no data names
)

// Population priors: how often a new prefix of a key is also a new operator or
// country, and the pseudo-count of news of a key that never showed any.
const (
	priorNews      = 0.025
	newsHalfLife   = 10.0 // days
	priorKnown     = 25.0 // a new prefix of a known operator is this much less news
	priorLine      = 80.0 // more so where its customers' lines change their addresses
	priorCoarse    = 8.0
	priorOperator  = 0.4
	priorRegion    = 0.3
	priorCountry   = 0.15
	priorHosting   = 0.3  // a key of people's networks turning up in a data centre
	networkNormal  = 0.4  // score that makes p = 0.0025 an alarm at the default budget
	networkCertain = 3.0  // days before a network can be news
	networkEvents  = 50   // requests that tell of a home in fewer visits than three
	networkSettled = 14.0 // days before it is news at full weight
)

// prefixOf is the /24 or /64 of an address as a number: IPv4 has a first byte of
// 4, which no global IPv6 address has.
func prefixOf(a netip.Addr) uint64 {
	if a.Is4() {
		b := a.As4()
		return 4<<56 | uint64(binary.BigEndian.Uint32(b[:])>>8)
	}
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8])
}

func isV4(prefix uint64) bool { return prefix>>56 == 4 }

// prefixFrom is the prefix of a number of prefixOf.
func prefixFrom(prefix uint64) netip.Prefix {
	if isV4(prefix) {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(prefix<<8))
		return netip.PrefixFrom(netip.AddrFrom4(b), 24)
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], prefix)
	return netip.PrefixFrom(netip.AddrFrom16(b), 64)
}

// locate finds an address's place; answers are kept per prefix.
func (e *Engine) locate(a netip.Addr) place {
	prefix := prefixOf(a)
	if l, ok := e.places[prefix]; ok {
		return l
	}
	l := place{Prefix: prefix}
	if isV4(prefix) {
		l.Coarse = pseudo | prefix>>8
		l.Operator = l.Coarse
		l.Country = pseudo | uint64(region4(byte(prefix>>16)))
	} else {
		l.Coarse = pseudo | prefix>>16
		l.Operator = pseudo | prefix>>32
		l.Country = pseudo | uint64(region6(prefix))
	}
	if e.opts.Locate != nil {
		at := e.opts.Locate(prefixFrom(prefix).Addr()) // whoever of the prefix came first
		if at.ASN != 0 {
			l.Operator, l.Known = uint64(sibling(at.ASN)), l.Known|operatorKnown
		}
		if len(at.Country) == 2 {
			l.Country, l.Known = uint64(at.Country[0])<<8|uint64(at.Country[1]), l.Known|countryKnown
		}
		if at.Hosting {
			l.Hosting = 1
		}
		if l.Known == countryKnown { // unannounced or missing: one operator per country
			l.Operator = pseudo | 1<<32 | l.Country
		}
	}
	if len(e.places) >= 1<<16 {
		clear(e.places)
	}
	e.places[prefix] = l
	return l
}

// judgeNetwork asks how probable it is that this key turns up in a network that
// it never used, and learns the visit.
func (e *Engine) judgeNetwork(p *profile, ev *usage.Event, j *judgement) {
	if ev.SourceIP.IsUnspecified() { // the log named no address: there is no network to learn
		return
	}
	prefix := prefixOf(ev.SourceIP)
	if prefix == p.LastPrefix && p.Hour == p.LastVisit {
		return
	}
	day := uint32(p.Hour / 24)
	l := e.locate(ev.SourceIP)
	knownPrefix := has(p.Prefixes[:], l.Prefix)
	if !knownPrefix && p.Events > 1 {
		p.Strange = l
		j.add(triggerNetwork, p.strangeness(l, j.now))
	}
	p.LastPrefix, p.LastVisit = prefix, p.Hour
	p.NewPrefix.trial(!touch(p.Prefixes[:], l.Prefix, day))
	p.NewCoarse.trial(!touch(p.Coarse[:], l.Coarse, day))
	if !p.hole(l) {
		p.visitWide(l, day)
	}
	if l.Hosting != 0 {
		p.Hosted++
	} else {
		p.Housed++
	}
	if p.Hosted+p.Housed > noveltyMemory {
		p.Hosted, p.Housed = p.Hosted/2, p.Housed/2
	}
}

// visitWide learns the operator and the country. Their trials are days and
// changes, for people and devices stay for days where they are, and news of a
// month ago count little: a device that has seen all its carriers in its first days
// is at home among them.
func (p *profile) visitWide(l place, day uint32) {
	if days := day - p.WideDay; p.WideDay != 0 && days > 0 {
		x := float64(min(days, 60))
		for _, n := range []*novelty{&p.NewOperator, &p.NewCountry} {
			n.fade(float32(1-math.Exp2(-x/60)), float32(1-math.Exp2(-x/newsHalfLife)))
		}
	}
	newDay := day != p.WideDay
	p.WideDay = day
	newOperator := !touch(p.Operators[:], l.Operator, day)
	newCountry := !touch(p.Countries[:], l.Country, day)
	if newDay || l.Operator != p.LastOperator {
		p.NewOperator.trial(newOperator)
	}
	if newDay || l.Country != p.LastCountry {
		p.NewCountry.trial(newCountry)
	}
	p.LastOperator, p.LastCountry = l.Operator, l.Country
}

// strangeness is the score of a prefix that the key does not know. News at a
// coarse level are news at the finer ones too, so the least probability counts.
func (p *profile) strangeness(l place, now int64) float64 {
	prob := p.NewPrefix.rate(priorNews)
	knownOperator, knownCoarse := has(p.Operators[:], l.Operator), has(p.Coarse[:], l.Coarse)
	switch {
	case p.hole(l):
		if knownCoarse {
			return 0
		}
	case knownOperator && l.Hosting != 0: // where a cloud's network is said to be is no news
		if knownCoarse {
			return 0
		}
		prob *= priorKnown
	case !l.anywhere() && !has(p.Countries[:], l.Country):
		prob = min(prob, p.NewCountry.rate(priorNews)) * p.countryPrior(l)
		if !knownOperator {
			prob = min(prob, p.NewOperator.rate(priorNews)*p.countryPrior(l))
		}
	case !knownOperator:
		prob = min(prob, p.NewOperator.rate(priorNews)) * priorOperator
		if l.Hosting == 0 {
			prob *= float64(max(1, count(p.Operators[:])-1)) // who roams meets one more
		}
		if l.Known&operatorKnown == 0 && knownCoarse {
			prob *= priorCoarse
		}
	case knownCoarse:
		return 0
	default:
		prob *= priorLine
	}
	score := -math.Log10(min(prob, 1)) + networkNormal
	switch age := p.ageDays(now); {
	case age < networkCertain || p.NewPrefix.Trials < 2.5 && p.Events < networkEvents:
		return 0
	case age < networkSettled:
		score -= 0.2 * (networkSettled - age)
	}
	return max(score, 0)
}

// anywhere reports whether neither data nor the registry say where a place is.
func (l place) anywhere() bool {
	return l.Known&countryKnown == 0 && byte(l.Country) == mixedRegion
}

// hole reports whether data that know the key's networks say nothing of a place: it
// is no other country or operator, and makes none that follows less of a surprise.
func (p *profile) hole(l place) bool { return l.Known == 0 && p.located() }

// located reports whether data named the place of any network of the key.
func (p *profile) located() bool {
	for i := range p.Countries {
		if p.Countries[i].Weight > 0 && p.Countries[i].Key&pseudo == 0 {
			return true
		}
	}
	return false
}

// countryPrior is how often a new prefix is also one of a new country, in the
// population: seldom, but for operators whose networks span countries anyway.
func (p *profile) countryPrior(l place) float64 {
	switch {
	case l.Known&operatorKnown != 0 && has(p.Operators[:], l.Operator):
		return priorOperator
	case l.Known&countryKnown != 0:
		return priorCountry
	}
	return priorRegion
}

// sibling maps the systems of the big clouds to one each: their customers' traffic
// leaves by any of them.
func sibling(asn uint32) uint32 {
	switch asn {
	case 14618, 8987, 7224, 10124, 38895, 39111, 58588, 62785, 801:
		return 16509 // Amazon
	case 8068, 8069, 8070, 12076, 3598, 5761, 6584, 20046, 23468, 35106, 45139, 52985, 58862, 59067, 63314, 200517, 395851, 398575, 398656, 400572:
		return 8075 // Microsoft
	case 396982, 19527, 16550, 36384, 36385, 36492, 43515, 139070, 139190, 394089, 395973:
		return 15169 // Google
	case 45102, 45103, 59028, 134963:
		return 37963 // Alibaba
	case 132203, 133478:
		return 45090 // Tencent
	case 213230, 212317, 215859:
		return 24940 // Hetzner
	case 35540:
		return 16276 // OVH
	case 209242, 132892, 202623, 203898, 395747:
		return 13335 // Cloudflare
	case 62567, 200130, 202018, 202109, 393406, 394362:
		return 14061 // DigitalOcean
	}
	return asn
}

func (l place) words(e *Engine) string {
	parts := []string{prefixFrom(l.Prefix).String()}
	if l.Known&countryKnown != 0 {
		parts = append(parts, countryString(l.Country))
	}
	if l.Known&operatorKnown != 0 {
		parts = append(parts, e.operatorString(l.Operator, l.Prefix))
	}
	return strings.Join(parts, ", ")
}

func countryString(c uint64) string { return string([]byte{byte(c >> 8), byte(c)}) }

func (e *Engine) operatorString(op, prefix uint64) string {
	if op&pseudo != 0 {
		return ""
	}
	s := fmt.Sprintf("AS%d", op)
	if e.opts.Locate == nil || prefix == 0 {
		return s
	}
	if at := e.opts.Locate(addressIn(prefix)); uint64(sibling(at.ASN)) == op && at.ASName != "" {
		s += " " + at.ASName
	}
	return s
}

// addressIn is an address of a prefix.
func addressIn(prefix uint64) netip.Addr {
	a := prefixFrom(prefix).Addr()
	return a.Next()
}

func (p *profile) networkWords(e *Engine, ev *usage.Event) (observed, usual string) {
	l := e.locate(ev.SourceIP)
	observed = l.words(e)
	switch {
	case p.wasNew(p.Countries[:], l.Country) && l.Known&countryKnown != 0:
		observed += ": a country never seen with this key"
	case p.wasNew(p.Operators[:], l.Operator) && l.Known&operatorKnown != 0:
		observed += ": a network operator never seen with this key"
	default:
		observed += ": a network never seen with this key"
	}
	if l.Hosting != 0 {
		observed += ", in a data centre"
	}
	return observed, p.usualNetworks(e, l)
}

// wasNew reports whether a value has been seen in this one visit only.
func (p *profile) wasNew(set []slot, key uint64) bool {
	for i := range set {
		if set[i].Key == key {
			return set[i].Weight <= 1
		}
	}
	return true
}

func (p *profile) usualNetworks(e *Engine, but place) string {
	total, at := float32(0), -1
	others := 0
	for i, s := range p.Prefixes {
		total += s.Weight
		if s.Key == but.Prefix || s.Weight == 0 {
			continue
		}
		others++
		if at < 0 || s.Weight > p.Prefixes[at].Weight {
			at = i
		}
	}
	if at < 0 {
		return "nothing known yet"
	}
	top := p.Prefixes[at]
	share := 100 * float64(top.Weight) / float64(total)
	if others > 4 && share < 40 {
		return fmt.Sprintf("many networks: %s", strings.Join(p.usualCountries(but), ", "))
	}
	return fmt.Sprintf("%s (%.1f %% of its hours of use, %s requests since %s)", e.locate(addressIn(top.Key)).words(e),
		share, thousands(float64(p.Events-1)), time.Unix(0, p.First).UTC().Format("2 January 2006"))
}

func (p *profile) usualCountries(but place) []string {
	var out []string
	for _, s := range shares(p.Countries[:], 4) {
		if s.Key != but.Country && s.Key&pseudo == 0 {
			out = append(out, fmt.Sprintf("%s %.0f %%", countryString(s.Key), 100*s.Weight))
		}
	}
	for _, s := range shares(p.Operators[:], 3) {
		if s.Key != but.Operator && s.Key&pseudo == 0 {
			out = append(out, fmt.Sprintf("AS%d %.0f %%", s.Key, 100*s.Weight))
		}
	}
	if len(out) == 0 {
		for _, s := range shares(p.Prefixes[:], 3) {
			out = append(out, prefixFrom(s.Key).String())
		}
	}
	return out
}
