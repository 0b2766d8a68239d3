package simulate

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

func traffic(seed uint64, variant Variant) *Traffic {
	return New(Options{
		Seed: seed, Variant: variant, Start: time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC),
		Days: 40, Keys: 20, Attacks: 13,
	})
}

func TestSameSeedSameTraffic(t *testing.T) {
	t.Parallel()
	for _, v := range []Variant{VariantA, VariantB} {
		a, b, other := collect(traffic(3, v)), collect(traffic(3, v)), collect(traffic(4, v))
		if !reflect.DeepEqual(a, b) {
			t.Errorf("variant %s: the same seed made other events", v)
		}
		if reflect.DeepEqual(a, other) {
			t.Errorf("variant %s: another seed made the same events", v)
		}
	}
}

func collect(tr *Traffic) []usage.Event {
	var out []usage.Event
	for ev := range tr.Events() {
		out = append(out, *ev)
	}
	return out
}

func TestEventsKeepTheContract(t *testing.T) {
	t.Parallel()
	for _, v := range []Variant{VariantA, VariantB} {
		n := 0
		for ev := range traffic(5, v).Events() {
			n++
			if err := ev.Validate(time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)); err != nil {
				t.Fatalf("variant %s: %v", v, err)
			}
			if !ev.SourceIP.IsValid() || Locate(ev.SourceIP).ASN == 0 {
				t.Fatalf("variant %s: %s is of no network of the plan", v, ev.SourceIP)
			}
		}
		if n < 10_000 {
			t.Errorf("variant %s: only %d events", v, n)
		}
	}
}

func TestLabelsCountTheAttacks(t *testing.T) {
	t.Parallel()
	tr := traffic(6, VariantA)
	attacks := map[Attack]bool{}
	for _, l := range tr.Labels() {
		if l.Attack == "" {
			continue
		}
		attacks[l.Attack] = true
		if l.Events == 0 || l.Start == nil || l.End.Before(*l.Start) {
			t.Errorf("label %+v", l)
		}
		if _, err := json.Marshal(l); err != nil {
			t.Error(err)
		}
	}
	if len(attacks) < 8 {
		t.Errorf("only %d kinds of attack", len(attacks))
	}
}

func TestCheckAttacks(t *testing.T) {
	t.Parallel()
	if CheckAttacks(Attacks) != nil {
		t.Error("a known attack was refused")
	}
	if CheckAttacks([]Attack{"tickling"}) == nil {
		t.Error("an unknown attack was taken")
	}
}
