package usage

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"
)

// The columnar form of a batch: message UsageColumns in usage.proto, which tells
// what the columns mean. Frames of a few hundred events come to a fifth of the
// bytes of single protobuf events, and are read without an allocation for each.

// columnsVersion is the newest that this package reads.
const columnsVersion = 1

// Fields of UsageColumns.
const (
	colVersion = iota + 1
	colCount
	colTime
	colIDBase
	colUUID
	colID
	colOrgID
	colKeyID
	colCaller
	colMethod
	colRoute
	colScope
	colEndpoint
	colStatus
	colDecision
	colDenyReason
	colOutcome
	colUserAgent
	colGateway
	colClient
	colIP6
	colIP4
	colSource
	colLatencyUS
	colRequestBytes
	colResponseBytes
	colEnd
)

func unzigzag(n uint64) int64 { return int64(n>>1) ^ -int64(n&1) }
func zigzag(n int64) uint64   { return uint64(n<<1) ^ uint64(n>>63) }

// Columns is a columnar batch as it was read: of each event the time, the id and the
// numbers, and where in the dictionaries its texts are. A column of numbers or of
// indices has an entry for each of Rows events, or none if all are zero. It is
// valid until its decoder reads something else, the strings in it longer.
type Columns struct {
	Rows int
	// Time is in nanoseconds since 1970.
	Time []int64
	// IDs are UUIDs of IDLength bytes each, without anything between them.
	IDs                                       string
	Caller, Endpoint, Outcome, Client, Source []uint32
	LatencyUS                                 []uint32
	RequestBytes, ResponseBytes               []uint64

	OrgID, KeyID         []string // of a caller
	Method, Route, Scope []string // of an endpoint
	Decision, DenyReason []string // of an outcome
	Status               []uint16
	UserAgent, Gateway   []string     // of a client
	SourceIP             []netip.Addr // of a source

	version, count uint64
	// packed are the columns as they came.
	packed       [colEnd][]byte
	present      [colEnd]bool
	texts        [colEnd][]string
	idBase, uuid []byte
	ip4, ip6     []byte
	uuids        []byte
}

// IDLength is the length of a UUID in text form.
const IDLength = 36

// Columns reads a batch that is nothing but columns, without a look at every event
// by itself: all of its events are valid and have UUIDs. ok is false for any other
// body, which is for [Decoder.Decode].
func (d *Decoder) Columns(contentType string, body []byte, now time.Time) (c *Columns, ok bool) {
	if MediaType(contentType) != ContentTypeProtobuf {
		return nil, false
	}
	field, kind, _, data, rest, err := wire(body)
	if err != nil || field != batchColumns || kind != wireBytes || len(rest) > 0 {
		return nil, false
	}
	c = &d.columns
	if c.read(&d.texts, data) != nil || !c.valid(now) {
		return nil, false
	}
	return c, true
}

// valid tells whether every event is.
func (c *Columns) valid(now time.Time) bool {
	if c.Rows == 0 || len(c.IDs) != c.Rows*IDLength {
		return false
	}
	if slices.Min(c.Time) < year2000*int64(time.Second) || slices.Max(c.Time) > now.Add(MaxAhead).UnixNano() {
		return false
	}
	for i := range c.OrgID {
		if CheckIdentifier(c.OrgID[i]) != nil || CheckIdentifier(c.KeyID[i]) != nil {
			return false
		}
	}
	for i, decision := range c.Decision {
		if c.Status[i] > maxStatus || checkDecision(decision, c.DenyReason[i]) != nil {
			return false
		}
	}
	return !slices.Contains(c.Route, "") && within(c.Caller, len(c.OrgID)) && within(c.Endpoint, len(c.Route)) &&
		within(c.Outcome, len(c.Decision)) && within(c.Client, len(c.UserAgent)) && within(c.Source, len(c.SourceIP))
}

// within tells whether all indices are below n.
func within(index []uint32, n int) bool {
	most := uint32(0)
	for _, i := range index {
		most = max(most, i)
	}
	return int64(most) < int64(n)
}

