package anomaly

import (
	"hash/maphash"
	"strings"
)

// folded is a request's method and route with the identifiers in the path
// replaced, and its area: the method's kind and the head of the path.
type folded struct {
	areaHash uint64
	hash     uint32
	name     string
}

const (
	foldCache    = 1 << 12
	foldSegments = 8
	foldLength   = 96
)

// foldTable remembers the latest foldings, one per slot.
type foldTable struct {
	seed  maphash.Seed // decides what is remembered, never what is answered
	slots []foldSlot
}

type foldSlot struct {
	method, path string
	folded
}

func newFoldTable() foldTable {
	return foldTable{seed: maphash.MakeSeed(), slots: make([]foldSlot, foldCache)}
}

// fold is a pure function of method and path.
func (t *foldTable) fold(method, path string) *folded {
	h := maphash.String(t.seed, path)
	if method != "" {
		h += uint64(method[0])<<4 + uint64(len(method))
	}
	s := &t.slots[h%foldCache]
	if s.path == path && s.method == method && s.hash != 0 {
		return &s.folded
	}
	name := foldPath(path)
	f := folded{name: name, areaHash: hashString(area(method, name), 2)}
	if method != "" {
		f.name = method + " " + name
	}
	f.hash = uint32(hashString(f.name, 1)>>32) | 1
	*s = foldSlot{strings.Clone(method), strings.Clone(path), f}
	return &s.folded
}

// foldPath replaces what looks like an identifier in a path with {id}.
func foldPath(path string) string {
	if i := strings.IndexAny(path, "?#"); i >= 0 {
		path = path[:i]
	}
	var b strings.Builder
	n := 0
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "" {
			continue
		}
		if n++; n > foldSegments || b.Len()+len(segment) > foldLength {
			b.WriteString("/…")
			break
		}
		if n > 1 || strings.HasPrefix(path, "/") {
			b.WriteByte('/')
		}
		if identifier(segment) {
			segment = "{id}"
		}
		b.WriteString(segment)
	}
	if b.Len() == 0 {
		return "/"
	}
	return b.String()
}

// identifier reports whether a path segment names one thing rather than a kind
// of things: a parameter of a template, a number, a UUID, a hash, a prefixed or
// long mixed token, a mail address.
func identifier(s string) bool {
	if strings.ContainsAny(s, "{}@*<>%=") || s[0] == ':' || s[0] == '$' {
		return true
	}
	digits, letters, upper, lower := 0, 0, 0, 0
	for i := range len(s) {
		switch c := s[i]; {
		case '0' <= c && c <= '9':
			digits++
		case 'a' <= c && c <= 'z':
			letters++
			lower++
		case 'A' <= c && c <= 'Z':
			letters++
			upper++
		}
	}
	switch {
	case version(s):
		return false
	case digits == 0:
		return len(s) >= 24 && (upper > 2 && lower > 2 || !strings.ContainsAny(s, "-_."))
	case letters == 0:
		return true
	case digits >= 3, len(s) >= 16:
		return true
	case digits >= 2 && len(s) >= 4:
		return true
	}
	// One digit: "user_7" and "item-3" are identifiers, "oauth2" and "s3" are not.
	return strings.ContainsAny(s, "-_") && s[len(s)-1] >= '0' && s[len(s)-1] <= '9'
}

// version reports whether a segment is an API version: v1, v2.1, v1beta1. A date is
// none: it is as often the day of a report, new every morning.
func version(s string) bool {
	if len(s) < 2 || len(s) > 8 || s[0] != 'v' && s[0] != 'V' || s[1] < '0' || s[1] > '9' {
		return false
	}
	rest := strings.TrimLeft(s[1:], "0123456789.")
	return len(s)-len(rest) <= 5 && (rest == "" || strings.HasPrefix(rest, "alpha") || strings.HasPrefix(rest, "beta"))
}

// area is the method's kind (reading or writing) and the first word of a
// folded path that are neither versions nor identifiers.
func area(method, path string) string {
	kind := "W"
	switch method {
	case "GET", "HEAD", "OPTIONS", "":
		kind = "R"
	}
	var b strings.Builder
	b.WriteString(kind)
	n := 0
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "" || segment == "{id}" || segment == "api" || version(segment) {
			continue
		}
		b.WriteByte('/')
		b.WriteString(segment)
		if n++; n == 1 {
			break
		}
	}
	return b.String()
}
