package usage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"time"
	"unicode/utf16"
	"unicode/utf8"
	"unsafe"
)

// The fields of the event, numbered as in usage.proto.
const (
	fieldID = iota + 1
	fieldTime
	fieldOrgID
	fieldKeyID
	fieldSourceIP
	fieldMethod
	fieldRoute
	fieldStatus
	fieldScope
	fieldDecision
	fieldDenyReason
	fieldUserAgent
	fieldLatencyUS
	fieldRequestBytes
	fieldResponseBytes
	fieldGateway
	fieldCount
)

var fieldNames = [fieldCount]string{
	"", "id", "time", "org_id", "key_id", "source_ip", "method", "route", "status", "scope", "decision",
	"deny_reason", "user_agent", "latency_us", "request_bytes", "response_bytes", "gateway",
}

// fieldOf is the number of a field by its name, 0 if it is none of ours.
func fieldOf(name []byte) int {
	switch string(name) {
	case "id":
		return fieldID
	case "time":
		return fieldTime
	case "org_id":
		return fieldOrgID
	case "key_id":
		return fieldKeyID
	case "source_ip":
		return fieldSourceIP
	case "method":
		return fieldMethod
	case "route":
		return fieldRoute
	case "status":
		return fieldStatus
	case "scope":
		return fieldScope
	case "decision":
		return fieldDecision
	case "deny_reason":
		return fieldDenyReason
	case "user_agent":
		return fieldUserAgent
	case "latency_us":
		return fieldLatencyUS
	case "request_bytes":
		return fieldRequestBytes
	case "response_bytes":
		return fieldResponseBytes
	case "gateway":
		return fieldGateway
	}
	return 0
}

// scanner walks over JSON text. It reads what encoding/json reads, but field
// names match exactly and a number must be a whole one.
type scanner struct {
	data []byte
	pos  int
}

func (s *scanner) end() bool { return s.pos >= len(s.data) }

func (s *scanner) space() {
	for s.pos < len(s.data) {
		switch s.data[s.pos] {
		case ' ', '\t', '\r', '\n':
			s.pos++
		default:
			return
		}
	}
}

func (s *scanner) take(c byte) bool {
	if s.pos < len(s.data) && s.data[s.pos] == c {
		s.pos++
		return true
	}
	return false
}

func (s *scanner) syntax(reason string) error {
	return fmt.Errorf("not valid JSON at byte %d: %s", s.pos, reason)
}

// plain marks the bytes that a JSON string holds as they are: neither quote nor
// backslash, nor control characters, nor anything beyond ASCII.
var plain = func() (t [256]bool) {
	for c := 0x20; c < 0x80; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

// text reads a string. The bytes lie in the input unless it held escapes or
// broken UTF-8.
func (s *scanner) text() ([]byte, error) {
	if !s.take('"') {
		return nil, s.syntax("expected a string")
	}
	start := s.pos
	data := s.data
	i := start
	for i < len(data) && plain[data[i]] {
		i++
	}
	if i < len(data) && data[i] == '"' {
		s.pos = i + 1
		return data[start:i], nil
	}
	odd := false
	for ; i < len(data); i++ {
		switch c := data[i]; {
		case c == '"':
			s.pos = i + 1
			if !odd && utf8.Valid(data[start:i]) {
				return data[start:i], nil
			}
			if out, ok := unescape(data[start:i]); ok {
				return out, nil
			}
			var out string // says what becomes of broken UTF-8 and half surrogates
			if err := json.Unmarshal(data[start-1:i+1], &out); err != nil {
				s.pos = start
				return nil, s.syntax("broken string")
			}
			return []byte(out), nil
		case c == '\\':
			odd = true
			i++
		case c < 0x20:
			s.pos = i
			return nil, s.syntax("control character in a string")
		}
	}
	s.pos = len(data)
	return nil, s.syntax("unterminated string")
}

// unescape is the text of a string between its quotes. It leaves to encoding/json
// what is not plain: broken escapes, surrogates without their half, broken UTF-8.
func unescape(raw []byte) ([]byte, bool) {
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			out = append(out, raw[i])
			continue
		}
		if i++; i >= len(raw) {
			return nil, false
		}
		if raw[i] != 'u' {
			c := escapes[raw[i]]
			if c == 0 {
				return nil, false
			}
			out = append(out, c)
			continue
		}
		r := hexRune(raw[i+1:])
		i += 4
		if utf16.IsSurrogate(r) && i+2 < len(raw) && raw[i+1] == '\\' && raw[i+2] == 'u' {
			r = utf16.DecodeRune(r, hexRune(raw[i+3:]))
			i += 6
		}
		if r < 0 || r == utf8.RuneError || utf16.IsSurrogate(r) {
			return nil, false
		}
		out = utf8.AppendRune(out, r)
	}
	return out, utf8.Valid(out)
}

