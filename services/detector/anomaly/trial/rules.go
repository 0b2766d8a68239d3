package trial

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Rule is a detector as others ship it, as far as their documentation tells.
type Rule struct {
	Name string
	// Spike says whether a running hourly count is a spike after the given full hours,
	// oldest first; nil looks at no volume.
	Spike func(history []float64, count float64) bool
	// NewAfter is how long a key is learned before a new /24 or route is an alert; 0 never.
	NewAfter time.Duration
	// Forget makes values unseen for as long new again; 0 never.
	Forget time.Duration
	// Dormant is the silence that makes a use an alert; 0 never.
	Dormant time.Duration
}

// Rules are those that the comparison shows. Each counts hours over the last
// four weeks, as far as there are, and raises one alert a key, cause and day.
func Rules() []Rule {
	day := 24 * time.Hour
	return []Rule{
		{Name: "fixed 10x mean", Spike: tenTimes(28 * 24)},
		{Name: "Panther 10x of 30 buckets", Spike: tenTimes(30)},
		{Name: "6 sigma", Spike: sigma(6)},
		{Name: "Kusto z > 3 and q > 2", Spike: zAndQ},
		{Name: "new value, 7 days", NewAfter: 7 * day},
		{Name: "new value, 28 days", NewAfter: 28 * day},
		{Name: "new terms, 10 days (Elastic)", NewAfter: 10 * day, Forget: 10 * day},
		{Name: "dormant 45 days", Dormant: 45 * day},
		{Name: "dormant 90 days", Dormant: 90 * day},
		{Name: "dormant 180 days", Dormant: 180 * day},
		{Name: "7 days new + 6 sigma + 30 days dormant", Spike: sigma(6), NewAfter: 7 * day, Dormant: 30 * day},
		{Name: "7 days new + 10x + 30 days dormant", Spike: tenTimes(28 * 24), NewAfter: 7 * day, Dormant: 30 * day},
	}
}

func tenTimes(buckets int) func([]float64, float64) bool {
	return func(h []float64, count float64) bool {
		h = h[max(0, len(h)-buckets):]
		if len(h) < 24 {
			return false
		}
		m, _ := moments(h)
		return count > 10*m && count > 1
	}
}

func sigma(k float64) func([]float64, float64) bool {
	return func(h []float64, count float64) bool {
		if len(h) < 7*24 {
			return false
		}
		m, sd := moments(h)
		return count > m+k*sd && count > 1
	}
}

// zAndQ is the published form of Kusto's entity spike: z-score above 3, and more than
// twice the span between the 10th and 90th percentile above the latter.
func zAndQ(h []float64, count float64) bool {
	if len(h) < 7*24 {
		return false
	}
	m, sd := moments(h)
	if count <= m+3*sd || count <= 1 {
		return false
	}
	sorted := slices.Sorted(slices.Values(h))
	low, high := sorted[len(sorted)/10], sorted[len(sorted)*9/10]
	return count > high+2*max(high-low, 1)
}

func moments(x []float64) (mean, sd float64) {
	for _, v := range x {
		mean += v
	}
	mean /= float64(len(x))
	for _, v := range x {
		sd += (v - mean) * (v - mean)
	}
	return mean, math.Sqrt(sd / float64(len(x)))
}

// Detector makes a fresh detector of the rule.
func (r Rule) Detector() Detector { return &ruleDetector{rule: r, keys: map[string]*ruleKey{}} }

type ruleDetector struct {
	rule Rule
	keys map[string]*ruleKey
}

type ruleKey struct {
	first, last time.Time
	hour        int64
	count       float64
	history     []float64
	networks    map[netip.Prefix]time.Time
	routes      map[string]time.Time
	// checked is the least count known to be no spike this hour.
	checked float64
}

const ruleHistory = 28 * 24

func (d *ruleDetector) Observe(ev *usage.Event) []Flag {
	k := d.keys[ev.KeyID]
	if k == nil {
		k = &ruleKey{
			first: ev.Time, last: ev.Time, hour: ev.Time.Unix() / 3600,
			networks: map[netip.Prefix]time.Time{}, routes: map[string]time.Time{},
		}
		d.keys[ev.KeyID] = k
	}
	var causes []string
	if d.rule.Dormant > 0 && ev.Time.Sub(k.last) > d.rule.Dormant {
		causes = append(causes, "dormant")
	}
	if d.rule.NewAfter > 0 {
		bits := 24
		if ev.SourceIP.Is6() {
			bits = 64
		}
		p, _ := ev.SourceIP.Prefix(bits)
		if fresh(k.networks, p, ev.Time, d.rule.Forget) && ev.Time.Sub(k.first) > d.rule.NewAfter {
			causes = append(causes, "network")
		}
		if fresh(k.routes, ev.Method+" "+ev.Route, ev.Time, d.rule.Forget) && ev.Time.Sub(k.first) > d.rule.NewAfter {
			causes = append(causes, "route")
		}
	}
	if d.rule.Spike != nil && d.volume(k, ev.Time) {
		causes = append(causes, "volume")
	}
	if ev.Time.After(k.last) {
		k.last = ev.Time
	}
	var out []Flag
	for _, c := range causes {
		out = append(out, Flag{
			ID:    fmt.Sprintf("%s/%s/%s", ev.KeyID, c, ev.Time.Format(time.DateOnly)),
			KeyID: ev.KeyID, Time: ev.Time, Summary: c,
		})
	}
	return out
}

func (d *ruleDetector) volume(k *ruleKey, at time.Time) bool {
	hour := at.Unix() / 3600
	if hour < k.hour {
		return false
	}
	for ; k.hour < hour; k.hour++ {
		k.history = append(k.history, k.count)
		k.count, k.checked = 0, 0
	}
	if n := len(k.history); n > 2*ruleHistory {
		k.history = append(k.history[:0], k.history[n-ruleHistory:]...)
	}
	k.count++
	if k.count <= k.checked {
		return false
	}
	if d.rule.Spike(k.history[max(0, len(k.history)-ruleHistory):], k.count) {
		return true
	}
	k.checked = k.count * 1.05 // a running count need not be looked at on every request
	return false
}

func fresh[K comparable](seen map[K]time.Time, v K, at time.Time, forget time.Duration) bool {
	last, ok := seen[v]
	seen[v] = at
	return !ok || forget > 0 && at.Sub(last) > forget
}

// sortedNames are a map's keys in order.
func sortedNames[V any](m map[string]V) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.SortFunc(names, cmp.Compare[string])
	return names
}
