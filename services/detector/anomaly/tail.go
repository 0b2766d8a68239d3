package anomaly

import "math"

// tail is what a key's own history says about the extremes of a daily maximum:
// its four largest values and the number of days they come from. It is how a
// threshold is calibrated on the key itself instead of on a distribution that
// its counts do not follow.
type tail struct {
	Top  [4]float32 // descending
	Days float32
	Now  float32 // the current day's maximum so far
}

func (t *tail) see(x float64) {
	if float32(x) > t.Now {
		t.Now = float32(x)
	}
}

// close ends a day.
func (t *tail) close() {
	x := t.Now
	t.Now = 0
	for i := range t.Top {
		t.Top[i] *= 0.996
	}
	t.Days = min(t.Days+1, 90)
	for i := range t.Top {
		if x > t.Top[i] {
			t.Top[i], x = x, t.Top[i]
		}
	}
}

// heavy is the value that a day exceeds with probability p under a Pareto tail:
// Weissman's estimator (1978) with Hill's index (1975), shrunk to prior, which
// counts as two observations.
func (t *tail) heavy(p, prior float64) float64 {
	k := t.Top[3]
	if k <= 0 {
		return float64(t.Top[0])
	}
	sum := 0.0
	for _, x := range t.Top[:3] {
		sum += math.Log(float64(x / k))
	}
	xi := min((sum+2*prior)/5, 1.5)
	return float64(k) * math.Pow(max(4/(float64(t.Days)*p), 1), xi)
}

// light is the same under an exponential tail: the fourth largest value plus the
// mean excess over it (shrunk to prior as above) times the log of the odds. The largest is
// left out of the mean, for a single odd day says little of the days; ease times it is a bound.
func (t *tail) light(p, prior, ease float64) float64 {
	k := float64(t.Top[3])
	excess := (float64(t.Top[1]+t.Top[2]) - 2*k + 2*prior) / 4
	return max(k+excess*max(math.Log(4/(max(float64(t.Days), 1)*p)), 0), ease*(1.1*float64(t.Top[0])+1))
}
