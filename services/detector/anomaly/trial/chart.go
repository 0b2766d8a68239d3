package trial

import (
	"fmt"
	"io"
	"math"
	"strings"
)

// Point is a detector on the chart.
type Point struct {
	Name    string
	Summary Summary
	Ours    bool
}

const (
	chartWidth, chartHeight         = 860.0, 520.0
	chartLeft, chartRight           = 70.0, 30.0
	chartTop, chartBottom           = 64.0, 60.0
	chartLeastFalse, chartMostFalse = 0.003, 30.0
)

func chartX(perMonth float64) float64 {
	f := math.Log(min(max(perMonth, chartLeastFalse), chartMostFalse)/chartLeastFalse) / math.Log(chartMostFalse/chartLeastFalse)
	return chartLeft + f*(chartWidth-chartLeft-chartRight)
}

func chartY(recall float64) float64 {
	return chartTop + (1-recall)*(chartHeight-chartTop-chartBottom)
}

// Chart draws recall against false alerts as SVG, each with its 95 % interval.
func Chart(w io.Writer, points []Point, note string) error {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" font-family="system-ui,sans-serif" font-size="12">`+"\n", chartWidth, chartHeight)
	b.WriteString(`<rect width="100%" height="100%" fill="#fff"/>` + "\n")
	fmt.Fprintf(&b, `<text x="%g" y="24" font-size="16" font-weight="600">Attacks found against false alerts</text>`+"\n", chartLeft)
	fmt.Fprintf(&b, `<text x="%g" y="44" fill="#555">%s</text>`+"\n", chartLeft, escape(note))
	chartAxes(&b)
	last := ""
	for _, p := range points {
		if p.Ours {
			x, y := chartX(p.Summary.PerMonth), chartY(p.Summary.Recall)
			if last != "" {
				fmt.Fprintf(&b, `<line %s x2="%.1f" y2="%.1f" stroke="#0a7d4f" stroke-width="2"/>`+"\n", last, x, y)
			}
			last = fmt.Sprintf(`x1="%.1f" y1="%.1f"`, x, y)
		}
	}
	for i, p := range points {
		chartPoint(&b, p, i)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func chartAxes(b *strings.Builder) {
	for r := 0.0; r <= 1.001; r += 0.2 {
		y := chartY(r)
		fmt.Fprintf(b, `<line x1="%g" x2="%g" y1="%.1f" y2="%.1f" stroke="#e4e4e4"/><text x="%g" y="%.1f" text-anchor="end" fill="#555">%.0f %%</text>`+"\n",
			chartLeft, chartWidth-chartRight, y, y, chartLeft-8, y+4, 100*r)
	}
	for _, f := range []float64{0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30} {
		x := chartX(f)
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%g" y2="%g" stroke="#e4e4e4"/><text x="%.1f" y="%g" text-anchor="middle" fill="#555">%g</text>`+"\n",
			x, x, chartTop, chartHeight-chartBottom, x, chartHeight-chartBottom+18, f)
	}
	fmt.Fprintf(b, `<text x="%g" y="%g" text-anchor="middle" fill="#555">false alerts per key and month (logarithmic)</text>`+"\n", chartWidth/2, chartHeight-16)
}

func chartPoint(b *strings.Builder, p Point, i int) {
	x, y, color, size := chartX(p.Summary.PerMonth), chartY(p.Summary.Recall), "#b3541e", 4.0
	if p.Ours {
		color, size = "#0a7d4f", 5
	}
	fmt.Fprintf(b, `<g stroke="%s" stroke-opacity="0.45"><line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/><line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/></g>`+"\n",
		color, chartX(p.Summary.PerLow), chartX(p.Summary.PerHigh), y, y, x, x, chartY(p.Summary.RecallTop), chartY(p.Summary.RecallLow))
	dx, anchor, dy := 8.0, "start", -6.0
	if i%2 == 1 {
		dy = 15
	}
	if x > chartWidth*0.62 {
		dx, anchor = -8, "end"
	}
	fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="%g" fill="%s"/><text x="%.1f" y="%.1f" text-anchor="%s" fill="%s" font-size="11">%s</text>`+"\n",
		x, y, size, color, x+dx, y+dy, anchor, color, escape(p.Name))
}

func escape(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(s)
}