// columnar reads a UsageColumns whose first event has index i, and returns the
// index behind its last.
func (d *Decoder) columnar(i int, data []byte, fn func(int, *Event, error)) int {
	c := &d.columns
	if err := c.read(&d.texts, data); err != nil {
		fn(i, nil, fmt.Errorf("columns: %w; none of the batch can be read", err))
		return i + 1
	}
	for n := range c.Rows {
		err := c.Event(n, &d.ev)
		if err == nil {
			d.ev.Normalize()
			err = d.ev.Validate(d.now)
		}
		if err != nil {
			d.keep(ContentTypeJSON, d.ev.AppendJSON(nil))
			fn(i+n, nil, err)
			continue
		}
		fn(i+n, &d.ev, nil)
	}
	return i + c.Rows
}

func (c *Columns) reset() {
	texts, time, uuids := c.texts, c.Time[:0], c.uuids[:0]
	for i := range texts {
		texts[i] = texts[i][:0]
	}
	*c = Columns{
		texts: texts, Time: time, uuids: uuids, Caller: c.Caller[:0], Endpoint: c.Endpoint[:0], Outcome: c.Outcome[:0],
		Client: c.Client[:0], Source: c.Source[:0], LatencyUS: c.LatencyUS[:0], RequestBytes: c.RequestBytes[:0],
		ResponseBytes: c.ResponseBytes[:0], Status: c.Status[:0], SourceIP: c.SourceIP[:0],
	}
}

// fieldOfText is the event's field that a dictionary is of, for interning.
var fieldOfText = [colEnd]int{
	colOrgID: fieldOrgID, colKeyID: fieldKeyID, colMethod: fieldMethod, colRoute: fieldRoute, colScope: fieldScope,
	colDecision: fieldDecision, colDenyReason: fieldDenyReason, colUserAgent: fieldUserAgent, colGateway: fieldGateway,
}

func (c *Columns) read(texts *interner, data []byte) error {
	c.reset()
	for len(data) > 0 {
		field, kind, n, value, rest, err := wire(data)
		if err != nil {
			return err
		}
		data = rest
		switch {
		case field >= colEnd:
		case field == colVersion && kind == wireVarint:
			c.version = n
		case field == colCount && kind == wireVarint:
			c.count = n
		case kind != wireBytes:
			return fmt.Errorf("field %d has wire type %d", field, kind)
		case field == colIDBase:
			c.idBase = value
		case field == colUUID:
			c.uuid = value
		case field == colIP4:
			c.ip4 = value
		case field == colIP6:
			c.ip6 = value
		case field == colID:
			c.texts[colID] = append(c.texts[colID], string(value))
		case fieldOfText[field] != 0:
			c.texts[field] = append(c.texts[field], texts.text(fieldOfText[field], validUTF8(value)))
		case c.present[field]:
			return fmt.Errorf("column %d is given twice", field)
		default:
			c.packed[field], c.present[field] = value, true
		}
	}
	if err := c.check(); err != nil {
		return err
	}
	c.dictionaries()
	if !unpack(c, colStatus, len(c.Decision), &c.Status) {
		return errors.New("there are fewer statuses than decisions")
	}
	for len(c.Status) < len(c.Decision) {
		c.Status = append(c.Status, 0)
	}
	if len(c.Decision) == 0 { // outcome and client 0 are there in any case
		c.Decision, c.DenyReason, c.Status = append(c.Decision, Allow), append(c.DenyReason, ""), append(c.Status, 0)
	}
	if len(c.UserAgent) == 0 {
		c.UserAgent, c.Gateway = append(c.UserAgent, ""), append(c.Gateway, "")
	}
	if err := c.unpackAll(); err != nil {
		return err
	}
	c.ids()
	return nil
}

