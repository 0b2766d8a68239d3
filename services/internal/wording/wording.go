// Package wording says in plain words what an alert is about: the same in a
// mail and on a page.
package wording

import (
	"fmt"
	"math"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/services/internal/country"
)

// Reason says in a subject line what a trigger saw.
func Reason(trigger string) string {
	switch trigger {
	case alert.NewIPRange:
		return "used from a new network"
	case alert.VolumeSpike:
		return "far more requests than usual"
	case alert.EndpointMix:
		return "calling other endpoints than usual"
	case alert.DormantKey:
		return "back after a long silence"
	case alert.KeyGuessing:
		return "somebody is guessing keys"
	case alert.RevokedKey:
		return "used after it was revoked"
	case alert.ScopeProbing:
		return "trying what it may not do"
	}
	return plain(trigger)
}

// Trigger is a trigger as a heading of its evidence.
func Trigger(trigger string) string {
	switch trigger {
	case alert.NewIPRange:
		return "Network"
	case alert.VolumeSpike:
		return "Volume"
	case alert.EndpointMix:
		return "Endpoints"
	case alert.DormantKey:
		return "Dormancy"
	case alert.KeyGuessing:
		return "Guessing"
	case alert.RevokedKey:
		return "Revoked key"
	case alert.ScopeProbing:
		return "Scopes"
	}
	s := plain(trigger)
	if s == "" {
		return "Signal"
	}
	first, size := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(first)) + s[size:]
}

// plain is a trigger that nobody has words for.
func plain(trigger string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		switch {
		case r == '_':
			return ' '
		case r < 0x80 && (unicode.IsLetter(r) || unicode.IsDigit(r) || r == '-' || r == ' '):
			return r
		}
		return -1
	}, trigger[:min(len(trigger), 64)]))
}

// Headline is the alert in one short sentence about the key of that name,
// without a full stop.
func Headline(name string, a *alert.Alert) string {
	if len(a.Triggers) == 0 {
		return name + " is behaving unlike itself"
	}
	switch a.Triggers[0] {
	case alert.NewIPRange:
		if place := country.InSentence(plain(a.Country)); place != "" {
			return name + " was used from a network in " + place + " that is new to it"
		}
		return name + " was used from a network that is new to it"
	case alert.VolumeSpike:
		return name + " makes far more requests than usual"
	case alert.EndpointMix:
		return name + " calls other endpoints than usual"
	case alert.DormantKey:
		return name + " is back after a long silence"
	case alert.KeyGuessing:
		return "Somebody is guessing keys"
	case alert.RevokedKey:
		return name + " was used after it was revoked"
	case alert.ScopeProbing:
		return name + " tries what it may not do"
	}
	return name + ": " + Reason(a.Triggers[0])
}

// Rarity says a p-value in words: how often the key would do this by itself.
// It is empty for what is no probability.
func Rarity(p float64) string {
	switch {
	case math.IsNaN(p) || p < 0 || p > 1:
		return ""
	case p >= 0.05:
		return "usual by itself"
	case p < 1e-9:
		return "never by chance: less than 1 in a billion"
	}
	word := "rare"
	if p < 1e-4 {
		word = "very rare"
	}
	return word + ": about 1 in " + Grouped(odds(p)) + " by chance"
}

// odds is 1/p to two significant digits.
func odds(p float64) uint64 {
	x := 1 / p
	scale := math.Pow(10, math.Max(0, math.Floor(math.Log10(x))-1))
	return uint64(math.Round(x/scale) * scale)
}

// Grouped writes 12345678 as "12 345 678", with narrow blanks that do not break.
func Grouped(n uint64) string {
	s := fmt.Sprint(n)
	var b strings.Builder
	for i, c := range s {
		if i > 0 && (len(s)-i)%3 == 0 {
			b.WriteRune('\u202f')
		}
		b.WriteRune(c)
	}
	return b.String()
}

// Severity is a severity as a label.
func Severity(severity string) string {
	switch severity {
	case alert.Critical:
		return "Critical"
	case alert.High:
		return "High"
	case alert.Medium:
		return "Medium"
	case alert.Low:
		return "Low"
	}
	return "Alert"
}
