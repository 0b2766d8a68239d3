package usage

import (
	"encoding/binary"
	"math"
	"net/netip"
	"sync"
)

// AppendBatch appends a UsageBatch of the events, by column. They must be
// normalized; of an address that is not valid nothing arrives.
func AppendBatch(b []byte, events []Event) []byte {
	if len(events) == 0 {
		return b
	}
	if !columnar(events) {
		for i := range events {
			b = events[i].AppendProtobuf(b)
		}
		return b
	}
	p := packers.Get().(*packer)
	defer packers.Put(p)
	p.pack(events)
	b = append(b, batchColumns<<3|wireBytes)
	b = binary.AppendUvarint(b, uint64(len(p.out)))
	return append(b, p.out...)
}

// columnar tells whether events fit into columns: nanoseconds since 1970 reach
// from 1678 to 2262 only.
func columnar(events []Event) bool {
	for i := range events {
		if y := events[i].Time.Year(); y < 1680 || y > 2260 {
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
	out       []byte
	callers   dictionary[caller]
	endpoints dictionary[endpoint]
	outcomes  dictionary[outcome]
	clients   dictionary[client]
	v4, v6    dictionary[netip.Addr]
	numbers   []uint64
	uuids     []byte
}

func (p *packer) pack(events []Event) {
	p.callers.reset()
	p.endpoints.reset()
	p.outcomes.reset()
	p.clients.reset()
	p.out = append(p.out[:0], colVersion<<3|wireVarint, columnsVersion)
	p.count(colCount, uint64(len(events)))
	p.times(events)
	p.ids(events)
	for i := range events {
		ev := &events[i]
		p.callers.add(caller{ev.OrgID, ev.KeyID})
		p.endpoints.add(endpoint{ev.Method, ev.Route, ev.Scope})
		p.outcomes.add(outcome{ev.Decision, ev.DenyReason, ev.Status})
		p.clients.add(client{ev.UserAgent, ev.Gateway})
	}
	p.tuples()
	p.sources(events)
	p.numbersOf(colLatencyUS, events, func(ev *Event) uint64 { return uint64(ev.LatencyUS) })
	p.numbersOf(colRequestBytes, events, func(ev *Event) uint64 { return ev.RequestBytes })
	p.numbersOf(colResponseBytes, events, func(ev *Event) uint64 { return ev.ResponseBytes })
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
	size, all := 0, uint64(0)
	for _, v := range values {
		size += uvarintLen(v)
		all |= v
	}
	if all == 0 {
		return
	}
	p.tag(field, wireBytes)
	p.out = binary.AppendUvarint(p.out, uint64(size))
	for _, v := range values {
		p.out = binary.AppendUvarint(p.out, v)
	}
}

func uvarintLen(v uint64) int {
	n := 1
	for ; v >= 0x80; v >>= 7 {
		n++
	}
	return n
}

func (p *packer) numbersOf(field int, events []Event, value func(*Event) uint64) {
	p.numbers = p.numbers[:0]
	for i := range events {
		p.numbers = append(p.numbers, value(&events[i]))
	}
	p.packed(field, p.numbers)
}

func (p *packer) times(events []Event) {
	p.numbers = p.numbers[:0]
	last := int64(0)
	for i := range events {
		ns := events[i].Time.UnixNano()
		p.numbers = append(p.numbers, zigzag(ns-last))
		last = ns
	}
	// A column of times is there even if they are all 1970.
	p.tag(colTime, wireBytes)
	size := 0
	for _, v := range p.numbers {
		size += uvarintLen(v)
	}
	p.out = binary.AppendUvarint(p.out, uint64(size))
	for _, v := range p.numbers {
		p.out = binary.AppendUvarint(p.out, v)
	}
}

// ids writes the shortest form that holds: a base that the ids count up from,
// UUIDs in binary, or texts.
func (p *packer) ids(events []Event) {
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

func (p *packer) idTexts(events []Event) {
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

func (p *packer) sources(events []Event) {
	p.v4.reset()
	p.v6.reset()
	for i := range events {
		if a := events[i].SourceIP.Unmap(); a.Is4() {
			p.v4.add(a)
		} else {
			p.v6.add(a)
		}
	}
	if len(p.v6.values) > 0 {
		p.tag(colIP6, wireBytes)
		p.out = binary.AppendUvarint(p.out, uint64(16*len(p.v6.values)))
		for _, a := range p.v6.values {
			b := a.As16()
			p.out = append(p.out, b[:]...)
		}
	}
	if len(p.v4.values) > 0 {
		p.tag(colIP4, wireBytes)
		p.out = binary.AppendUvarint(p.out, uint64(4*len(p.v4.values)))
		for _, a := range p.v4.values {
			b := a.As4()
			p.out = append(p.out, b[:]...)
		}
	}
	p.numbers = p.numbers[:0]
	n4, i4, i6 := uint64(len(p.v4.values)), 0, 0
	for i := range events {
		if events[i].SourceIP.Unmap().Is4() {
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
	var b [uuidLength]byte
	return string(appendUUID(b[:0], &id))
}

// parseUUID reads exactly what UUID writes.
func parseUUID(s string) (id [16]byte, ok bool) {
	if len(s) != uuidLength || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return id, false
	}
	n := 0
	for i := 0; i < len(s); {
		if s[i] == '-' {
			if i != 8 && i != 13 && i != 18 && i != 23 {
				return id, false
			}
			i++
			continue
		}
		hi, ok1 := nibble(s[i])
		lo, ok2 := nibble(s[i+1])
		if !ok1 || !ok2 {
			return id, false
		}
		id[n] = hi<<4 | lo
		n++
		i += 2
	}
	return id, true
}

func nibble(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	}
	return 0, false
}