// check looks at what every event depends on.
func (c *Columns) check() error {
	switch {
	case c.version != columnsVersion:
		return fmt.Errorf("version %d is not known, only %d", c.version, columnsVersion)
	case c.count > uint64(len(c.packed[colTime])):
		return errors.New("there are fewer times than events")
	case len(c.texts[colOrgID]) != len(c.texts[colKeyID]):
		return errors.New("org_id and key_id differ in length")
	case len(c.texts[colMethod]) != len(c.texts[colRoute]) || len(c.texts[colScope]) != len(c.texts[colRoute]):
		return errors.New("method, route and scope differ in length")
	case len(c.texts[colDecision]) != len(c.texts[colDenyReason]):
		return errors.New("decision and deny_reason differ in length")
	case len(c.texts[colUserAgent]) != len(c.texts[colGateway]):
		return errors.New("user_agent and gateway differ in length")
	case len(c.uuid) == 0 && len(c.idBase) != 0 && len(c.idBase) != 16:
		return errors.New("id_base is not of 16 bytes")
	case len(c.uuid) != 0 && (len(c.idBase) > 15 || uint64(len(c.uuid)) != uint64(16-len(c.idBase))*c.count):
		return errors.New("uuid and id_base have not 16 bytes an event")
	case len(c.texts[colID]) != 0 && uint64(len(c.texts[colID])) != c.count:
		return errors.New("there is not one id an event")
	case len(c.ip4)%4 != 0 || len(c.ip6)%16 != 0:
		return errors.New("addresses have not 4 or 16 bytes each")
	}
	return nil
}

// dictionaries brings the texts and addresses into their stored form, see [Event.Normalize].
func (c *Columns) dictionaries() {
	c.OrgID, c.KeyID = c.texts[colOrgID], c.texts[colKeyID]
	c.Method, c.Route, c.Scope = c.texts[colMethod], c.texts[colRoute], c.texts[colScope]
	c.Decision, c.DenyReason = c.texts[colDecision], c.texts[colDenyReason]
	c.UserAgent, c.Gateway = c.texts[colUserAgent], c.texts[colGateway]
	for i := range c.Route {
		c.Method[i], c.Route[i], c.Scope[i] = cut(c.Method[i], maxMethod), cut(c.Route[i], MaxText), cut(c.Scope[i], MaxIdentifier)
	}
	for i := range c.Decision {
		c.Decision[i] = cmp.Or(c.Decision[i], Allow)
	}
	for i := range c.UserAgent {
		c.UserAgent[i], c.Gateway[i] = cut(c.UserAgent[i], MaxText), cut(c.Gateway[i], MaxIdentifier)
	}
	for ip := c.ip4; len(ip) > 0; ip = ip[4:] {
		c.SourceIP = append(c.SourceIP, netip.AddrFrom4([4]byte(ip)))
	}
	for ip := c.ip6; len(ip) > 0; ip = ip[16:] {
		c.SourceIP = append(c.SourceIP, netip.AddrFrom16([16]byte(ip)).Unmap())
	}
}

// unpackAll reads the columns with an entry for each event. A batch that ends early is
// refused as a whole, for its dead letter is the whole, and replaying that must double nothing.
func (c *Columns) unpackAll() error {
	c.Rows = int(c.count)
	if !unpack(c, colTime, c.Rows, &c.Time) {
		return endsEarly(colTime)
	}
	ns := int64(0)
	for i, step := range c.Time {
		ns += unzigzag(uint64(step))
		c.Time[i] = ns
	}
	for _, col := range []struct {
		field int
		to    *[]uint32
	}{
		{colCaller, &c.Caller},
		{colEndpoint, &c.Endpoint},
		{colOutcome, &c.Outcome},
		{colClient, &c.Client},
		{colSource, &c.Source},
		{colLatencyUS, &c.LatencyUS},
	} {
		if !unpack(c, col.field, c.Rows, col.to) {
			return endsEarly(col.field)
		}
	}
	if !unpack(c, colRequestBytes, c.Rows, &c.RequestBytes) {
		return endsEarly(colRequestBytes)
	}
	if !unpack(c, colResponseBytes, c.Rows, &c.ResponseBytes) {
		return endsEarly(colResponseBytes)
	}
	return nil
}

func endsEarly(field int) error { return fmt.Errorf("column %d ends early", field) }

type number interface {
	uint16 | uint32 | uint64 | int64
}

// unpack appends n numbers of a packed column to an empty slice, or nothing if the column is
// absent. What is too large for the type becomes its largest value. It is false if there are fewer.
func unpack[T number](c *Columns, field, n int, to *[]T) bool {
	if !c.present[field] {
		return true
	}
	data, out := c.packed[field], (*to)[:0]
	most := ^uint64(0)
	switch any(T(0)).(type) {
	case uint16:
		most = math.MaxUint16
	case uint32:
		most = math.MaxUint32
	}
	for range n {
		v, w := uvarint(data)
		if w == 0 {
			break
		}
		out, data = append(out, T(min(v, most))), data[w:]
	}
	*to = out
	return len(out) == n
}

