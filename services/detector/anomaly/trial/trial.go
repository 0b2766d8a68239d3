// Package trial measures detectors against labelled traffic: ours, and the rules
// that others use, on the same events.
package trial

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
	"github.com/latchkey-dev/latchkey/services/internal/geo"
	"github.com/latchkey-dev/latchkey/services/internal/simulate"
)

// Detector raises alerts on a stream of events.
type Detector interface {
	Observe(ev *usage.Event) []Flag
}

// Flag is one alert as a trial counts it; alerts with the same ID are one.
type Flag struct {
	ID, KeyID string
	Time      time.Time
	Summary   string
	Triggers  []string
}

// Engine is our detector at a budget.
func Engine(budget float64, locate func(netip.Addr) geo.Location) Detector {
	return &engine{anomaly.New(anomaly.Options{Budget: budget, Locate: locate})}
}

type engine struct{ e *anomaly.Engine }

func (d *engine) Observe(ev *usage.Event) []Flag {
	alerts := d.e.Observe(ev, false)
	if len(alerts) == 0 {
		return nil
	}
	out := make([]Flag, len(alerts))
	for i, a := range alerts {
		out[i] = flagOf(a)
	}
	return out
}

func flagOf(a alert.Alert) Flag {
	return Flag{ID: a.ID, KeyID: a.KeyID, Time: a.Time, Summary: a.Summary, Triggers: a.Triggers}
}

// Outcome is what a detector made of one traffic.
type Outcome struct {
	Cases []Case
	False []False
	// KeyMonths are the months of 30 days that keys of a kind were watched, after cold start.
	KeyMonths map[simulate.Kind]float64
	// Cold are the false alerts of the keys' first days, not in False.
	Cold int
}

// Case is one attack.
type Case struct {
	Label simulate.Label
	Found bool
	// Delay and Events are from the attack's first event to the alert, which counts itself.
	Delay  time.Duration
	Events int
	// Alerts is how many different alerts the attack raised.
	Alerts int
}

// False is an alert outside of any attack on its key.
type False struct {
	Kind  simulate.Kind
	KeyID string
	Flag  Flag
}

// ColdStart is the part of a key's life that is counted apart.
const ColdStart = 7 * 24 * time.Hour

// grace is how long after an attack's last event its alerts are still its own.
const grace = 24 * time.Hour

// Run feeds a traffic to a detector.
func Run(t *simulate.Traffic, o simulate.Options, d Detector) Outcome {
	return RunAll(t, o, []Detector{d})[0]
}

// RunAll feeds a traffic, made once, to several detectors side by side.
func RunAll(t *simulate.Traffic, o simulate.Options, detectors []Detector) []Outcome {
	book := newBook(t.Labels())
	out := make([]Outcome, len(detectors))
	ids := make([]map[string]bool, len(detectors))
	for i := range out {
		out[i], ids[i] = book.outcome(o), map[string]bool{}
	}
	for ev := range t.Events() {
		book.count(ev)
		for i, d := range detectors {
			for _, f := range d.Observe(ev) {
				if !ids[i][f.ID] {
					ids[i][f.ID] = true
					out[i].take(f, book, o.Start)
				}
			}
		}
	}
	return out
}

// book is the labels, ready to look up.
type book struct {
	labels []simulate.Label
	byKey  map[string]int
	caseOf map[string]int
	counts map[string]int // events of the attack on a key so far
}

func newBook(labels []simulate.Label) *book {
	b := &book{labels: labels, byKey: map[string]int{}, caseOf: map[string]int{}, counts: map[string]int{}}
	for i, l := range labels {
		b.byKey[l.KeyID] = i
		if l.Attack != "" {
			b.caseOf[l.KeyID] = len(b.caseOf)
		}
	}
	return b
}

func (b *book) outcome(o simulate.Options) Outcome {
	out := Outcome{KeyMonths: map[simulate.Kind]float64{}}
	for _, l := range b.labels {
		out.KeyMonths[l.Kind] += float64(o.Days)/30 - ColdStart.Hours()/720
		if l.Attack != "" {
			out.Cases = append(out.Cases, Case{Label: l})
		}
	}
	return out
}

func (b *book) count(ev *usage.Event) {
	if i, known := b.byKey[ev.KeyID]; known {
		if l := b.labels[i]; l.Attack != "" && !ev.Time.Before(*l.Start) && !ev.Time.After(*l.End) {
			b.counts[ev.KeyID]++
		}
	}
}

func (out *Outcome) take(f Flag, b *book, start time.Time) {
	i, known := b.byKey[f.KeyID]
	if !known { // a guessed key: it belongs to the guessing that runs
		for k := range out.Cases {
			c := &out.Cases[k]
			if c.Label.Attack == simulate.Guessing && !f.Time.Before(*c.Label.Start) && !f.Time.After(*c.Label.End) {
				c.hit(f, b.counts[c.Label.KeyID])
			}
		}
		return
	}
	l := b.labels[i]
	if l.Attack != "" && !f.Time.Before(*l.Start) && f.Time.Before(l.End.Add(grace)) {
		out.Cases[b.caseOf[l.KeyID]].hit(f, b.counts[l.KeyID])
		return
	}
	if f.Time.Sub(start) < ColdStart {
		out.Cold++
		return
	}
	out.False = append(out.False, False{l.Kind, l.KeyID, f})
}

