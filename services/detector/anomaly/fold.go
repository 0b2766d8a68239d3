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

// foldTable remembers the latest foldings, one per slot, and the latest folded
// paths, which are few where the paths are many.
type foldTable struct {
	seed    maphash.Seed // decides what is remembered, never what is answered
	slots   []foldSlot
	known   map[request]*folded
	scratch []byte
}

// request is a method and a folded path.
type request struct{ method, path string }

type foldSlot struct {
	method, path string
	folded       *folded
	// missed is the hash of the latest request that was not the slot's. Only one that
	// comes twice on end takes the slot: most paths with an identifier come once.
	missed uint64
}

func newFoldTable() foldTable {
	return foldTable{seed: maphash.MakeSeed(), slots: make([]foldSlot, foldCache), known: map[request]*folded{}}
}

// fold is a pure function of method and path.
func (t *foldTable) fold(method, path string) *folded {
	h := maphash.String(t.seed, path)
	if method != "" {
		h += uint64(method[0])<<4 + uint64(len(method))
	}
	s := &t.slots[h%foldCache]
	if s.folded != nil && s.path == path && s.method == method {
		return s.folded
	}
	t.scratch = appendFolded(t.scratch[:0], path)
	f := t.known[request{method, string(t.scratch)}]
	if f == nil {
		f = t.learn(strings.Clone(method), string(t.scratch))
	}
	if s.missed == h {
		s.method, s.path, s.folded = strings.Clone(method), strings.Clone(path), f
	}
	s.missed = h
	return f
}

func (t *foldTable) learn(method, path string) *folded {
	f := &folded{name: path, areaHash: hashString(area(method, path), 2)}
	if method != "" {
		f.name = method + " " + path
	}
	f.hash = uint32(hashString(f.name, 1)>>32) | 1
	if len(t.known) >= foldCache {
		clear(t.known)
	}
	t.known[request{method, path}] = f
	return f
}

// appendFolded appends a path with what looks like an identifier replaced by {id}.
func appendFolded(b []byte, path string) []byte {
	if i := strings.IndexByte(path, '?'); i >= 0 {
		path = path[:i]
	}
	if i := strings.IndexByte(path, '#'); i >= 0 {
		path = path[:i]
	}
	rooted := strings.HasPrefix(path, "/")
	start, n := len(b), 0
	for len(path) > 0 {
		segment := path
		if i := strings.IndexByte(path, '/'); i >= 0 {
			segment, path = path[:i], path[i+1:]
		} else {
			path = ""
		}
		if segment == "" {
			continue
		}
		if n++; n > foldSegments || len(b)-start+len(segment) > foldLength {
			b = append(b, "/…"...)
			break
		}
		if n > 1 || rooted {
			b = append(b, '/')
		}
		if identifier(segment) {
			segment = "{id}"
		}
		b = append(b, segment...)
	}
	if len(b) == start {
		return append(b, '/')
	}
	return b
}

// Classes of the bytes of a path segment.
const (
	classDigit = iota + 1
	classLower
	classUpper
	classMark // never in a plain word
	classJoin // between the parts of a name
)

var classes = func() (t [256]uint8) {
	for c := range t {
		switch {
		case '0' <= c && c <= '9':
			t[c] = classDigit
		case 'a' <= c && c <= 'z':
			t[c] = classLower
		case 'A' <= c && c <= 'Z':
			t[c] = classUpper
		}
	}
	for _, c := range []byte("{}@*<>%=") {
		t[c] = classMark
	}
	for _, c := range []byte("-_.") {
		t[c] = classJoin
	}
	return t
}()

// identifier reports whether a path segment names one thing rather than a kind
// of things: a parameter of a template, a number, a UUID, a hash, a prefixed or
// long mixed token, a mail address.
func identifier(s string) bool {
	var of [classJoin + 1]int
	for i := range len(s) {
		of[classes[s[i]]]++
	}
	if of[classMark] > 0 || s[0] == ':' || s[0] == '$' {
		return true
	}
	digits, lower, upper := of[classDigit], of[classLower], of[classUpper]
	switch {
	case version(s):
		return false
	case digits == 0:
		return len(s) >= 24 && (upper > 2 && lower > 2 || of[classJoin] == 0)
	case lower+upper == 0:
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
