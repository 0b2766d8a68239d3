package edge

import "strings"

// FoldPath makes a route of a path whose template nobody knows: the query and
// fragment are left out, and a segment that looks like an id becomes "{id}":
//
//   - digits alone: /orders/1234
//   - a UUID, with or without dashes; 16 hex digits or more
//   - a ULID, and any word of 16 letters and digits or more that mixes them
//   - a short word and an id, as in dev_01J8ZK…: the word stays: dev_{id}
//   - an e-mail address
//
// Words, versions (v1) and file names stay as they are.
func FoldPath(path string) string {
	path, _, _ = strings.Cut(path, "?")
	path, _, _ = strings.Cut(path, "#")
	if path == "" {
		return "/"
	}
	if !needsFolding(path) {
		return path
	}
	var b strings.Builder
	b.Grow(len(path))
	for i, segment := range strings.Split(path, "/") {
		if i > 0 {
			b.WriteByte('/')
		}
		b.WriteString(foldSegment(segment))
	}
	return b.String()
}

// needsFolding is the fast way out, which allocates nothing.
func needsFolding(path string) bool {
	start := 0
	for i := range len(path) {
		if path[i] != '/' {
			continue
		}
		if folds(path[start:i]) {
			return true
		}
		start = i + 1
	}
	return folds(path[start:])
}

func folds(segment string) bool { return !isPlainWord(segment) && foldSegment(segment) != segment }

const folded = "{id}"

func foldSegment(s string) string {
	if s == "" || s[0] == '{' || isPlainWord(s) {
		return s
	}
	if looksLikeID(s) || strings.Contains(s, "@") {
		return folded
	}
	// "dev_01J8ZK3M" and "cus-8f2k3j4h": a word of letters, then an id that is
	// shorter than one that stands alone may be.
	if i := strings.LastIndexAny(s, "_-"); i > 0 && i < len(s)-1 && isWord(s[:i]) {
		tail := s[i+1:]
		if digits, letters, other := classes(tail); !other && (looksLikeID(tail) || digits > 0 && letters > 0 && len(tail) >= 8 || letters == 0 && len(tail) >= 4) {
			return s[:i+1] + folded
		}
	}
	return s
}

// isPlainWord finds in one pass what most segments are: short, without a digit.
func isPlainWord(s string) bool {
	if len(s) >= 16 {
		return false
	}
	for i := range len(s) {
		if '0' <= s[i] && s[i] <= '9' || s[i] == '@' {
			return false
		}
	}
	return true
}

func looksLikeID(s string) bool {
	digits, letters, other := classes(s)
	switch {
	case other:
		return isUUID(s)
	case letters == 0:
		return true
	case len(s) >= 16 && digits > 0:
		return true
	case len(s) >= 16 && isHex(s):
		return true
	}
	return false
}

func classes(s string) (digits, letters int, other bool) {
	for i := range len(s) {
		switch c := s[i]; {
		case '0' <= c && c <= '9':
			digits++
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z':
			letters++
		default:
			other = true
		}
	}
	return digits, letters, other
}

func isUUID(s string) bool {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return false
	}
	return isHex(s[:8]) && isHex(s[9:13]) && isHex(s[14:18]) && isHex(s[19:23]) && isHex(s[24:])
}

func isHex(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'f', 'A' <= c && c <= 'F':
		default:
			return false
		}
	}
	return true
}

func isWord(s string) bool {
	for i := range len(s) {
		if c := s[i] | 0x20; (c < 'a' || c > 'z') && s[i] != '_' && s[i] != '-' {
			return false
		}
	}
	return s != ""
}
