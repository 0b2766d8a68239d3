package anomaly

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// moody is a count series like those of people's attention: an hour of the day, and
// ups and downs that last for hours, with a long tail.
func moody(seed uint64, hours int) []float64 {
	r := rand.New(rand.NewPCG(seed, 1))
	out := make([]float64, hours)
	mood := 0.0
	for h := range out {
		mood = 0.6*mood + 0.3*r.NormFloat64()
		if r.Float64() < 0.004 {
			mood += r.ExpFloat64()
		}
		day := 1 + 0.7*math.Sin(float64(h%24)/24*2*math.Pi)
		out[h] = math.Round(100 * day * math.Exp(mood))
	}
	return out
}

// play plays an hour's requests at even distances and reports whether an alert began.
func play(e *Engine, hour int, n float64) bool {
	raised := false
	for i := range int(n) {
		at := start.Add(time.Duration(hour)*time.Hour + time.Duration(float64(i)/n*float64(time.Hour)))
		ev := usage.Event{OrgID: "org", KeyID: "k", Time: at, Method: "POST", Route: "/count", Decision: usage.Allow}
		for _, a := range e.Observe(&ev, false) {
			raised = raised || a.Revision == 1
		}
	}
	return raised
}

// TestLargerBudgetFindsMore plays moody series and spikes of ten times an hour in
// every seventh: a larger budget must find more of them, for false alerts within it.
func TestLargerBudgetFindsMore(t *testing.T) {
	t.Parallel()
	const days, learn, series = 55, 20, 3
	before := 0.0
	for _, budget := range []float64{0.01, DefaultBudget, 1} {
		found, spikes, falses := 0, 0, 0
		for seed := range uint64(series) {
			e := New(Options{Budget: budget})
			for h, n := range moody(seed, days*24) {
				if h >= learn*24 && h%7 == 0 {
					twin := New(Options{Budget: budget})
					if err := twin.Decode("k", e.Encode("k")); err != nil {
						t.Fatal(err)
					}
					spikes++
					if play(twin, h, 10*n) {
						found++
					}
				}
				if play(e, h, n) && h >= learn*24 {
					falses++
				}
			}
		}
		recall, months := float64(found)/float64(spikes), float64(series*(days-learn))/30
		t.Logf("budget %.3f: %.2f of the spikes, %d false alerts in %.1f months", budget, recall, falses, months)
		if recall <= before {
			t.Errorf("a budget of %.3f finds %.2f of the spikes, a smaller one %.2f", budget, recall, before)
		}
		if float64(falses) > max(1, 2*budget*months) {
			t.Errorf("%d false alerts in %.1f months at a budget of %.3f", falses, months, budget)
		}
		before = recall
	}
	if before < 0.8 {
		t.Errorf("%.2f of the spikes at a budget of 1", before)
	}
}

// TestBurstTwiceAMonthIsNoNews plays a key that sends thirty times as much for two
// hours on two days of the month.
func TestBurstTwiceAMonthIsNoNews(t *testing.T) {
	t.Parallel()
	e := New(Options{})
	r := rand.New(rand.NewPCG(7, 7))
	for h := range 60 * 24 {
		rate := 1 + 9*math.Max(0, math.Sin(float64(h%24-6)/24*2*math.Pi))
		n := math.Round(rate + math.Sqrt(rate)*r.NormFloat64())
		if d := h / 24; (d == 5 || d == 20 || d == 35 || d == 50) && (h%24 == 14 || h%24 == 15) {
			n += 250 * (0.8 + 0.5*r.Float64())
		}
		if play(e, h, math.Max(n, 0)) {
			t.Fatalf("alert on day %d, hour %d with %.0f requests: %s", h/24, h%24, n, e.keys.get("k").episode.Alert.Summary)
		}
	}
}
