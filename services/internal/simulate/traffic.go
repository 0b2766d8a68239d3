package simulate

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Options of a [Traffic].
type Options struct {
	Seed    uint64
	Variant Variant
	Start   time.Time
	Days    int
	// Keys is the number of keys, spread evenly over [Kinds].
	Keys int
	// Attacks is how many keys are misused once each; the attacks are spread evenly over Only.
	Attacks int
	// Only are the attacks to choose from; empty is all of them.
	Only []Attack
}

// Label says what one key of the traffic is, and what is done to it.
type Label struct {
	OrgID string `json:"org_id"`
	KeyID string `json:"key_id"`
	Kind  Kind   `json:"kind"`
	// Attack is empty for a key that is left alone; Start and End are the times of its
	// first and last event, Events their number.
	Attack Attack     `json:"attack,omitempty"`
	Start  *time.Time `json:"start,omitempty"`
	End    *time.Time `json:"end,omitempty"`
	Events int        `json:"events,omitempty"`
}

// Traffic is the events of many keys.
type Traffic struct {
	opts   Options
	lives  []*Life
	attack [][]usage.Event // by life
	labels []Label
}

// New draws keys and attacks.
func New(o Options) *Traffic {
	if len(o.Only) == 0 {
		o.Only = Attacks
	}
	if o.Variant == "" {
		o.Variant = VariantA
	}
	o.Start = o.Start.UTC().Truncate(24 * time.Hour)
	t := &Traffic{opts: o}
	r := rand.New(rand.NewPCG(o.Seed, 77))
	for i := range o.Keys {
		kind := Kinds[i%len(Kinds)]
		key := fmt.Sprintf("key_%s_%d_%03d", o.Variant, o.Seed, i)
		org := fmt.Sprintf("org_%d", i/8)
		t.lives = append(t.lives, NewLife(kind, o.Variant, o.Seed, org, key, o.Start))
		t.labels = append(t.labels, Label{OrgID: org, KeyID: key, Kind: kind})
	}
	t.attack = make([][]usage.Event, len(t.lives))
	for i := range o.Attacks {
		t.misuse(r, o.Only[i%len(o.Only)])
	}
	return t
}

// misuse finds a victim that is still free for an attack in the traffic's second half.
func (t *Traffic) misuse(r *rand.Rand, a Attack) {
	var free []int
	for i, l := range t.lives {
		if t.labels[i].Attack == "" && slices.Contains(a.victims(), l.Kind) {
			free = append(free, i)
		}
	}
	if len(free) == 0 {
		return
	}
	i := free[r.IntN(len(free))]
	l := t.lives[i]
	l.prepare(a)
	first := t.opts.Days * 2 / 5
	if l.ends < t.opts.Days {
		first = min(l.ends+28, t.opts.Days-2)
	}
	day := t.opts.Start.AddDate(0, 0, first+r.IntN(max(t.opts.Days-1-first, 1)))
	if day.Weekday() == time.Saturday || day.Weekday() == time.Sunday {
		day = day.AddDate(0, 0, -2)
	}
	events := l.Attack(a, l.begin(a, day, r))
	if len(events) == 0 {
		return
	}
	t.attack[i] = events
	start, end := events[0].Time, events[len(events)-1].Time
	t.labels[i].Attack, t.labels[i].Start, t.labels[i].End, t.labels[i].Events = a, &start, &end, len(events)
}

// Labels are those of all keys.
func (t *Traffic) Labels() []Label { return slices.Clone(t.labels) }

// Events are all events in the order of their arrival, which is that of their
// times but for backfills.
func (t *Traffic) Events() iter.Seq[*usage.Event] {
	return func(yield func(*usage.Event) bool) {
		var pending []*arrival
		for d := range t.opts.Days {
			day := t.opts.Start.AddDate(0, 0, d)
			next := day.AddDate(0, 0, 1)
			for i, l := range t.lives {
				pending = append(pending, t.day(i, l, day)...)
			}
			slices.SortStableFunc(pending, func(a, b *arrival) int { return a.at.Compare(b.at) })
			n := 0
			for n < len(pending) && (pending[n].at.Before(next) || d == t.opts.Days-1) {
				if !yield(&pending[n].ev) {
					return
				}
				n++
			}
			pending = append([]*arrival(nil), pending[n:]...)
		}
	}
}

type arrival struct {
	at time.Time
	ev usage.Event
}

func (t *Traffic) day(i int, l *Life, day time.Time) []*arrival {
	var out []*arrival
	next := day.AddDate(0, 0, 1)
	var from, to time.Time
	if a := t.labels[i]; a.Attack != "" && a.Attack.replaces() {
		from, to = *a.Start, *a.End
	}
	for _, ev := range l.Day(day) {
		if !from.IsZero() && !ev.Time.Before(from) && !ev.Time.After(to) {
			continue
		}
		at := ev.Time
		if l.late && at.Before(day) { // a backfill arrives on its day, with old times
			at = day.Add(10 * time.Hour)
		}
		out = append(out, &arrival{at, ev})
	}
	for _, ev := range t.attack[i] {
		if !ev.Time.Before(day) && ev.Time.Before(next) {
			out = append(out, &arrival{ev.Time, ev})
		}
	}
	return out
}
