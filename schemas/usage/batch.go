package usage

import (
	"encoding/binary"
	"math"
	"math/bits"
	"sync"
	"time"
)

// AppendBatch appends a UsageBatch of the events, by column. They must be
// normalized; of an address that is not valid nothing arrives.
func AppendBatch(b []byte, events []Event) []byte {
	p := packers.Get().(*packer)
	defer packers.Put(p)
	for i := range events {
		p.list = append(p.list, &events[i])
	}
	b = p.appendBatch(b, p.list)
	clear(p.list)
	p.list = p.list[:0]
	return b
}

// AppendBatchOf is [AppendBatch] for events that lie apart.
func AppendBatchOf(b []byte, events []*Event) []byte {
	p := packers.Get().(*packer)
	defer packers.Put(p)
	return p.appendBatch(b, events)
}

func (p *packer) appendBatch(b []byte, events []*Event) []byte {
	if len(events) == 0 {
		return b
	}
	if !columnar(events) {
		for _, ev := range events {
			b = ev.AppendProtobuf(b)
		}
		return b
	}
	p.pack(events)
	b = append(b, batchColumns<<3|wireBytes)
	b = binary.AppendUvarint(b, uint64(len(p.out)))
	return append(b, p.out...)
}

// Seconds since 1970 of the years 1680 and 2261: nanoseconds since 1970 reach
// from 1678 to 2262 only.
var (
	columnarFrom = time.Date(1680, 1, 1, 0, 0, 0, 0, time.UTC).Unix()
	columnarTo   = time.Date(2261, 1, 1, 0, 0, 0, 0, time.UTC).Unix()
)

// columnar tells whether events fit into columns.
func columnar(events []*Event) bool {
	for _, ev := range events {
		if s := ev.Time.Unix(); s < columnarFrom || s >= columnarTo {
			return false
		}
	}
	return true
}

var packers = sync.Pool{New: func() any { return new(packer) }}

// Tuples that stand in one dictionary each.
type (
	caller   struct{ org, key string }
	endpoint struct{ method, route, scope string }
	outcome  struct {
		decision, reason string
		status           uint16
	}
	client struct{ agent, gateway string }
)

// dictionary numbers values in the order in which they first come.
type dictionary[T comparable] struct {
	values []T
	known  map[T]uint64
	column []uint64
}

func (d *dictionary[T]) add(v T) {
	n := uint64(len(d.values))
	if n > 0 {
		if last := d.column[len(d.column)-1]; d.values[last] == v {
			d.column = append(d.column, last)
			return
		}
	}
	at, ok := d.known[v]
	if !ok {
		if d.known == nil {
			d.known = make(map[T]uint64)
		}
		at = n
		d.known[v] = n
		d.values = append(d.values, v)
	}
	d.column = append(d.column, at)
}

func (d *dictionary[T]) reset() {
	clear(d.known)
	clear(d.values) // lets go of the strings
	d.values, d.column = d.values[:0], d.column[:0]
}

// packer builds one UsageColumns; its memory is reused.
type packer struct {
	out  []byte
	list []*Event

	times                       []uint64
	callers                     dictionary[caller]
	endpoints                   dictionary[endpoint]
	outcomes                    dictionary[outcome]
	clients                     dictionary[client]
	v4                          dictionary[uint32]
	v6                          dictionary[[16]byte]
	latency, requests, response []uint64

	numbers []uint64
	uuids   []byte
}

func (p *packer) reset() {
	p.out = p.out[:0]
	p.callers.reset()
	p.endpoints.reset()
	p.outcomes.reset()
	p.clients.reset()
	p.v4.reset()
	p.v6.reset()
	p.times, p.latency, p.requests, p.response = p.times[:0], p.latency[:0], p.requests[:0], p.response[:0]
}

