package demo

import (
	"slices"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

var began = time.Date(2026, 3, 5, 14, 30, 0, 0, time.UTC)

func collect(t *testing.T, m member, from, to time.Time) []usage.Event {
	t.Helper()
	var all []usage.Event
	err := m.span("key_1", "org_1", began, from, to, func(events []usage.Event) error {
		all = append(all, events...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func members() []member {
	all := quiet()
	for _, m := range victims() {
		all = append(all, m)
	}
	return all
}

// TestSpansJoin shows that a life told in pieces is the same life: a restart
// fills the gap since the last run and nothing is stored twice.
func TestSpansJoin(t *testing.T) {
	t.Parallel()
	for _, m := range members() {
		whole := collect(t, m, time.Time{}, began.Add(day))
		cut := began.Add(-3*day - 7*time.Hour)
		pieces := append(collect(t, m, time.Time{}, cut), collect(t, m, cut, began.Add(day))...)
		if !slices.Equal(whole, pieces) {
			t.Errorf("%s: %d events in one piece, %d in two", m.name, len(whole), len(pieces))
		}
		if len(whole) == 0 {
			t.Errorf("%s is never used", m.name)
		}
	}
}

func TestEventsAreValid(t *testing.T) {
	t.Parallel()
	ids := map[string]bool{}
	for _, m := range members() {
		for _, e := range collect(t, m, began.Add(-40*day), began) {
			e.Normalize()
			if err := e.Validate(began); err != nil {
				t.Fatalf("%s: %v", m.name, err)
			}
		}
		if ids[m.name] {
			t.Errorf("two keys are named %s", m.name)
		}
		ids[m.name] = true
	}
	if len(ids) != 12 {
		t.Errorf("%d keys, the demo promises a dozen", len(ids))
	}
}

func TestTheSleeperSleeps(t *testing.T) {
	t.Parallel()
	m := victims()[waking]
	if events := collect(t, m, began.Add(-m.until), began.Add(day)); len(events) > 0 {
		t.Errorf("%s is used %d times in its sleep", m.name, len(events))
	}
}