func (c *Case) hit(f Flag, events int) {
	c.Alerts++
	if !c.Found {
		c.Found, c.Delay, c.Events = true, f.Time.Sub(*c.Label.Start), events
	}
}

// Summary is the figures of several outcomes together.
type Summary struct {
	Recall    float64            `json:"recall"`
	RecallLow float64            `json:"recall_low"` // 95 % Wilson interval
	RecallTop float64            `json:"recall_high"`
	ByAttack  map[string]float64 `json:"recall_by_attack"`
	Attacks   int                `json:"attacks"`
	PerMonth  float64            `json:"false_alerts_per_key_month"`
	PerLow    float64            `json:"false_alerts_low"` // 95 % Poisson interval
	PerHigh   float64            `json:"false_alerts_high"`
	ByKind    map[string]float64 `json:"false_alerts_by_kind"`
	KeyMonths float64            `json:"key_months"`
	Cold      int                `json:"cold_start_alerts"`
	// MedianEvents, MedianSeconds and their 90th percentiles are to the first alert, nil
	// where no attack was found.
	MedianEvents  *float64 `json:"events_to_alert_median"`
	NinetyEvents  *float64 `json:"events_to_alert_p90"`
	MedianSeconds *float64 `json:"seconds_to_alert_median"`
	NinetySeconds *float64 `json:"seconds_to_alert_p90"`
	// Mails is the number of different alerts per found attack.
	Mails float64 `json:"mails_per_episode"`
}

// Summarize adds outcomes up.
func Summarize(outcomes []Outcome) Summary {
	s := Summary{ByAttack: map[string]float64{}, ByKind: map[string]float64{}}
	found, mails, falses := 0, 0, 0
	all, hit := map[string]float64{}, map[string]float64{}
	months, wrong := map[string]float64{}, map[string]float64{}
	var events, seconds []float64
	for _, o := range outcomes {
		s.Cold += o.Cold
		for _, c := range o.Cases {
			name := string(c.Label.Attack)
			s.Attacks++
			all[name]++
			if c.Found {
				found++
				hit[name]++
				mails += c.Alerts
				events = append(events, float64(c.Events))
				seconds = append(seconds, c.Delay.Seconds())
			}
		}
		for k, m := range o.KeyMonths {
			months[string(k)] += m
			s.KeyMonths += m
		}
		for _, f := range o.False {
			wrong[string(f.Kind)]++
			falses++
		}
	}
	for a, n := range all {
		s.ByAttack[a] = hit[a] / n
	}
	for k, m := range months {
		s.ByKind[k] = wrong[k] / m
	}
	s.Recall = float64(found) / math.Max(1, float64(s.Attacks))
	s.RecallLow, s.RecallTop = wilson(found, s.Attacks)
	s.PerMonth = float64(falses) / s.KeyMonths
	low, high := poissonInterval(falses)
	s.PerLow, s.PerHigh = low/s.KeyMonths, high/s.KeyMonths
	s.MedianEvents, s.NinetyEvents = quantile(events, 0.5), quantile(events, 0.9)
	s.MedianSeconds, s.NinetySeconds = quantile(seconds, 0.5), quantile(seconds, 0.9)
	s.Mails = float64(mails) / math.Max(1, float64(found))
	return s
}

// wilson is the 95 % interval of a proportion (Wilson 1927).
func wilson(k, n int) (low, high float64) {
	if n == 0 {
		return 0, 1
	}
	const z = 1.96
	p, m := float64(k)/float64(n), float64(n)
	mid := (p + z*z/(2*m)) / (1 + z*z/m)
	half := z / (1 + z*z/m) * math.Sqrt(p*(1-p)/m+z*z/(4*m*m))
	return max(0, mid-half), min(1, mid+half)
}

// poissonInterval is the 95 % interval of a Poisson mean given its count
// (Byar's approximation to the exact one).
func poissonInterval(k int) (low, high float64) {
	const z = 1.96
	n := float64(k)
	if k > 0 {
		low = n * math.Pow(1-1/(9*n)-z/(3*math.Sqrt(n)), 3)
	}
	n++
	return low, n * math.Pow(1-1/(9*n)+z/(3*math.Sqrt(n)), 3)
}

// quantile is nil for no values.
func quantile(x []float64, q float64) *float64 {
	if len(x) == 0 {
		return nil
	}
	slices.SortFunc(x, cmp.Compare[float64])
	return &x[min(int(q*float64(len(x))), len(x)-1)]
}