// uvarint reads a number and says how many bytes it took, 0 if there is none. It is
// binary.Uvarint for numbers that are mostly of one to three bytes.
func uvarint(b []byte) (v uint64, n int) {
	if len(b) >= 3 {
		switch {
		case b[0] < 0x80:
			return uint64(b[0]), 1
		case b[1] < 0x80:
			return uint64(b[0]&0x7f) | uint64(b[1])<<7, 2
		case b[2] < 0x80:
			return uint64(b[0]&0x7f) | uint64(b[1]&0x7f)<<7 | uint64(b[2])<<14, 3
		}
	}
	v, n = binary.Uvarint(b)
	return v, max(n, 0)
}

// ids makes the texts of all UUIDs.
func (c *Columns) ids() {
	var id [16]byte
	if len(c.texts[colID]) > 0 || len(c.idBase) == 0 && len(c.uuid) == 0 {
		return
	}
	copy(id[:], c.idBase)
	width := 16 - len(c.idBase)
	low, high := binary.BigEndian.Uint64(id[8:]), binary.BigEndian.Uint64(id[:8])
	for n := range c.Rows {
		if width == 0 {
			sum := low + uint64(n)
			if binary.BigEndian.PutUint64(id[8:], sum); sum < low {
				binary.BigEndian.PutUint64(id[:8], high+1)
			}
		} else {
			copy(id[16-width:], c.uuid[width*n:])
		}
		c.uuids = appendUUID(c.uuids, &id)
	}
	c.IDs = string(c.uuids)
}

func appendUUID(b []byte, id *[16]byte) []byte {
	var text [IDLength]byte
	text[8], text[13], text[18], text[23] = '-', '-', '-', '-'
	for n, at := range uuidDigits {
		text[at], text[at+1] = hexDigit[id[n]>>4], hexDigit[id[n]&15]
	}
	return append(b, text[:]...)
}

const hexDigit = "0123456789abcdef"

// ID is the id of event n of columns that [Decoder.Columns] returned.
func (c *Columns) ID(n int) string { return c.IDs[n*IDLength : (n+1)*IDLength] }

// Key is the id of the key of event n of columns that [Decoder.Columns] returned.
func (c *Columns) Key(n int) string { return c.KeyID[at(c.Caller, n)] }

// Event makes event n of what the columns say. The error is about what no event can be without.
func (c *Columns) Event(n int, ev *Event) (err error) {
	*ev = Event{
		Time: time.Unix(0, c.Time[n]).UTC(), LatencyUS: at(c.LatencyUS, n),
		RequestBytes: at(c.RequestBytes, n), ResponseBytes: at(c.ResponseBytes, n),
	}
	switch {
	case c.IDs != "":
		ev.ID = c.ID(n)
	case len(c.texts[colID]) > 0:
		ev.ID = c.texts[colID][n]
	}
	if i := int(at(c.Caller, n)); i < len(c.OrgID) {
		ev.OrgID, ev.KeyID = c.OrgID[i], c.KeyID[i]
	}
	if i := int(at(c.Endpoint, n)); i < len(c.Route) {
		ev.Method, ev.Route, ev.Scope = c.Method[i], c.Route[i], c.Scope[i]
	}
	if i := int(at(c.Outcome, n)); i < len(c.Decision) {
		ev.Decision, ev.DenyReason, ev.Status = c.Decision[i], c.DenyReason[i], c.Status[i]
		if ev.Status > maxStatus {
			err = fmt.Errorf("status %d is no HTTP status", ev.Status)
		}
	} else {
		err = fmt.Errorf("outcome %d is not in the dictionary", i)
	}
	if i := int(at(c.Client, n)); i < len(c.UserAgent) {
		ev.UserAgent, ev.Gateway = c.UserAgent[i], c.Gateway[i]
	} else {
		err = join(err, fmt.Errorf("client %d is not in the dictionary", i))
	}
	if i := int(at(c.Source, n)); i < len(c.SourceIP) {
		ev.SourceIP = c.SourceIP[i]
	}
	return err
}

// at is entry n of a column, of which an empty one is all zeros.
func at[T number](column []T, n int) T {
	if len(column) == 0 {
		return 0
	}
	return column[n]
}
