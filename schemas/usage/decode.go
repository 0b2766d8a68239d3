package usage

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// ErrContentType is returned by [Decode] for a content type that carries no events.
var ErrContentType = errors.New("content type carries no usage events")

// Decode reads the events of a body, in order, and calls fn once for each
// element: with a normalized and valid event, or with the reason why this one
// is refused. A bad element costs nothing else. now is the clock against which
// times in the future are judged.
//
// i counts elements from zero: the elements of a JSON array or of a UsageBatch,
// the lines that are not blank of NDJSON. Where the rest of a body cannot be
// read any more (a JSON array broken in a way that hides where the element
// ends), one last call says so with the index at which reading stopped.
//
// ev is reused: it is valid during the call only, but a copy of *ev may be
// kept, strings included.
//
// The error is for a body that cannot be read at all: [ErrContentType], or an
// empty one. An absent content type is read as JSON.
func Decode(contentType string, body []byte, now time.Time, fn func(i int, ev *Event, err error)) error {
	d := decoders.Get().(*Decoder)
	defer decoders.Put(d)
	return d.Decode(contentType, body, now, fn)
}

var decoders = sync.Pool{New: func() any { return new(Decoder) }}

// Decoder is [Decode] with the memory of earlier bodies: texts that repeat
// (keys, routes, user agents) are allocated once. The zero value is ready; it
// is not safe for concurrent use.
type Decoder struct {
	ev      Event
	now     time.Time
	texts   interner
	columns Columns
	// raw and rawType are the element at hand as it came.
	raw     []byte
	rawType string
}

// Element is the element that fn is being called for, as it came, and its
// content type: what to keep of a refused one. Where the rest of a body cannot be
// read, it is that rest.
func (d *Decoder) Element() (data []byte, contentType string) { return d.raw, d.rawType }

func (d *Decoder) keep(contentType string, raw []byte) { d.rawType, d.raw = contentType, raw }

// Decode is the function of the same name.
func (d *Decoder) Decode(contentType string, body []byte, now time.Time, fn func(i int, ev *Event, err error)) error {
	d.now = now
	switch MediaType(contentType) {
	case ContentTypeJSON:
		return d.json(body, fn)
	case ContentTypeNDJSON:
		d.ndjson(body, fn)
		return nil
	case ContentTypeProtobuf:
		d.protobuf(body, fn)
		return nil
	}
	return fmt.Errorf("%w: %.100q, want %s, %s or %s", ErrContentType, contentType,
		ContentTypeJSON, ContentTypeNDJSON, ContentTypeProtobuf)
}

// MediaType is one of the ContentType constants for a Content-Type header, its
// parameters and the usual aliases included, or "". An absent header is JSON.
func MediaType(contentType string) string {
	switch contentType {
	case "", ContentTypeJSON:
		return ContentTypeJSON
	case ContentTypeNDJSON, ContentTypeProtobuf:
		return contentType
	}
	media, _, _ := strings.Cut(contentType, ";")
	switch strings.ToLower(strings.TrimSpace(media)) {
	case ContentTypeJSON, "text/json":
		return ContentTypeJSON
	case ContentTypeNDJSON, "application/ndjson", "application/jsonl", "application/x-jsonlines", "application/jsonlines":
		return ContentTypeNDJSON
	case ContentTypeProtobuf, "application/protobuf", "application/vnd.google.protobuf":
		return ContentTypeProtobuf
	}
	return ""
}

// emit judges d.ev as it was read and hands it on.
func (d *Decoder) emit(i int, err error, fn func(int, *Event, error)) {
	if err == nil {
		d.ev.Normalize()
		err = d.ev.Validate(d.now)
	}
	if err != nil {
		fn(i, nil, err)
		return
	}
	fn(i, &d.ev, nil)
}

