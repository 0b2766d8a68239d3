package anomaly

import (
	"fmt"
	"math"
	"math/bits"
	"time"
)

// dormantState is how a key pauses.
type dormantState struct {
	// Gaps and GapDays count the pauses between days of use and sum their lengths;
	// Longest is the longest one, in days.
	Gaps, GapDays, Longest float32
	// Pauses counts the pauses between events by the binary logarithm of their
	// seconds, halved when one is full.
	Pauses [24]uint16
	// Slept is the last pause that was judged dormancy, in days.
	Slept float32
}

// dormancyFloor is the least pause in days that can be dormancy: three weeks of
// holiday with the weekends around them are none.
const dormancyFloor = 24

// judgeDormancy asks how probable it is that a key with these pauses pauses so
// long: the predictive of an exponential gap with a gamma prior (one gap of four
// days), which is Lomax: ((b+S)/(b+S+g))^(a+n).
func (e *Engine) judgeDormancy(p *profile, now int64, j *judgement) {
	gap := now - p.Newest
	if gap <= 0 {
		return
	}
	if s := gap / int64(time.Second); s > 0 {
		i := min(bits.Len64(uint64(s)), len(p.Pauses)-1)
		p.Pauses[i]++
		if p.Pauses[i] == math.MaxUint16 {
			for k := range p.Pauses {
				p.Pauses[k] /= 2
			}
		}
	} else if p.Pauses[0] < math.MaxUint16 {
		p.Pauses[0]++
	}
	if now/int64(24*time.Hour) == p.Newest/int64(24*time.Hour) {
		return
	}
	days := float64(gap) / float64(24*time.Hour)
	const a, b = 1, 4
	if days >= dormancyFloor/2 {
		sum, n := float64(p.GapDays), float64(p.Gaps)
		score := -(a + n) * math.Log10((b+sum)/(b+sum+days))
		if days < 2*float64(p.Longest) {
			score = min(score, 1)
		} else if days >= 45 && days > 2.5*float64(p.Longest) && n >= 2 {
			score += 2
		}
		if days < dormancyFloor {
			score = min(score, alarm-0.8)
		}
		p.Slept = float32(days)
		j.add(triggerDormant, score+0.4)
	}
	if n := p.Gaps; n > 60 {
		p.Gaps, p.GapDays = n*0.98, p.GapDays*0.98
	}
	p.Gaps++
	p.GapDays += float32(max(days, 1))
	p.Longest = max(p.Longest*0.999, float32(days))
}

func (p *profile) dormantWords() (observed, usual string) {
	observed = fmt.Sprintf("used again after %.0f days of silence", p.Slept)
	mean := 1.0
	if p.Gaps > 1 {
		mean = float64(p.GapDays-max(p.Slept, 1)) / float64(p.Gaps-1)
	}
	switch {
	case p.Gaps <= 2:
		usual = "too few days of use to tell"
	case mean < 1.5:
		usual = "used every day or nearly so"
	default:
		usual = fmt.Sprintf("used every %.0f days on average", mean)
	}
	return observed, usual
}