// escapes are what the letters behind a backslash stand for.
var escapes = [256]byte{'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}

// hexRune reads the four digits of \u, and is negative if they are none.
func hexRune(b []byte) rune {
	if len(b) < 4 {
		return -1
	}
	var r rune
	for _, c := range b[:4] {
		switch {
		case '0' <= c && c <= '9':
			r = r<<4 | rune(c-'0')
		case 'a' <= c && c <= 'f':
			r = r<<4 | rune(c-'a'+10)
		case 'A' <= c && c <= 'F':
			r = r<<4 | rune(c-'A'+10)
		default:
			return -1
		}
	}
	return r
}

// bracketed finds the end of an object or array by its brackets alone.
func (s *scanner) bracketed() bool {
	depth := 0
	for s.pos < len(s.data) {
		c := s.data[s.pos]
		s.pos++
		switch c {
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return true
			}
		case '"':
			if !s.skipText() {
				return false
			}
		}
	}
	return false
}

func (s *scanner) skipText() bool {
	for s.pos < len(s.data) {
		c := s.data[s.pos]
		s.pos++
		switch {
		case c == '"':
			return true
		case c == '\\':
			s.pos++
		case c < 0x20:
			return false
		}
	}
	return false
}

// resync moves behind a broken element of an array, if that can be told: its
// brackets close and a comma or the end of the array follows.
func (s *scanner) resync() bool {
	if s.end() {
		return false
	}
	if c := s.data[s.pos]; c == '{' || c == '[' {
		if !s.bracketed() {
			return false
		}
	} else {
		for !s.end() && s.data[s.pos] != ',' && s.data[s.pos] != ']' {
			if c := s.data[s.pos]; c == '"' || c == '{' || c == '[' || c == '}' {
				return false
			}
			s.pos++
		}
	}
	s.space()
	return !s.end() && (s.data[s.pos] == ',' || s.data[s.pos] == ']')
}

// skip moves over one value of any kind.
func (s *scanner) skip() error {
	if s.end() {
		return s.syntax("unexpected end")
	}
	start := s.pos
	if s.data[start] == '"' {
		_, err := s.text()
		return err
	}
	if !s.valid(0) || !s.end() && !delimiter(s.data[s.pos]) {
		s.pos = start
		return s.syntax("broken value")
	}
	return nil
}

// maxDepth is how deep encoding/json goes.
const maxDepth = 10_000

// valid moves behind one value, and reports false if it is not JSON.
func (s *scanner) valid(depth int) bool {
	if s.end() || depth > maxDepth {
		return false
	}
	switch c := s.data[s.pos]; c {
	case '"':
		return s.validText()
	case '{', '[':
		return s.validBrackets(depth)
	case 't':
		return s.literal("true")
	case 'f':
		return s.literal("false")
	case 'n':
		return s.literal("null")
	}
	return s.number()
}

// validBrackets is valid for an object or array.
func (s *scanner) validBrackets(depth int) bool {
	object := s.data[s.pos] == '{'
	closing := s.data[s.pos] + 2 // '}' and ']' in ASCII
	s.pos++
	if s.space(); s.take(closing) {
		return true
	}
	for {
		s.space()
		if object {
			if !s.validText() {
				return false
			}
			if s.space(); !s.take(':') {
				return false
			}
			s.space()
		}
		if !s.valid(depth + 1) {
			return false
		}
		if s.space(); s.take(closing) {
			return true
		}
		if !s.take(',') {
			return false
		}
	}
}

