package notifier

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/services/internal/country"
)

// place is "203.0.113.7 · Netherlands · AS1136 KPN", as much as is known.
func place(a *alert.Alert) string {
	parts := []string{}
	if a.SourceIP.IsValid() {
		parts = append(parts, a.SourceIP.String())
	}
	if a.Country != "" {
		parts = append(parts, country.Name(clean(a.Country, 8)))
	}
	if a.ASN != 0 {
		parts = append(parts, strings.TrimSpace(fmt.Sprintf("AS%d %s", a.ASN, clean(a.ASName, 80))))
	}
	if len(parts) == 0 {
		return "unknown"
	}
	return strings.Join(parts, " · ")
}

// prefixOf is the network that an address counts as: /24 or /64.
func prefixOf(ip netip.Addr) string {
	bits := 24
	if ip.Is6() {
		bits = 64
	}
	p, err := ip.Prefix(bits)
	if err != nil {
		return ""
	}
	return p.String()
}

// masked is what may be shown of a secret.
func masked(prefix string) string {
	if prefix == "" {
		return ""
	}
	return clean(prefix, 32) + "…"
}

// clock is a time as mails write it.
func clock(t time.Time) string { return t.Format("Mon 2 Jan 2006, 15:04:05 MST") }

// clean makes text that came with an event fit to be shown: no control
// characters, no characters that turn or hide text, one line, at most n runes,
// and nothing that a mail program would make a link of: what a thief writes
// into a user agent must not become something to click on.
func clean(s string, n int) string {
	var b strings.Builder
	count := 0
	for _, r := range strings.ToValidUTF8(s, "\uFFFD") {
		if count == n {
			b.WriteRune('…')
			break
		}
		switch {
		case r == '\t' || r == '\n' || r == '\r' || r == ' ':
			r = ' '
		case unicode.IsControl(r), unicode.In(r, unicode.Cf, unicode.Co, unicode.Zl, unicode.Zp):
			r = '\uFFFD'
		}
		b.WriteRune(r)
		count++
	}
	return unlink(strings.TrimSpace(b.String()))
}

// ident is an id with nothing in it that an id cannot have; it stays exact, for
// it is typed and searched for.
func ident(s string) string {
	s = strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || strings.ContainsRune("_.:-", r) {
			return r
		}
		return '_'
	}, s)
	return s[:min(len(s), 128)]
}

// unlink puts a zero-width space where a mail program would see an address.
func unlink(s string) string {
	const gap = "\u200B"
	if strings.ContainsRune(s, '@') {
		s = strings.ReplaceAll(s, "@", "@"+gap)
	}
	s = strings.ReplaceAll(s, "://", ":"+gap+"//")
	if !strings.ContainsRune(s, '.') {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		b.WriteRune(r)
		if r == '.' && looksLikeDomain(s, i) {
			b.WriteString(gap)
		}
	}
	return b.String()
}

// looksLikeDomain reports whether the dot at i stands before two or more letters
// and after a letter or digit: "example.com", not "1.26" or "end. Next".
func looksLikeDomain(s string, i int) bool {
	before, _ := utf8.DecodeLastRuneInString(s[:i])
	if !unicode.IsLetter(before) && !unicode.IsDigit(before) {
		return false
	}
	letters := 0
	for _, r := range s[i+1:] {
		if !unicode.IsLetter(r) {
			break
		}
		letters++
	}
	return letters >= 2
}

// headerText is one line of a header: no control characters at all.
func headerText(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\u200B': // what unlink put there
			return -1
		case unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp):
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
	s = strings.Join(strings.Fields(s), " ")
	if utf8.RuneCountInString(s) > 200 {
		s = string([]rune(s)[:199]) + "…"
	}
	return s
}
