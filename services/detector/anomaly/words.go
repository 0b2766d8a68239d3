package anomaly

import (
	"math"
	"math/bits"
	"slices"
	"strconv"
)

// thousands writes a count with blanks between groups: 41 201.
func thousands(x float64) string {
	s := strconv.FormatFloat(math.Round(x), 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + " " + s[i:]
	}
	return s
}

// amount writes a mean count: small ones with a digit after the point.
func amount(x float64) string {
	if x < 10 {
		return strconv.FormatFloat(x, 'f', 1, 64)
	}
	return thousands(x)
}

// round keeps the given number of significant digits.
func round(x float64, digits int) float64 {
	if x == 0 || math.IsInf(x, 0) || math.IsNaN(x) {
		return x
	}
	y, err := strconv.ParseFloat(strconv.FormatFloat(x, 'e', digits-1, 64), 64)
	if err != nil {
		return x
	}
	return y
}

// shares are the n heaviest values with their part of the set's weight.
func shares(set []slot, n int) []slot {
	total := float32(0)
	var out []slot
	for _, s := range set {
		if s.Weight > 0 {
			total += s.Weight
			out = append(out, s)
		}
	}
	slices.SortStableFunc(out, func(a, b slot) int {
		switch {
		case a.Weight != b.Weight:
			return int(math.Copysign(1, float64(b.Weight-a.Weight)))
		case a.Key < b.Key:
			return -1
		}
		return 1
	})
	out = out[:min(n, len(out))]
	for i := range out {
		out[i].Weight /= total
	}
	return out
}

func popcount(x [2]uint64) int { return bits.OnesCount64(x[0]) + bits.OnesCount64(x[1]) }
