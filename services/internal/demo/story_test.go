package demo

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
)

// TestTheStoryIsTold runs the whole demo through the detector without clock or
// servers, begun at several hours: each attack raises one alert that names its
// trigger within the attack, and nothing else is raised.
func TestTheStoryIsTold(t *testing.T) {
	t.Parallel()
	for _, start := range []time.Time{
		began,
		time.Date(2026, 3, 8, 2, 10, 0, 0, time.UTC),   // a Sunday night
		time.Date(2026, 3, 9, 5, 59, 20, 0, time.UTC),  // the cron job is about to run
		time.Date(2026, 3, 11, 23, 59, 0, 0, time.UTC), // midnight comes within the minute
	} {
		t.Run(start.Format("Mon1504"), func(t *testing.T) {
			t.Parallel()
			tell(t, start)
		})
	}
}

func tell(t *testing.T, start time.Time) {
	engine := anomaly.New(anomaly.Options{})
	var live []usage.Event
	names := map[string]string{}
	cast := map[string]member{}
	for part, m := range victims() {
		cast[m.name] = m
		names[m.name] = part
	}
	for _, m := range quiet() {
		cast[m.name] = m
	}
	for name, m := range cast {
		if err := m.span(name, "org_1", start, time.Time{}, start.Add(time.Hour), func(events []usage.Event) error {
			for i := range events {
				if !events[i].Time.Before(start) {
					live = append(live, events[i])
				} else if alerts := engine.Observe(&events[i], true); len(alerts) > 0 && !alerts[0].Historical {
					t.Errorf("history of %s raises a live alert: %s", name, alerts[0].Summary)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	rng := rand.New(rand.NewPCG(7, 7))
	for _, a := range attacks() {
		m := victims()[a.part]
		h := a.habit(m.habit, 1)
		for i := range a.requests {
			at := start.Add(a.starts + time.Duration(i)*a.lasts/time.Duration(a.requests))
			live = append(live, h.event(rng, m.name, "org_1", at))
		}
	}
	slices.SortStableFunc(live, func(a, b usage.Event) int { return a.Time.Compare(b.Time) })

	raised := map[string][]alert.Alert{}
	for i := range live {
		for _, a := range engine.Observe(&live[i], false) {
			if a.Revision == 1 {
				raised[a.KeyID] = append(raised[a.KeyID], a)
			}
		}
	}
	for _, a := range attacks() {
		name := victims()[a.part].name
		got := raised[name]
		delete(raised, name)
		if len(got) != 1 || !slices.Contains(got[0].Triggers, a.trigger) {
			t.Errorf("%s: %d alerts %+v, want one with %s", name, len(got), got, a.trigger)
			continue
		}
		t.Logf("%s: %s after %s, %s", name, got[0].Summary, got[0].Time.Sub(start.Add(a.starts)), got[0].Severity)
	}
	for name, got := range raised {
		t.Errorf("%s is quiet, and yet: %s", name, got[0].Summary)
	}
}
