package anomaly

import "math"

// packCount codes a mean count into 16 bits with a relative error of 1/4000.
func packCount(x float64) uint16 {
	if x == 0 {
		return 0
	}
	return uint16(math.Round(min(math.Log2(1+x)*countStep, 65535)))
}

// unpackCount is the inverse of packCount. Hours of silence are learned from one by
// one, so it is asked most of all.
func unpackCount(v uint16) float64 {
	return countScale[v/countStep]*countFraction[v%countStep] - 1
}

const countStep = 2048 // codes from a count to its double

// countFraction are the powers of two with a fraction as the exponent, countScale those
// with a whole one.
var countFraction, countScale = func() (fraction [countStep]float64, scale [1 << 16 / countStep]float64) {
	for i := range fraction {
		fraction[i] = math.Exp2(float64(i) / countStep)
	}
	for i := range scale {
		scale[i] = math.Exp2(float64(i))
	}
	return fraction, scale
}()
