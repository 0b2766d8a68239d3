package trial

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
	"github.com/latchkey-dev/latchkey/services/internal/simulate"
)

// quickSeed is one of the development seeds; the published figures use others.
const quickSeed = 21

func options(variant simulate.Variant, keys, attacks int) simulate.Options {
	return simulate.Options{
		Seed: quickSeed, Variant: variant, Start: time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC),
		Days: 60, Keys: keys, Attacks: attacks,
	}
}

// TestGoal holds the engine to the goal on a small traffic, and, if asked for
// the long form, on a full one.
func TestGoal(t *testing.T) {
	t.Parallel()
	keys, attacks := 20, 8
	if os.Getenv("LATCHKEY_TEST_LONG") != "" {
		keys, attacks = 120, 52
	}
	o := options(simulate.VariantA, keys, attacks)
	s := Summarize([]Outcome{Run(simulate.New(o), o, Engine(anomaly.DefaultBudget, simulate.Locate))})
	t.Logf("recall %.2f, %.3f false alerts per key-month, %.2f mails an episode", s.Recall, s.PerMonth, s.Mails)
	if s.Recall < 0.85 {
		t.Errorf("recall %.2f: %v", s.Recall, s.ByAttack)
	}
	if s.PerMonth > 0.08 {
		t.Errorf("%.3f false alerts per key-month: %v", s.PerMonth, s.ByKind)
	}
	if s.Mails > 1.1 {
		t.Errorf("%.2f mails an episode", s.Mails)
	}
}

func TestRulesRaiseAlerts(t *testing.T) {
	t.Parallel()
	o := options(simulate.VariantB, 10, 3)
	var detectors []Detector
	for _, r := range Rules() {
		detectors = append(detectors, r.Detector())
	}
	found := 0
	for _, out := range RunAll(simulate.New(o), o, detectors) {
		found += len(out.False)
		for _, c := range out.Cases {
			found += c.Alerts
		}
	}
	if found == 0 {
		t.Error("no rule raised anything")
	}
}

func TestChartIsXML(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	points := []Point{{Name: "a < b", Summary: Summary{Recall: 0.9, RecallTop: 1, PerMonth: 0.02, PerHigh: 0.1}, Ours: true}}
	if err := Chart(&b, points, "note & more"); err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(&b); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func TestIntervals(t *testing.T) {
	t.Parallel()
	if low, high := wilson(48, 48); low < 0.9 || low > 0.95 || high < 0.999 {
		t.Errorf("wilson(48, 48) = %.3f, %.3f", low, high)
	}
	if low, high := poissonInterval(0); low != 0 || high < 2.9 || high > 3.8 {
		t.Errorf("poissonInterval(0) = %.2f, %.2f", low, high)
	}
}
