package console

import (
	"fmt"
	"html/template"
	"math"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/services/internal/wording"
)

// Charts are SVG made here: they need no script, follow the page's colours and
// are read out by their label.

// sparkline draws bins as small bars, denied requests at the foot of each.
func sparkline(bins []bin, label string) template.HTML {
	const step, height = 4, 24
	var top uint64 = 1
	for _, b := range bins {
		top = max(top, b.Events)
	}
	var s strings.Builder
	fmt.Fprintf(&s, `<svg class="spark" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s" preserveAspectRatio="none">`,
		step*len(bins), height, step*len(bins), height, template.HTMLEscapeString(label))
	for i, b := range bins {
		if b.Events == 0 {
			fmt.Fprintf(&s, `<rect class="zero" x="%d" y="%d" width="3" height="1"/>`, i*step, height-1)
			continue
		}
		h := scaled(b.Events, top, height-1) + 1
		fmt.Fprintf(&s, `<rect x="%d" y="%.1f" width="3" height="%.1f" rx=".5"/>`, i*step, height-h, h)
		if b.Denied > 0 {
			d := max(1, h*float64(b.Denied)/float64(b.Events))
			fmt.Fprintf(&s, `<rect class="denied" x="%d" y="%.1f" width="3" height="%.1f" rx=".5"/>`, i*step, height-d, d)
		}
	}
	s.WriteString(`</svg>`)
	return template.HTML(s.String()) //nolint:gosec // numbers, and an escaped label
}

func scaled(n, top uint64, height float64) float64 { return height * float64(n) / float64(top) }

// mark is a moment on a chart, an alert for instance.
type mark struct {
	Time  time.Time
	Class string
	Label string
}

// columns draws bins over the page's width, with an axis and marks above.
func columns(bins []bin, width time.Duration, marks []mark, label string) template.HTML {
	const w, h, left, foot, head = 960.0, 200.0, 44.0, 22.0, 14.0
	if len(bins) == 0 {
		return ""
	}
	var top uint64 = 1
	for _, b := range bins {
		top = max(top, b.Events)
	}
	top = niceTop(top)
	plot, slot := h-foot-head, (w-left)/float64(len(bins))
	var s strings.Builder
	fmt.Fprintf(&s, `<svg class="chart" viewBox="0 0 %g %g" role="img" aria-label="%s">`, w, h, template.HTMLEscapeString(label))
	for i := range 3 {
		y := head + plot*float64(i)/2
		value := float64(top) * float64(2-i) / 2
		fmt.Fprintf(&s, `<line class="grid" x1="%g" x2="%g" y1="%.1f" y2="%.1f"/><text class="axis" x="%g" y="%.1f" text-anchor="end">%s</text>`,
			left, w, y, y, left-8, y+4, compact(value))
	}
	for i, b := range bins {
		x := left + float64(i)*slot
		title := b.Time.UTC().Format("2 Jan 15:04")
		if width >= 24*time.Hour {
			title = b.Time.UTC().Format("Mon 2 Jan")
		}
		title += ": " + wording.Grouped(b.Events) + " requests"
		if b.Denied > 0 {
			title += ", " + wording.Grouped(b.Denied) + " denied"
		}
		fmt.Fprintf(&s, `<g><title>%s</title><rect class="hit" x="%.2f" y="%g" width="%.2f" height="%g"/>`, title, x, head, slot, plot)
		if b.Events > 0 {
			bar := max(1, scaled(b.Events, top, plot))
			fmt.Fprintf(&s, `<rect class="bar" x="%.2f" y="%.2f" width="%.2f" height="%.2f" rx="1.5"/>`, x+slot*.12, head+plot-bar, slot*.76, bar)
			if b.Denied > 0 {
				d := max(1, scaled(b.Denied, top, plot))
				fmt.Fprintf(&s, `<rect class="denied" x="%.2f" y="%.2f" width="%.2f" height="%.2f" rx="1.5"/>`, x+slot*.12, head+plot-d, slot*.76, d)
			}
		}
		s.WriteString(`</g>`)
		if every := labelEvery(len(bins)); i%every == every/2 {
			layout := "2 Jan"
			if width < 24*time.Hour {
				layout = "Mon 15:04"
			}
			fmt.Fprintf(&s, `<text class="axis" x="%.1f" y="%g" text-anchor="middle">%s</text>`, x+slot/2, h-5, b.Time.UTC().Format(layout))
		}
	}
	for _, m := range marks {
		at := float64(m.Time.Sub(bins[0].Time)) / float64(width)
		if at < 0 || at > float64(len(bins)) {
			continue
		}
		x := left + at*slot
		fmt.Fprintf(&s, `<g class="mark %s"><title>%s</title><line x1="%.1f" x2="%.1f" y1="%g" y2="%g"/><circle cx="%.1f" cy="7" r="5"/></g>`,
			template.HTMLEscapeString(m.Class), template.HTMLEscapeString(m.Label), x, x, head-2, head+plot, x)
	}
	s.WriteString(`</svg>`)
	return template.HTML(s.String()) //nolint:gosec // numbers, and escaped labels
}

