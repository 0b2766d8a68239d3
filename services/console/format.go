package console

import (
	"fmt"
	"html/template"
	"math"
	"strings"
	"time"
	"unicode"

	"github.com/latchkey-dev/latchkey/services/internal/country"
	"github.com/latchkey-dev/latchkey/services/internal/wording"
)

// compact writes 12345 as "12k".
func compact(v float64) string {
	for _, u := range []struct {
		size float64
		name string
	}{{1e9, "G"}, {1e6, "M"}, {1e3, "k"}} {
		if v >= u.size {
			return trimZero(v/u.size) + u.name
		}
	}
	return trimZero(v)
}

func trimZero(v float64) string {
	if v >= 100 || v == math.Trunc(v) {
		return fmt.Sprintf("%.0f", v)
	}
	if v >= 1 {
		return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0")
	}
	return fmt.Sprintf("%.2g", v)
}

// span is a duration as a person says it: "3 days", "5 min".
func span(d time.Duration) string {
	unit := func(n int, one, many string) string {
		if n == 1 {
			return "1 " + one
		}
		return fmt.Sprintf("%d %s", n, many)
	}
	switch d = max(d, 0); {
	case d < time.Minute:
		return unit(int(d/time.Second), "second", "seconds")
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d/time.Minute))
	case d < 48*time.Hour:
		return unit(int(d/time.Hour), "hour", "hours")
	case d < 60*24*time.Hour:
		return unit(int(d/(24*time.Hour)), "day", "days")
	case d < 730*24*time.Hour:
		return unit(int(d/(30*24*time.Hour)), "month", "months")
	}
	return unit(int(d/(365*24*time.Hour)), "year", "years")
}

// shown is text that came with an event: no control characters, none that turn
// or hide text.
func shown(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Co, unicode.Zl, unicode.Zp) {
			return '\uFFFD'
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
}

// change is a type of change in words: "api_key.rotated" is "Key rotated".
func change(kind string) string {
	kind = strings.TrimPrefix(kind, "api_")
	kind = strings.NewReplacer(".", " ", "_", " ").Replace(kind)
	if kind == "" {
		return kind
	}
	return strings.ToUpper(kind[:1]) + kind[1:]
}

// grew says how often an episode of that revision grew.
func grew(revision int) string {
	switch revision {
	case 0, 1:
		return ""
	case 2:
		return "grew once"
	case 3:
		return "grew twice"
	}
	return fmt.Sprintf("grew %d times", revision-1)
}

// ago shows how long ago something was, the moment itself as its title.
func ago(now, t time.Time) template.HTML {
	if t.IsZero() {
		return `<span class="muted">never</span>`
	}
	text := "just now"
	switch d := now.Sub(t); {
	case d < -time.Minute:
		text = "in " + span(-d)
	case d >= 10*time.Second:
		text = span(d) + " ago"
	}
	return moment(t, text)
}

func moment(t time.Time, text string) template.HTML {
	return template.HTML(fmt.Sprintf(`<time datetime="%s" title="%s">%s</time>`, //nolint:gosec // our own formats
		t.UTC().Format(time.RFC3339), t.UTC().Format("Mon 2 Jan 2006, 15:04:05 UTC"), template.HTMLEscapeString(text)))
}

// functions of the templates; now is set for each page.
func functions(now time.Time) template.FuncMap {
	return template.FuncMap{
		"ago":     func(t time.Time) template.HTML { return ago(now, t) },
		"when":    func(t time.Time) template.HTML { return moment(t, t.UTC().Format("2 Jan 2006, 15:04:05 UTC")) },
		"day":     func(t time.Time) template.HTML { return moment(t, t.UTC().Format("2 Jan 2006")) },
		"span":    span,
		"num":     wording.Grouped,
		"count":   func(n int) string { return wording.Grouped(uint64(max(n, 0))) },
		"compact": compact,
		"shown":   shown,
		"trigger": wording.Trigger,
		"rarity":  wording.Rarity,
		"country": country.Name,
		"change":  change,
		"percent": func(v float64) string { return trimZero(math.Round(v*1000)/10) + " %" },
		"share":   func(v float64) string { return fmt.Sprintf("%.2f", math.Min(100, math.Max(0, v*100))) },
		"spark":   sparkline,
		"stacks":  stacks,
		"join":    strings.Join,
		"seconds": func(s float64) string { return span(time.Duration(s * float64(time.Second))) },
		"grew":    grew,
	}
}
