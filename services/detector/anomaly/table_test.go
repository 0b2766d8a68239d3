package anomaly

import (
	"bytes"
	"fmt"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

func TestTableIsAMap(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		got, want := newTable(), map[string]*profile{}
		for range rapid.IntRange(0, 400).Draw(t, "steps") {
			id := fmt.Sprint(rapid.IntRange(0, 60).Draw(t, "key"))
			if rapid.IntRange(0, 2).Draw(t, "remove") == 0 {
				got.remove(id)
				delete(want, id)
			} else {
				p := &profile{}
				got.put(id, p)
				want[id] = p
			}
			if got.count != len(want) {
				t.Fatalf("%d keys, want %d", got.count, len(want))
			}
			for k := range 61 {
				id := fmt.Sprint(k)
				if got.get(id) != want[id] || got.candidate(got.hash(id)) != want[id] {
					t.Fatalf("key %s is not where it was put", id)
				}
			}
		}
	})
}

func TestObserveAllIsObserve(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		keys := []string{"k1", "k2", "k3", "k4"}
		scripts := map[string][]usage.Event{}
		total := 0
		for _, k := range keys {
			scripts[k] = script(t, k)
			total += len(scripts[k])
		}
		var events []usage.Event
		for len(events) < total {
			k := rapid.SampledFrom(keys).Draw(t, "next")
			if s := scripts[k]; len(s) > 0 {
				events, scripts[k] = append(events, s[0]), s[1:]
			}
		}
		one, all := New(Options{Locate: world}), New(Options{Locate: world})
		var want, got []alert.Alert
		for i := range events {
			want = append(want, one.Observe(&events[i], false)...)
		}
		for rest := events; len(rest) > 0; {
			n := rapid.IntRange(1, len(rest)).Draw(t, "at once")
			all.ObserveAll(rest[:n], false, func(a alert.Alert) { got = append(got, a) })
			rest = rest[n:]
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("%d alerts, want %d", len(got), len(want))
		}
		for _, k := range keys {
			if !bytes.Equal(one.Encode(k), all.Encode(k)) {
				t.Fatalf("baselines of %s differ", k)
			}
		}
	})
}
