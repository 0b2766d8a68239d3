package anomaly

import (
	"testing"

	"pgregory.net/rapid"
)

func TestLeastMixNeedIsTheLeast(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p := &profile{strict: rapid.Float64Range(-10, 10).Draw(t, "strict")}
		p.Level = rapid.Float32Range(0, 1e6).Draw(t, "level")
		for i := range p.MixTail.Top {
			p.MixTail.Top[i] = rapid.Float32Range(0, 1e3).Draw(t, "top")
		}
		p.MixTail.Days = rapid.Float32Range(0, 90).Draw(t, "days")
		r := &route{Strange: rapid.Uint16Range(0, 2).Draw(t, "strange")}
		if least, need := p.leastMixNeed(), p.mixNeed(r); least > 0 && least > need {
			t.Fatalf("%v, but the need is %v", least, need)
		}
	})
}