// validText is valid for a string.
func (s *scanner) validText() bool {
	if !s.take('"') {
		return false
	}
	for ; s.pos < len(s.data); s.pos++ {
		switch c := s.data[s.pos]; {
		case c == '"':
			s.pos++
			return true
		case c < 0x20:
			return false
		case c == '\\':
			if s.pos++; s.end() {
				return false
			}
			if s.data[s.pos] == 'u' {
				if hexRune(s.data[s.pos+1:]) < 0 {
					return false
				}
				s.pos += 4
			} else if escapes[s.data[s.pos]] == 0 {
				return false
			}
		}
	}
	return false
}

func (s *scanner) literal(word string) bool {
	if !bytes.HasPrefix(s.data[s.pos:], []byte(word)) {
		return false
	}
	s.pos += len(word)
	return true
}

// number is valid for a number.
func (s *scanner) number() bool {
	s.take('-')
	if !s.take('0') && !s.digits() {
		return false
	}
	if s.take('.') && !s.digits() {
		return false
	}
	if s.take('e') || s.take('E') {
		if !s.take('+') {
			s.take('-')
		}
		return s.digits()
	}
	return true
}

func (s *scanner) digits() bool {
	start := s.pos
	for !s.end() && '0' <= s.data[s.pos] && s.data[s.pos] <= '9' {
		s.pos++
	}
	return s.pos > start
}

func delimiter(c byte) bool {
	return c == ',' || c == '}' || c == ']' || c == ' ' || c == '\t' || c == '\r' || c == '\n'
}

// element reads one event into d.ev. err is about the event and leaves the
// scanner behind it; syntax says that the JSON itself is broken.
func (d *Decoder) element(s *scanner) (err, syntax error) {
	d.ev = Event{}
	if s.end() {
		return nil, s.syntax("unexpected end")
	}
	if s.data[s.pos] != '{' {
		if syntax = s.skip(); syntax != nil {
			return nil, syntax
		}
		return errors.New("an event is a JSON object"), nil
	}
	s.pos++
	s.space()
	if s.take('}') {
		return nil, nil
	}
	for {
		s.space()
		name, syntax := s.text()
		if syntax != nil {
			return err, syntax
		}
		field := fieldOf(name)
		s.space()
		if !s.take(':') {
			return err, s.syntax("expected a colon")
		}
		s.space()
		ferr, syntax := d.value(s, field)
		if syntax != nil {
			return err, syntax
		}
		err = join(err, ferr)
		s.space()
		if s.take(',') {
			continue
		}
		if s.take('}') {
			return err, nil
		}
		return err, s.syntax("expected a comma or the end of the object")
	}
}

// value reads the value of a field; that of an unknown one is skipped, and null
// is as good as absent.
func (d *Decoder) value(s *scanner, field int) (err, syntax error) {
	if field == 0 {
		return nil, s.skip()
	}
	if s.end() {
		return nil, s.syntax("unexpected end")
	}
	start := s.pos
	switch c := s.data[start]; {
	case c == '"':
		b, syntax := s.text()
		if syntax != nil {
			return nil, syntax
		}
		return d.setText(field, b), nil
	case '0' <= c && c <= '9':
		if n, ok := s.whole(); ok {
			return d.setNumber(field, n), nil
		}
	}
	if syntax := s.skip(); syntax != nil {
		return nil, syntax
	}
	raw := s.data[start:s.pos]
	if string(raw) == "null" {
		return nil, nil
	}
	if isNumber(field) {
		return fmt.Errorf("%s is %.40s, want a whole number that is not negative", fieldNames[field], raw), nil
	}
	return fmt.Errorf("%s is %.40s, want a string", fieldNames[field], raw), nil
}