// pack reads each event once, for they are large, and then writes the columns.
func (p *packer) pack(events []*Event) {
	p.reset()
	last := int64(0)
	for _, ev := range events {
		ns := ev.Time.UnixNano()
		p.times = append(p.times, zigzag(ns-last))
		last = ns
		p.callers.add(caller{ev.OrgID, ev.KeyID})
		p.endpoints.add(endpoint{ev.Method, ev.Route, ev.Scope})
		p.outcomes.add(outcome{ev.Decision, ev.DenyReason, ev.Status})
		p.clients.add(client{ev.UserAgent, ev.Gateway})
		if a := ev.SourceIP.Unmap(); a.Is4() {
			b := a.As4()
			p.v4.add(binary.BigEndian.Uint32(b[:]))
		} else {
			p.v6.add(a.As16())
		}
		p.latency = append(p.latency, uint64(ev.LatencyUS))
		p.requests = append(p.requests, ev.RequestBytes)
		p.response = append(p.response, ev.ResponseBytes)
	}
	p.out = append(p.out, colVersion<<3|wireVarint, columnsVersion)
	p.count(colCount, uint64(len(events)))
	p.column(colTime, p.times) // there even if they are all 1970
	p.ids(events)
	p.tuples()
	p.sources(events)
	p.packed(colLatencyUS, p.latency)
	p.packed(colRequestBytes, p.requests)
	p.packed(colResponseBytes, p.response)
}

func (p *packer) tag(field, kind int) { p.out = binary.AppendUvarint(p.out, uint64(field<<3|kind)) }

func (p *packer) count(field int, n uint64) {
	p.tag(field, wireVarint)
	p.out = binary.AppendUvarint(p.out, n)
}

func (p *packer) text(field int, s string) {
	p.tag(field, wireBytes)
	p.out = binary.AppendUvarint(p.out, uint64(len(s)))
	p.out = append(p.out, s...)
}

// packed writes a column of numbers, or nothing if all are zero.
func (p *packer) packed(field int, values []uint64) {
	for _, v := range values {
		if v != 0 {
			p.column(field, values)
			return
		}
	}
}

func (p *packer) column(field int, values []uint64) {
	size := 0
	for _, v := range values {
		size += uvarintLen(v)
	}
	p.tag(field, wireBytes)
	p.out = binary.AppendUvarint(p.out, uint64(size))
	for _, v := range values {
		p.out = binary.AppendUvarint(p.out, v)
	}
}

func uvarintLen(v uint64) int { return (bits.Len64(v|1) + 6) / 7 }

// ids writes the shortest form that holds: a base that the ids count up from,
// UUIDs in binary, or texts.
func (p *packer) ids(events []*Event) {
	p.uuids = p.uuids[:0]
	empty, counting := true, true
	for i := range events {
		empty = empty && events[i].ID == ""
		id, ok := parseUUID(events[i].ID)
		if !ok {
			if empty && i+1 < len(events) {
				continue
			}
			if !empty {
				p.idTexts(events)
			}
			return
		}
		if i*16 != len(p.uuids) {
			p.idTexts(events)
			return
		}
		p.uuids = append(p.uuids, id[:]...)
		if i > 0 {
			low := binary.BigEndian.Uint64(p.uuids[8:])
			counting = counting && string(p.uuids[:8]) == string(id[:8]) && low < math.MaxInt64*2 &&
				binary.BigEndian.Uint64(id[8:]) == low+uint64(i) && low+uint64(i) >= low
		}
	}
	if counting {
		p.tag(colIDBase, wireBytes)
		p.out = append(append(p.out, 16), p.uuids[:16]...)
		return
	}
	p.suffixes()
}

// suffixes writes what the UUIDs have in common once, which is the time at
// least in those of version 7, and of each the rest.
func (p *packer) suffixes() {
	common := 15
	for i := 16; i < len(p.uuids); i += 16 {
		for n := range common {
			if p.uuids[n] != p.uuids[i+n] {
				common = n
				break
			}
		}
	}
	if common > 0 {
		p.tag(colIDBase, wireBytes)
		p.out = append(append(p.out, byte(common)), p.uuids[:common]...)
	}
	p.tag(colUUID, wireBytes)
	p.out = binary.AppendUvarint(p.out, uint64(len(p.uuids)/16*(16-common)))
	for i := 0; i < len(p.uuids); i += 16 {
		p.out = append(p.out, p.uuids[i+common:i+16]...)
	}
}

