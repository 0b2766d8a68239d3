package edge

import (
	"encoding/json"
	"net/netip"
	"time"
	"unicode/utf8"
	"unsafe"

	"github.com/latchkey-dev/latchkey/schemas/key"
)

// record is the part of a [key.Record] that an edge needs; what is not named here
// is skipped.
type record struct {
	ID           string         `json:"id"`
	OrgID        string         `json:"org_id"`
	Name         string         `json:"name"`
	Hash         string         `json:"hash"`
	Environment  string         `json:"environment"`
	Scopes       []string       `json:"scopes"`
	Status       string         `json:"status"`
	AllowedCIDRs []netip.Prefix `json:"allowed_cidrs"`
	ExpiresAt    *time.Time     `json:"expires_at"`
}

// full is r as a [key.Record].
func (r *record) full() key.Record {
	return key.Record{
		ID: r.ID, OrgID: r.OrgID, Name: r.Name, Hash: r.Hash, Environment: r.Environment, Scopes: r.Scopes,
		Status: r.Status, AllowedCIDRs: r.AllowedCIDRs, ExpiresAt: r.ExpiresAt,
	}
}

// decodeChange is what encoding/json makes of the record in a [key.Change].
func decodeChange(data []byte) (record, error) {
	var change struct {
		Record record `json:"record"`
	}
	err := json.Unmarshal(data, &change)
	return change.Record, err
}

// changeReader reads the records of changes, most of an edge's work when it
// starts, without allocating. It knows JSON as a program writes it (our fields at
// most once and under their exact names, texts without escapes) and leaves the
// rest, and everything that is wrong, to encoding/json. So it never says anything
// else than encoding/json would.
type changeReader struct {
	data   []byte
	pos    int
	record record
	// What the record points to.
	scopes  []string
	cidrs   []netip.Prefix
	expires time.Time
}

// read returns the record of a change. It is good until the next call, and its
// texts lie in data.
func (r *changeReader) read(data []byte) (*record, error) {
	r.data, r.pos = data, 0
	r.record = record{}
	if r.change() {
		return &r.record, nil
	}
	var err error
	r.record, err = decodeChange(data)
	return &r.record, err
}

// change reads a whole change, and reports false where encoding/json must judge.
func (r *changeReader) change() bool {
	found := false
	ok := r.object(func(name string) bool {
		if name != "record" {
			return r.skip(0)
		}
		if found {
			return false
		}
		found = true
		return r.readRecord()
	})
	r.space()
	return ok && r.pos == len(r.data)
}

func (r *changeReader) readRecord() bool {
	var seen uint
	return r.object(func(name string) bool {
		number, read := fieldOf(name)
		if read == nil {
			return r.skip(0)
		}
		if seen&(1<<number) != 0 {
			return false
		}
		seen |= 1 << number
		return r.literal("null") || read(r)
	})
}

// fieldOf says how the field of a record is read; nil for those that are not.
func fieldOf(name string) (number int, read func(*changeReader) bool) {
	switch name {
	case "id":
		return 0, func(r *changeReader) bool { return r.text(&r.record.ID) }
	case "org_id":
		return 1, func(r *changeReader) bool { return r.text(&r.record.OrgID) }
	case "name":
		return 2, func(r *changeReader) bool { return r.text(&r.record.Name) }
	case "hash":
		return 3, func(r *changeReader) bool { return r.text(&r.record.Hash) }
	case "environment":
		return 4, func(r *changeReader) bool { return r.text(&r.record.Environment) }
	case "status":
		return 5, func(r *changeReader) bool { return r.text(&r.record.Status) }
	case "scopes":
		return 6, (*changeReader).readScopes
	case "allowed_cidrs":
		return 7, (*changeReader).readCIDRs
	case "expires_at":
		return 8, (*changeReader).readExpiry
	}
	return 0, nil
}

func (r *changeReader) readScopes() bool {
	r.scopes = r.scopes[:0]
	ok := r.array(func() bool {
		r.scopes = append(r.scopes, "")
		return r.text(&r.scopes[len(r.scopes)-1])
	})
	r.record.Scopes = r.scopes
	return ok
}

func (r *changeReader) readCIDRs() bool {
	r.cidrs = r.cidrs[:0]
	ok := r.array(func() bool {
		var s string
		var p netip.Prefix
		if !r.text(&s) || p.UnmarshalText([]byte(s)) != nil {
			return false
		}
		r.cidrs = append(r.cidrs, p)
		return true
	})
	r.record.AllowedCIDRs = r.cidrs
	return ok
}

func (r *changeReader) readExpiry() bool {
	var s string
	start := r.pos
	if !r.text(&s) || r.expires.UnmarshalJSON(r.data[start:r.pos]) != nil {
		return false
	}
	r.record.ExpiresAt = &r.expires
	return true
}