// whole reads digits that end where a value may end.
func (s *scanner) whole() (uint64, bool) {
	i, n := s.pos, uint64(0)
	for ; i < len(s.data) && '0' <= s.data[i] && s.data[i] <= '9'; i++ {
		digit := uint64(s.data[i] - '0')
		if n > (math.MaxUint64-digit)/10 {
			return 0, false
		}
		n = n*10 + digit
	}
	if s.data[s.pos] == '0' && i > s.pos+1 || i < len(s.data) && !delimiter(s.data[i]) {
		return 0, false
	}
	s.pos = i
	return n, true
}

// maxStatus is the largest number of three digits.
const maxStatus = 999

func isNumber(field int) bool {
	switch field {
	case fieldStatus, fieldLatencyUS, fieldRequestBytes, fieldResponseBytes:
		return true
	}
	return false
}

func (d *Decoder) setNumber(field int, n uint64) error {
	switch field {
	case fieldStatus:
		if n > maxStatus {
			return fmt.Errorf("status %d is no HTTP status", n)
		}
		d.ev.Status = uint16(n)
	case fieldLatencyUS:
		// Seventy minutes and more are all the same to us.
		d.ev.LatencyUS = uint32(min(n, math.MaxUint32))
	case fieldRequestBytes:
		d.ev.RequestBytes = n
	case fieldResponseBytes:
		d.ev.ResponseBytes = n
	default:
		return fmt.Errorf("%s is the number %d, want a string", fieldNames[field], n)
	}
	return nil
}

func (d *Decoder) setText(field int, b []byte) (err error) {
	ev := &d.ev
	switch field {
	case fieldID:
		ev.ID = string(b)
	case fieldTime:
		ev.Time, err = parseTime(b)
	case fieldSourceIP:
		ev.SourceIP, err = parseAddr(b)
	case fieldOrgID:
		ev.OrgID = d.texts.text(field, b)
	case fieldKeyID:
		ev.KeyID = d.texts.text(field, b)
	case fieldMethod:
		ev.Method = d.texts.text(field, b)
	case fieldRoute:
		ev.Route = d.texts.text(field, b)
	case fieldScope:
		ev.Scope = d.texts.text(field, b)
	case fieldDecision:
		ev.Decision = d.texts.text(field, b)
	case fieldDenyReason:
		ev.DenyReason = d.texts.text(field, b)
	case fieldUserAgent:
		ev.UserAgent = d.texts.text(field, b)
	case fieldGateway:
		ev.Gateway = d.texts.text(field, b)
	default:
		return fmt.Errorf("%s is a string, want a whole number", fieldNames[field])
	}
	return err
}

// parseAddr reads an address; an empty one is absent.
func parseAddr(b []byte) (netip.Addr, error) {
	if len(b) == 0 {
		return netip.Addr{}, nil
	}
	// The string does not outlive the call: a parsed address holds numbers only,
	// zones are refused and the error is made anew.
	addr, err := netip.ParseAddr(unsafe.String(&b[0], len(b)))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("source_ip %.60q is no IP address", b)
	}
	if addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("source_ip %.60q has a zone", b)
	}
	return addr, nil
}

// parseTime reads RFC 3339, and leaves to package time what is unusual or wrong.
func parseTime(b []byte) (time.Time, error) {
	if t, ok := parseUsual(b); ok {
		return t, nil
	}
	var t time.Time
	if err := t.UnmarshalText(b); err != nil {
		return time.Time{}, fmt.Errorf("time %.60q is not RFC 3339", b)
	}
	return t.UTC(), nil
}

