package simulate

import (
	"math"
	"math/rand/v2"
)

// poisson draws a Poisson count: by products for small means (Knuth), by a
// rounded normal for large ones.
func poisson(r *rand.Rand, mean float64) int {
	if mean <= 0 {
		return 0
	}
	if mean > 60 {
		return max(0, int(math.Round(mean+math.Sqrt(mean)*r.NormFloat64())))
	}
	limit, product := math.Exp(-mean), r.Float64()
	n := 0
	for product > limit {
		n++
		product *= r.Float64()
	}
	return n
}

// gamma draws from a gamma distribution of mean 1 and the given shape (Marsaglia & Tsang 2000).
func gamma(r *rand.Rand, shape float64) float64 {
	if shape < 1 {
		return gamma(r, shape+1) * (shape + 1) / shape * math.Pow(r.Float64(), 1/shape)
	}
	d := shape - 1.0/3
	c := 1 / math.Sqrt(9*d)
	for {
		x := r.NormFloat64()
		v := 1 + c*x
		if v <= 0 {
			continue
		}
		v = v * v * v
		if math.Log(max(r.Float64(), 1e-300)) < 0.5*x*x+d-d*v+d*math.Log(v) {
			return d * v / shape
		}
	}
}

// between draws uniformly, around logarithmically.
func between(r *rand.Rand, low, high float64) float64 { return low + (high-low)*r.Float64() }

func around(r *rand.Rand, low, high float64) float64 {
	return math.Exp(between(r, math.Log(low), math.Log(high)))
}

func chance(r *rand.Rand, p float64) bool { return r.Float64() < p }

func choose[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }
