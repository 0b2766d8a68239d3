package usage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// Wire types of protobuf.
const (
	wireVarint = 0
	wire64     = 1
	wireBytes  = 2
	wire32     = 5
)

var errTruncated = errors.New("not valid protobuf: truncated")

// wire reads one field of a protobuf message: its number, and its value as a
// number or as bytes; rest is what follows. Groups are refused.
func wire(b []byte) (field int, kind int, n uint64, data, rest []byte, err error) {
	tag, w := binary.Uvarint(b)
	if w <= 0 {
		return 0, 0, 0, nil, nil, errTruncated
	}
	b = b[w:]
	field, kind = int(tag>>3), int(tag&7)
	if tag>>3 == 0 || tag>>3 > 1<<29-1 {
		return 0, 0, 0, nil, nil, errors.New("not valid protobuf: bad field number")
	}
	switch kind {
	case wireVarint:
		n, w = binary.Uvarint(b)
		if w <= 0 {
			return 0, 0, 0, nil, nil, errTruncated
		}
		return field, kind, n, nil, b[w:], nil
	case wireBytes:
		n, w = binary.Uvarint(b)
		if w <= 0 || n > uint64(len(b)-w) {
			return 0, 0, 0, nil, nil, errTruncated
		}
		return field, kind, 0, b[w : w+int(n)], b[w+int(n):], nil
	case wire64:
		if len(b) < 8 {
			return 0, 0, 0, nil, nil, errTruncated
		}
		return field, kind, binary.LittleEndian.Uint64(b), nil, b[8:], nil
	case wire32:
		if len(b) < 4 {
			return 0, 0, 0, nil, nil, errTruncated
		}
		return field, kind, uint64(binary.LittleEndian.Uint32(b)), nil, b[4:], nil
	}
	return 0, 0, 0, nil, nil, fmt.Errorf("not valid protobuf: wire type %d", kind)
}

// protobuf reads a UsageBatch. An event that is broken inside costs itself
// only, since its length is known.
func (d *Decoder) protobuf(body []byte, fn func(int, *Event, error)) {
	i := 0
	for len(body) > 0 {
		field, kind, _, data, rest, err := wire(body)
		if err != nil {
			d.keep(ContentTypeProtobuf, body)
			fn(i, nil, fmt.Errorf("%w; the rest of the batch cannot be read", err))
			return
		}
		d.keep(ContentTypeProtobuf, body[:len(body)-len(rest)])
		body = rest
		switch {
		case field == batchEvents && kind == wireBytes:
			d.emit(i, d.message(data), fn)
			i++
		case field == batchColumns && kind == wireBytes:
			i = d.columnar(i, data, fn)
		case field == batchEvents || field == batchColumns:
			fn(i, nil, fmt.Errorf("not valid protobuf: field %d has wire type %d", field, kind))
			i++
		}
	}
}

// Fields of UsageBatch.
const (
	batchEvents  = 1
	batchColumns = 2
)

// message reads one UsageEvent into d.ev.
func (d *Decoder) message(b []byte) (err error) {
	d.ev = Event{}
	for len(b) > 0 {
		field, kind, n, data, rest, werr := wire(b)
		if werr != nil {
			return werr
		}
		b = rest
		if field <= 0 || field >= fieldCount {
			continue
		}
		switch {
		case field == fieldTime && kind == wireBytes:
			t, terr := timestamp(data)
			d.ev.Time = t
			err = join(err, terr)
		case field != fieldTime && kind == wireBytes && !isNumber(field):
			err = join(err, d.setText(field, validUTF8(data)))
		case kind == wireVarint && isNumber(field):
			err = join(err, d.setNumber(field, n))
		default:
			err = join(err, fmt.Errorf("%s has wire type %d", fieldNames[field], kind))
		}
	}
	return err
}

// validUTF8 puts U+FFFD in the place of what is no UTF-8, as encoding/json does.
func validUTF8(b []byte) []byte {
	if utf8.Valid(b) {
		return b
	}
	return []byte(strings.ToValidUTF8(string(b), "\uFFFD"))
}

// timestamp reads a google.protobuf.Timestamp.
func timestamp(b []byte) (time.Time, error) {
	var sec, ns int64
	for len(b) > 0 {
		field, kind, n, _, rest, err := wire(b)
		if err != nil {
			return time.Time{}, err
		}
		b = rest
		if kind != wireVarint {
			continue
		}
		switch field {
		case 1:
			sec = int64(n)
		case 2:
			ns = int64(int32(n))
		}
	}
	// The bounds of google.protobuf.Timestamp.
	if ns < 0 || ns > 999_999_999 || sec < -62135596800 || sec > 253402300799 {
		return time.Time{}, fmt.Errorf("time has seconds %d, nanos %d, which is out of range", sec, ns)
	}
	return time.Unix(sec, ns).UTC(), nil
}

// AppendProtobuf appends the event as one element of a UsageBatch, tag included.
func (e *Event) AppendProtobuf(b []byte) []byte {
	b = append(b, batchEvents<<3|wireBytes)
	at := len(b)
	b = append(b, 0, 0) // room for a length of two bytes, the usual one
	b = pbText(b, fieldID, e.ID)
	b = pbTime(b, e.Time)
	b = pbText(b, fieldOrgID, e.OrgID)
	b = pbText(b, fieldKeyID, e.KeyID)
	if e.SourceIP.IsValid() {
		b = append(b, fieldSourceIP<<3|wireBytes, 0)
		n := len(b)
		b = e.SourceIP.AppendTo(b)
		b[n-1] = byte(len(b) - n)
	}
	b = pbText(b, fieldMethod, e.Method)
	b = pbText(b, fieldRoute, e.Route)
	b = pbCount(b, fieldStatus, uint64(e.Status))
	b = pbText(b, fieldScope, e.Scope)
	b = pbText(b, fieldDecision, e.Decision)
	b = pbText(b, fieldDenyReason, e.DenyReason)
	b = pbText(b, fieldUserAgent, e.UserAgent)
	b = pbCount(b, fieldLatencyUS, uint64(e.LatencyUS))
	b = pbCount(b, fieldRequestBytes, e.RequestBytes)
	b = pbCount(b, fieldResponseBytes, e.ResponseBytes)
	b = pbText(b, fieldGateway, e.Gateway)
	return pbLength(b, at)
}

// pbLength writes the length of what follows the two bytes reserved at.
func pbLength(b []byte, at int) []byte {
	n := len(b) - at - 2
	if n < 1<<14 {
		b[at], b[at+1] = byte(n)|0x80, byte(n>>7)
		return b
	}
	var length [binary.MaxVarintLen64]byte
	w := binary.PutUvarint(length[:], uint64(n))
	b = append(b, length[:w-2]...)
	copy(b[at+w:], b[at+2:at+2+n])
	copy(b[at:], length[:w])
	return b
}

func pbText(b []byte, field int, s string) []byte {
	if s == "" {
		return b
	}
	b = binary.AppendUvarint(b, uint64(field<<3|wireBytes))
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func pbCount(b []byte, field int, n uint64) []byte {
	if n == 0 {
		return b
	}
	b = binary.AppendUvarint(b, uint64(field<<3|wireVarint))
	return binary.AppendUvarint(b, n)
}

func pbTime(b []byte, t time.Time) []byte {
	b = append(b, fieldTime<<3|wireBytes, 0)
	n := len(b)
	b = append(b, 1<<3|wireVarint)
	b = binary.AppendUvarint(b, uint64(t.Unix()))
	if ns := t.Nanosecond(); ns != 0 {
		b = append(b, 2<<3|wireVarint)
		b = binary.AppendUvarint(b, uint64(ns))
	}
	b[n-1] = byte(len(b) - n)
	return b
}