func (p *packer) idTexts(events []*Event) {
	for i := range events {
		p.text(colID, events[i].ID)
	}
}

func (p *packer) tuples() {
	for _, v := range p.callers.values {
		p.text(colOrgID, v.org)
	}
	for _, v := range p.callers.values {
		p.text(colKeyID, v.key)
	}
	p.packed(colCaller, p.callers.column)
	for _, v := range p.endpoints.values {
		p.text(colMethod, v.method)
	}
	for _, v := range p.endpoints.values {
		p.text(colRoute, v.route)
	}
	for _, v := range p.endpoints.values {
		p.text(colScope, v.scope)
	}
	p.packed(colEndpoint, p.endpoints.column)
	p.numbers = p.numbers[:0]
	for _, v := range p.outcomes.values {
		p.numbers = append(p.numbers, uint64(v.status))
	}
	p.packed(colStatus, p.numbers)
	for _, v := range p.outcomes.values {
		p.text(colDecision, v.decision)
	}
	for _, v := range p.outcomes.values {
		p.text(colDenyReason, v.reason)
	}
	p.packed(colOutcome, p.outcomes.column)
	for _, v := range p.clients.values {
		p.text(colUserAgent, v.agent)
	}
	for _, v := range p.clients.values {
		p.text(colGateway, v.gateway)
	}
	p.packed(colClient, p.clients.column)
}

func (p *packer) sources(events []*Event) {
	if len(p.v6.values) > 0 {
		p.tag(colIP6, wireBytes)
		p.out = binary.AppendUvarint(p.out, uint64(16*len(p.v6.values)))
		for _, a := range p.v6.values {
			p.out = append(p.out, a[:]...)
		}
	}
	n4 := uint64(len(p.v4.values))
	if n4 > 0 {
		p.tag(colIP4, wireBytes)
		p.out = binary.AppendUvarint(p.out, 4*n4)
		for _, a := range p.v4.values {
			p.out = binary.BigEndian.AppendUint32(p.out, a)
		}
	}
	if len(p.v6.values) == 0 {
		p.packed(colSource, p.v4.column)
		return
	}
	p.numbers = p.numbers[:0]
	i4, i6 := 0, 0
	for _, ev := range events {
		if ev.SourceIP.Unmap().Is4() {
			p.numbers = append(p.numbers, p.v4.column[i4])
			i4++
		} else {
			p.numbers = append(p.numbers, n4+p.v6.column[i6])
			i6++
		}
	}
	p.packed(colSource, p.numbers)
}

// UUID is an id in the text form of RFC 9562, lower case.
func UUID(id [16]byte) string {
	var b [IDLength]byte
	return string(appendUUID(b[:0], &id))
}

// parseUUID reads exactly what UUID writes.
func parseUUID(s string) (id [16]byte, ok bool) {
	if len(s) != IDLength || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return id, false
	}
	bad := byte(0)
	for n, at := range uuidDigits {
		hi, lo := nibbles[s[at]], nibbles[s[at+1]]
		bad |= hi | lo
		id[n] = hi<<4 | lo&0xf
	}
	return id, bad < 0x10
}

// uuidDigits is where the two digits of each byte are in the text of a UUID.
var uuidDigits = [16]byte{0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34}

// nibbles is the value of a lower-case hexadecimal digit, 0xff for what is none.
var nibbles = func() (t [256]byte) {
	for c := range t {
		t[c] = 0xff
	}
	for i, c := range []byte("0123456789abcdef") {
		t[c] = byte(i)
	}
	return t
}()