func labelEvery(n int) int { return max(1, int(math.Ceil(float64(n)/8))) }

// niceTop rounds up to 1, 2 or 5 times a power of ten.
func niceTop(n uint64) uint64 {
	power := math.Pow(10, math.Floor(math.Log10(float64(max(n, 1)))))
	for _, f := range []float64{1, 2, 5, 10} {
		if v := uint64(f * power); v >= n {
			return max(v, 2)
		}
	}
	return n
}

// stackBin is a day's alerts by severity.
type stackBin struct {
	Time                        time.Time
	Critical, High, Medium, Low int
}

func (b *stackBin) total() int { return b.Critical + b.High + b.Medium + b.Low }

// stacks draws a day's alerts as a stack by severity.
func stacks(bins []stackBin, label string) template.HTML {
	const w, h, foot = 460.0, 120.0, 20.0
	top := 4
	for i := range bins {
		top = max(top, bins[i].total())
	}
	slot, unit := w/float64(len(bins)), (h-foot)/float64(top)
	var s strings.Builder
	fmt.Fprintf(&s, `<svg class="chart" viewBox="0 0 %g %g" role="img" aria-label="%s">`, w, h, template.HTMLEscapeString(label))
	for i := range bins {
		b := &bins[i]
		x, y := float64(i)*slot, h-foot
		fmt.Fprintf(&s, `<g><title>%s: %d alerts</title><rect class="hit" x="%.2f" y="0" width="%.2f" height="%g"/><rect class="zero" x="%.2f" y="%g" width="%.2f" height="1"/>`,
			b.Time.Format("Mon 2 Jan"), b.total(), x, slot, h-foot, x+slot*.15, h-foot-1, slot*.7)
		for _, part := range []struct {
			class string
			n     int
		}{{"critical", b.Critical}, {"high", b.High}, {"medium", b.Medium}, {"low", b.Low}} {
			if part.n == 0 {
				continue
			}
			height := unit * float64(part.n)
			y -= height
			fmt.Fprintf(&s, `<rect class="sev-%s" x="%.2f" y="%.2f" width="%.2f" height="%.2f" rx="1.5"/>`, part.class, x+slot*.15, y, slot*.7, max(1, height-1))
		}
		s.WriteString(`</g>`)
		if every := labelEvery(len(bins)) * 2; i%every == every/2 {
			fmt.Fprintf(&s, `<text class="axis" x="%.1f" y="%g" text-anchor="middle">%s</text>`, x+slot/2, h-4, b.Time.Format("2 Jan"))
		}
	}
	s.WriteString(`</svg>`)
	return template.HTML(s.String()) //nolint:gosec // numbers, and escaped labels
}

// weekHeat draws the usual hours of a week, Monday at the top.
func weekHeat(hours []float64, label string) template.HTML {
	if len(hours) != 168 {
		return ""
	}
	const cell, left, foot = 17.0, 34.0, 16.0
	top := 0.0
	for _, v := range hours {
		top = math.Max(top, v)
	}
	if top <= 0 {
		return ""
	}
	var s strings.Builder
	fmt.Fprintf(&s, `<svg class="chart heat" viewBox="0 0 %g %g" role="img" aria-label="%s">`, left+24*cell, 7*cell+foot, template.HTMLEscapeString(label))
	for d, day := range []string{"Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"} {
		fmt.Fprintf(&s, `<text class="axis" x="0" y="%.1f">%s</text>`, float64(d)*cell+12, day)
		for h := range 24 {
			v := hours[d*24+h]
			fmt.Fprintf(&s, `<rect x="%.1f" y="%.1f" width="%g" height="%g" rx="3" class="cell" fill-opacity="%.3f"><title>%s %02d:00 UTC: %s requests an hour</title></rect>`,
				left+float64(h)*cell, float64(d)*cell, cell-2, cell-2, 0.06+0.94*math.Sqrt(math.Max(0, v)/top), day, h, compact(v))
		}
	}
	for h := 0; h < 24; h += 6 {
		fmt.Fprintf(&s, `<text class="axis" x="%.1f" y="%.1f">%02d:00</text>`, left+float64(h)*cell, 7*cell+foot-3, h)
	}
	s.WriteString(`</svg>`)
	return template.HTML(s.String()) //nolint:gosec // numbers, and escaped labels
}