func (d *Decoder) json(body []byte, fn func(int, *Event, error)) error {
	s := scanner{data: trimBOM(body)}
	s.space()
	if s.end() {
		return errors.New("the body is empty")
	}
	if s.data[s.pos] != '[' {
		err, syntax := d.element(&s)
		d.keep(ContentTypeJSON, s.data)
		if err = join(syntax, err); err != nil {
			d.emit(0, err, fn)
			return nil
		}
		d.emit(0, nil, fn)
		if s.space(); !s.end() {
			d.keep(ContentTypeJSON, s.data[s.pos:])
			fn(1, nil, errors.New("data after the first event: send several as an array or as "+ContentTypeNDJSON))
		}
		return nil
	}
	s.pos++
	s.space()
	if s.take(']') {
		d.trailing(&s, 0, fn)
		return nil
	}
	for i := 0; ; i++ {
		s.space()
		start := s.pos
		err, syntax := d.element(&s)
		if syntax != nil {
			// Where the element ends can often still be told from its brackets.
			s.pos = start
			if !s.resync() {
				d.keep(ContentTypeJSON, s.data[start:])
				fn(i, nil, fmt.Errorf("%w; the rest of the array cannot be read", syntax))
				return nil
			}
			err = syntax
		}
		d.keep(ContentTypeJSON, s.data[start:s.pos])
		s.space()
		closing := s.take(']')
		if !closing && !s.take(',') {
			d.emit(i, err, fn)
			d.keep(ContentTypeJSON, s.data[s.pos:])
			fn(i+1, nil, s.syntax("expected a comma or the end of the array; the rest of it cannot be read"))
			return nil
		}
		d.emit(i, err, fn)
		if closing {
			d.trailing(&s, i+1, fn)
			return nil
		}
	}
}

func (d *Decoder) trailing(s *scanner, i int, fn func(int, *Event, error)) {
	if s.space(); !s.end() {
		d.keep(ContentTypeJSON, s.data[s.pos:])
		fn(i, nil, s.syntax("data after the array"))
	}
}

func (d *Decoder) ndjson(body []byte, fn func(int, *Event, error)) {
	body = trimBOM(body)
	for i := 0; len(body) > 0; {
		line := body
		if n := bytes.IndexByte(body, '\n'); n >= 0 {
			line, body = body[:n], body[n+1:]
		} else {
			body = nil
		}
		s := scanner{data: line}
		if s.space(); s.end() {
			continue
		}
		err, syntax := d.element(&s)
		if syntax == nil {
			if s.space(); !s.end() {
				syntax = s.syntax("data after the event")
			}
		}
		d.keep(ContentTypeJSON, line)
		d.emit(i, join(syntax, err), fn)
		i++
	}
}

func trimBOM(b []byte) []byte { return bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")) }

// join puts errors on one line, for they end in answers and dead letters.
func join(errs ...error) error {
	var all error
	for _, err := range errs {
		switch {
		case err == nil:
		case all == nil:
			all = err
		default:
			all = fmt.Errorf("%w; %w", all, err)
		}
	}
	return all
}

// interner returns the same string for the same bytes, within bounds.
type interner struct {
	last  [fieldCount]string
	known map[string]string
}

// maxInterned bounds the texts that a decoder remembers, maxInternedLength
// their length: about half a megabyte at worst.
const (
	maxInterned       = 4096
	maxInternedLength = 128
)

// text is b as a string; field is where the same text was probably seen last.
func (t *interner) text(field int, b []byte) string {
	if len(b) == 0 {
		return ""
	}
	if t.last[field] == string(b) {
		return t.last[field]
	}
	if len(b) > maxInternedLength {
		return string(b)
	}
	s, ok := t.known[string(b)]
	if !ok {
		if t.known == nil {
			t.known = make(map[string]string, 64)
		} else if len(t.known) >= maxInterned {
			clear(t.known) // keeps its room: paths with ids in them fill it all the time
		}
		s = string(b)
		t.known[s] = s
	}
	t.last[field] = s
	return s
}
