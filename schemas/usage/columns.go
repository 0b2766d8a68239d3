package usage

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/netip"
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

// column is a packed column of numbers that is read from front to back; an
// absent one is all zeros.
type column struct {
	data    []byte
	present bool
}

// next is the next number; [column.holds] tells how many there are.
func (c *column) next() uint64 {
	if !c.present {
		return 0
	}
	if c.data[0] < 0x80 {
		v := uint64(c.data[0])
		c.data = c.data[1:]
		return v
	}
	v, w := binary.Uvarint(c.data)
	c.data = c.data[w:]
	return v
}

// holds tells whether n numbers can be read: a batch that ends early is refused as
// a whole, for its dead letter is the whole, and replaying that must double nothing.
func (c *column) holds(n uint64) bool {
	if !c.present {
		return true
	}
	for i, width := 0, 0; n > 0; i++ {
		if width++; i == len(c.data) || width > binary.MaxVarintLen64 {
			return false
		}
		if b := c.data[i]; b < 0x80 {
			if width == binary.MaxVarintLen64 && b > 1 {
				return false // more than 64 bits
			}
			width = 0
			n--
		}
	}
	return true
}

func unzigzag(n uint64) int64 { return int64(n>>1) ^ -int64(n&1) }
func zigzag(n int64) uint64   { return uint64(n<<1) ^ uint64(n>>63) }

// columns is one UsageColumns while it is read; its slices are reused.
type columns struct {
	version, count uint64
	numbers        [colEnd]column
	texts          [colEnd][]string
	status         []uint16
	idBase, uuid   []byte
	ip4, ip6       []byte
	uuids          []byte
}

// columnar reads a UsageColumns whose first event has index i, and returns the
// index behind its last.
func (d *Decoder) columnar(i int, data []byte, fn func(int, *Event, error)) int {
	c := &d.columns
	c.reset()
	if err := c.read(&d.texts, data); err != nil {
		fn(i, nil, fmt.Errorf("columns: %w; none of the batch can be read", err))
		return i + 1
	}
	ids := c.ids()
	ns := int64(0)
	for n := range int(c.count) {
		ns += unzigzag(c.numbers[colTime].next())
		err := d.row(c, n, ns, ids)
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
	return i + int(c.count)
}

func (c *columns) reset() {
	c.version, c.count = 0, 0
	c.numbers = [colEnd]column{}
	for i := range c.texts {
		c.texts[i] = c.texts[i][:0]
	}
	c.status = c.status[:0]
	c.idBase, c.uuid, c.ip4, c.ip6 = nil, nil, nil, nil
}

// fieldOfText is the event's field that a dictionary is of, for interning.
var fieldOfText = [colEnd]int{
	colOrgID: fieldOrgID, colKeyID: fieldKeyID, colMethod: fieldMethod, colRoute: fieldRoute, colScope: fieldScope,
	colDecision: fieldDecision, colDenyReason: fieldDenyReason, colUserAgent: fieldUserAgent, colGateway: fieldGateway,
}

func (c *columns) read(texts *interner, data []byte) error {
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
		case c.numbers[field].present:
			return fmt.Errorf("column %d is given twice", field)
		default:
			c.numbers[field] = column{value, true}
		}
	}
	return c.check()
}

