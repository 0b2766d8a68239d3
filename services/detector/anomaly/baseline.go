package anomaly

import (
	"math"
	"slices"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/baseline"
)

// Baseline is what is known of a key in a form for people; Partition and
// Sequence are left to the caller. It reports false for an unknown key.
func (e *Engine) Baseline(keyID string) (baseline.Row, bool) {
	p := e.keys.get(keyID)
	if p == nil {
		return baseline.Row{}, false
	}
	row := baseline.Row{
		KeyID: keyID, OrgID: p.org.Value(), ParentKeyID: p.parent,
		UpdatedAt: time.Unix(0, p.Newest).UTC(), FirstSeen: time.Unix(0, p.First).UTC(), LastSeen: time.Unix(0, p.Newest).UTC(),
		Events: p.Events, Maturity: round(p.maturity(), 2), EventsPerHour: round(float64(p.Level), 3),
		Networks: []baseline.Share{}, ASNs: []baseline.Share{}, Countries: []baseline.Share{}, Routes: p.usualRoutes(routeSlots, -1),
	}
	for _, s := range shares(p.Prefixes[:], prefixSlots) {
		row.Networks = append(row.Networks, share(prefixFrom(s.Key).String(), s.Weight))
	}
	for _, s := range shares(p.Operators[:], opSlots) {
		if s.Key&pseudo == 0 {
			row.ASNs = append(row.ASNs, share(e.operatorString(s.Key, p.prefixIn(e, s.Key)), s.Weight))
		}
	}
	for _, s := range shares(p.Countries[:], countrySlots) {
		if s.Key&pseudo == 0 {
			row.Countries = append(row.Countries, share(countryString(s.Key), s.Weight))
		}
	}
	if p.Hours >= 24 {
		row.HourOfWeek = make([]float64, 168)
		for i := range row.HourOfWeek {
			// Hour 96 of 1970 was Monday 00:00 UTC.
			row.HourOfWeek[i] = round(p.expected(96+int64(i)), 3)
		}
	}
	row.GapSecondsMedian, row.GapSecondsMax = p.pauses()
	return row, true
}

// prefixIn is a remembered prefix of an operator, 0 if none.
func (p *profile) prefixIn(e *Engine, operator uint64) uint64 {
	for _, s := range p.Prefixes {
		if s.Weight > 0 && e.locate(addressIn(s.Key)).Operator == operator {
			return s.Key
		}
	}
	return 0
}

func share(value string, part float32) baseline.Share {
	return baseline.Share{Value: value, Share: round(float64(part), 3)}
}

// maturity grows with the days of a key's life and with its hours of use: half a
// month and fifty hours are nearly all of it.
func (p *profile) maturity() float64 {
	days := p.ageDays(p.Newest)
	return (1 - math.Exp(-days/6)) * (1 - math.Exp(-float64(p.MixHours)/8))
}

// pauses are the median and the longest pause between events, in seconds; the
// median is that of a histogram with a factor of two a bin.
func (p *profile) pauses() (median, longest float64) {
	total := 0
	for _, n := range p.Pauses {
		total += int(n)
	}
	seen := 0
	for i, n := range p.Pauses {
		seen += int(n)
		if n > 0 && 2*seen >= total {
			median = math.Exp2(float64(i)) * 0.75
			break
		}
	}
	for i, n := range p.Pauses {
		if n > 0 {
			longest = math.Exp2(float64(i))
		}
	}
	return median, max(min(longest, float64(p.Newest-p.First)/1e9), float64(p.Longest)*86400)
}

// usualRoutes are the n commonest routes, without the slot but.
func (p *profile) usualRoutes(n, but int) []baseline.Share {
	out := []baseline.Share{}
	for i := range p.Routes {
		r := &p.Routes[i]
		if r.Hash == 0 || i == but {
			continue
		}
		part := float64(r.Share)
		if p.MixHours == 0 && p.InHour > 0 {
			part = float64(r.Count) / float64(p.InHour)
		}
		out = append(out, baseline.Share{Value: p.names[i].Value(), Share: round(part, 3)})
	}
	slices.SortStableFunc(out, func(a, b baseline.Share) int {
		switch {
		case a.Share > b.Share:
			return -1
		case a.Share < b.Share:
			return 1
		}
		return strings.Compare(a.Value, b.Value)
	})
	return out[:min(n, len(out))]
}