// object reads an object whose field names are plain, and gives each to value,
// which reads what follows. A name with other bytes than [a-z0-9_] might be one
// of ours in other letters, which encoding/json would take for it.
func (r *changeReader) object(value func(name string) bool) bool {
	r.space()
	if !r.take('{') {
		return false
	}
	r.space()
	if r.take('}') {
		return true
	}
	for {
		r.space()
		var name string
		if !r.text(&name) || !isLower(name) {
			return false
		}
		r.space()
		if !r.take(':') {
			return false
		}
		r.space()
		if !value(name) {
			return false
		}
		r.space()
		if r.take('}') {
			return true
		}
		if !r.take(',') {
			return false
		}
	}
}

func (r *changeReader) array(element func() bool) bool {
	if !r.take('[') {
		return false
	}
	r.space()
	if r.take(']') {
		return true
	}
	for {
		r.space()
		if !element() {
			return false
		}
		r.space()
		if r.take(']') {
			return true
		}
		if !r.take(',') {
			return false
		}
	}
}

// text reads a string without escapes; s shares the memory of the data.
func (r *changeReader) text(s *string) bool {
	if !r.take('"') {
		return false
	}
	start, ascii := r.pos, true
	for ; r.pos < len(r.data); r.pos++ {
		switch c := r.data[r.pos]; {
		case c == '"':
			b := r.data[start:r.pos]
			r.pos++
			*s = unsafe.String(unsafe.SliceData(b), len(b))
			return ascii || utf8.Valid(b)
		case c == '\\' || c < ' ':
			return false
		case c >= utf8.RuneSelf:
			ascii = false
		}
	}
	return false
}

// maxDepth is how deep the values lie that skip looks into; encoding/json goes deeper.
const maxDepth = 32

// skip moves over one value of any kind.
func (r *changeReader) skip(depth int) bool {
	if r.pos >= len(r.data) || depth > maxDepth {
		return false
	}
	switch c := r.data[r.pos]; c {
	case '"':
		return r.skipText()
	case '[':
		return r.array(func() bool { return r.skip(depth + 1) })
	case '{':
		return r.skipObject(depth)
	case 'n':
		return r.literal("null")
	case 't':
		return r.literal("true")
	case 'f':
		return r.literal("false")
	default:
		return r.skipNumber()
	}
}

func (r *changeReader) skipObject(depth int) bool {
	r.pos++
	r.space()
	if r.take('}') {
		return true
	}
	for {
		r.space()
		if !r.skipText() {
			return false
		}
		r.space()
		if !r.take(':') {
			return false
		}
		r.space()
		if !r.skip(depth + 1) {
			return false
		}
		r.space()
		if r.take('}') {
			return true
		}
		if !r.take(',') {
			return false
		}
	}
}

// skipText moves over a string. Bytes that are no UTF-8 do not offend encoding/json.
func (r *changeReader) skipText() bool {
	if !r.take('"') {
		return false
	}
	for r.pos < len(r.data) {
		c := r.data[r.pos]
		r.pos++
		switch {
		case c == '"':
			return true
		case c < ' ':
			return false
		case c == '\\':
			if !r.skipEscape() {
				return false
			}
		}
	}
	return false
}

func (r *changeReader) skipEscape() bool {
	if r.pos >= len(r.data) {
		return false
	}
	c := r.data[r.pos]
	r.pos++
	switch c {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return true
	case 'u':
		if len(r.data)-r.pos < 4 || !isHex(string(r.data[r.pos:r.pos+4])) {
			return false
		}
		r.pos += 4
		return true
	}
	return false
}

func (r *changeReader) skipNumber() bool {
	r.take('-')
	if !r.take('0') && !r.digits() {
		return false
	}
	if r.take('.') && !r.digits() {
		return false
	}
	if r.take('e') || r.take('E') {
		if !r.take('+') {
			r.take('-')
		}
		return r.digits()
	}
	return true
}

func (r *changeReader) digits() bool {
	start := r.pos
	for r.pos < len(r.data) && '0' <= r.data[r.pos] && r.data[r.pos] <= '9' {
		r.pos++
	}
	return r.pos > start
}

func (r *changeReader) literal(word string) bool {
	if len(r.data)-r.pos < len(word) || string(r.data[r.pos:r.pos+len(word)]) != word {
		return false
	}
	r.pos += len(word)
	return true
}

func (r *changeReader) take(c byte) bool {
	if r.pos < len(r.data) && r.data[r.pos] == c {
		r.pos++
		return true
	}
	return false
}

func (r *changeReader) space() {
	for r.pos < len(r.data) {
		switch r.data[r.pos] {
		case ' ', '\t', '\r', '\n':
			r.pos++
		default:
			return
		}
	}
}

func isLower(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
			return false
		}
	}
	return true
}