// check looks at what every row depends on.
func (c *columns) check() error {
	switch {
	case c.version != columnsVersion:
		return fmt.Errorf("version %d is not known, only %d", c.version, columnsVersion)
	case c.count > uint64(len(c.numbers[colTime].data)):
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
	for _, col := range [...]int{
		colTime, colCaller, colEndpoint, colOutcome, colClient, colSource, colLatencyUS, colRequestBytes, colResponseBytes,
	} {
		if !c.numbers[col].holds(c.count) {
			return fmt.Errorf("column %d ends early", col)
		}
	}
	return c.readStatuses()
}

// readStatuses reads the statuses of the outcomes, one for each decision.
func (c *columns) readStatuses() error {
	col := c.numbers[colStatus]
	if !col.holds(uint64(len(c.texts[colDecision]))) {
		return errors.New("there are fewer statuses than decisions")
	}
	for range c.texts[colDecision] {
		c.status = append(c.status, uint16(min(col.next(), math.MaxUint16)))
	}
	return nil
}

// ids is the text of all UUIDs, 36 bytes each, in one string.
func (c *columns) ids() string {
	var id [16]byte
	if len(c.texts[colID]) > 0 || len(c.idBase) == 0 && len(c.uuid) == 0 {
		return ""
	}
	copy(id[:], c.idBase)
	width := 16 - len(c.idBase)
	c.uuids = c.uuids[:0]
	low, high := binary.BigEndian.Uint64(id[8:]), binary.BigEndian.Uint64(id[:8])
	for n := range int(c.count) {
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
	return string(c.uuids)
}

const uuidLength = 36

func appendUUID(b []byte, id *[16]byte) []byte {
	b = append(hex.AppendEncode(b, id[0:4]), '-')
	b = append(hex.AppendEncode(b, id[4:6]), '-')
	b = append(hex.AppendEncode(b, id[6:8]), '-')
	b = append(hex.AppendEncode(b, id[8:10]), '-')
	return hex.AppendEncode(b, id[10:16])
}

// row puts row n into d.ev, and says what is wrong with it.
func (d *Decoder) row(c *columns, n int, ns int64, ids string) (err error) {
	ev := &d.ev
	*ev = Event{Time: time.Unix(0, ns).UTC()}
	switch {
	case ids != "":
		ev.ID = ids[n*uuidLength : (n+1)*uuidLength]
	case len(c.texts[colID]) > 0:
		ev.ID = c.texts[colID][n]
	}
	var at [8]uint64
	for k, col := range [8]int{colCaller, colEndpoint, colOutcome, colClient, colSource, colLatencyUS, colRequestBytes, colResponseBytes} {
		at[k] = c.numbers[col].next()
	}
	if i := at[0]; i < uint64(len(c.texts[colOrgID])) {
		ev.OrgID, ev.KeyID = c.texts[colOrgID][i], c.texts[colKeyID][i]
	}
	if i := at[1]; i < uint64(len(c.texts[colRoute])) {
		ev.Method, ev.Route, ev.Scope = c.texts[colMethod][i], c.texts[colRoute][i], c.texts[colScope][i]
	}
	if i := at[2]; i < uint64(len(c.texts[colDecision])) {
		ev.Decision, ev.DenyReason, ev.Status = c.texts[colDecision][i], c.texts[colDenyReason][i], c.status[i]
		if ev.Status > maxStatus {
			err = fmt.Errorf("status %d is no HTTP status", ev.Status)
		}
	} else if at[2] > 0 {
		err = fmt.Errorf("outcome %d is not in the dictionary", at[2])
	}
	if i := at[3]; i < uint64(len(c.texts[colUserAgent])) {
		ev.UserAgent, ev.Gateway = c.texts[colUserAgent][i], c.texts[colGateway][i]
	} else if i > 0 {
		err = join(err, fmt.Errorf("client %d is not in the dictionary", i))
	}
	ev.SourceIP = c.address(at[4])
	ev.LatencyUS = uint32(min(at[5], math.MaxUint32))
	ev.RequestBytes, ev.ResponseBytes = at[6], at[7]
	return err
}

// address is source i: first those of ip4, then those of ip6; the zero address,
// which no event may have, if there is none.
func (c *columns) address(i uint64) netip.Addr {
	n4 := uint64(len(c.ip4) / 4)
	if i < n4 {
		return netip.AddrFrom4([4]byte(c.ip4[4*i:]))
	}
	if i -= n4; i < uint64(len(c.ip6)/16) {
		return netip.AddrFrom16([16]byte(c.ip6[16*i:]))
	}
	return netip.Addr{}
}