func parseUsual(b []byte) (time.Time, bool) {
	if len(b) < 20 || len(b) > 35 || b[4] != '-' || b[7] != '-' || b[10] != 'T' || b[13] != ':' || b[16] != ':' {
		return time.Time{}, false
	}
	y1, ok1 := pair(b[0:])
	y2, ok2 := pair(b[2:])
	mo, ok3 := pair(b[5:])
	da, ok4 := pair(b[8:])
	ho, ok5 := pair(b[11:])
	mi, ok6 := pair(b[14:])
	se, ok7 := pair(b[17:])
	frac, offset, ok8 := cutZone(b[19:])
	ns, ok9 := nanoseconds(frac)
	if !(ok1 && ok2 && ok3 && ok4 && ok5 && ok6 && ok7 && ok8 && ok9) || mo < 1 || mo > 12 || da < 1 || ho > 23 || mi > 59 || se > 59 {
		return time.Time{}, false
	}
	t := time.Date(y1*100+y2, time.Month(mo), da, ho, mi, se, ns, time.UTC)
	if t.Day() != da {
		return time.Time{}, false // the month is shorter
	}
	return t.Add(-offset), true
}

// cutZone takes the zone off the end of a time.
func cutZone(b []byte) (rest []byte, offset time.Duration, ok bool) {
	if b[len(b)-1] == 'Z' {
		return b[:len(b)-1], 0, true
	}
	if len(b) < 6 {
		return nil, 0, false
	}
	rest, zone := b[:len(b)-6], b[len(b)-6:]
	ho, ok1 := pair(zone[1:])
	mi, ok2 := pair(zone[4:])
	offset = time.Duration(ho)*time.Hour + time.Duration(mi)*time.Minute
	if zone[0] == '-' {
		offset = -offset
	}
	return rest, offset, ok1 && ok2 && zone[3] == ':' && (zone[0] == '+' || zone[0] == '-') && ho < 24 && mi < 60
}

// nanoseconds reads the fraction of a second, its dot included; more than nine
// digits are left to package time.
func nanoseconds(frac []byte) (int, bool) {
	if len(frac) == 0 {
		return 0, true
	}
	if frac[0] != '.' || len(frac) == 1 || len(frac) > 10 {
		return 0, false
	}
	ns := 0
	for i := 1; i < 10; i++ {
		ns *= 10
		if i < len(frac) {
			if frac[i] < '0' || frac[i] > '9' {
				return 0, false
			}
			ns += int(frac[i] - '0')
		}
	}
	return ns, true
}

func pair(b []byte) (int, bool) {
	hi, lo := b[0]-'0', b[1]-'0'
	return int(hi)*10 + int(lo), hi < 10 && lo < 10
}

// AppendJSON appends the event as MarshalJSON writes it, without its detours.
func (e *Event) AppendJSON(b []byte) []byte {
	b = append(b, '{')
	if e.ID != "" {
		b = append(appendText(append(b, `"id":`...), e.ID), ',')
	}
	b = append(b, `"time":"`...)
	b = e.Time.AppendFormat(b, time.RFC3339Nano)
	b = appendText(append(b, `","org_id":`...), e.OrgID)
	b = appendText(append(b, `,"key_id":`...), e.KeyID)
	b = append(b, `,"source_ip":"`...)
	if e.SourceIP.IsValid() {
		b = e.SourceIP.AppendTo(b)
	}
	b = append(b, '"')
	b = appendField(b, `,"method":`, e.Method)
	b = appendText(append(b, `,"route":`...), e.Route)
	b = appendCount(b, `,"status":`, uint64(e.Status))
	b = appendField(b, `,"scope":`, e.Scope)
	b = appendField(b, `,"decision":`, e.Decision)
	b = appendField(b, `,"deny_reason":`, e.DenyReason)
	b = appendField(b, `,"user_agent":`, e.UserAgent)
	b = appendCount(b, `,"latency_us":`, uint64(e.LatencyUS))
	b = appendCount(b, `,"request_bytes":`, e.RequestBytes)
	b = appendCount(b, `,"response_bytes":`, e.ResponseBytes)
	b = appendField(b, `,"gateway":`, e.Gateway)
	return append(b, '}')
}

func appendField(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	return appendText(append(b, name...), value)
}

func appendCount(b []byte, name string, n uint64) []byte {
	if n == 0 {
		return b
	}
	return strconv.AppendUint(append(b, name...), n, 10)
}

func appendText(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; !plain[c] || c == '<' || c == '>' || c == '&' {
			quoted, err := json.Marshal(s)
			if err != nil {
				return append(b, `""`...)
			}
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
