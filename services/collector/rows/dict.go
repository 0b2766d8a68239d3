package rows

import (
	"encoding/binary"
	"unsafe"

	"github.com/ClickHouse/ch-go/proto"
)

// dict is a LowCardinality(String) column. ch-go's own looks every value up in a
// map twice; here a value that is the same string as the one before, or one that
// an interning decoder handed out before, costs a comparison of pointers.
type dict struct {
	index proto.ColStr
	known map[string]uint32
	keys  []uint32
	last  string
	at    uint32
}

func (d *dict) add(s string) { d.keys = append(d.keys, d.key(s)) }

func (d *dict) key(s string) uint32 {
	if len(s) != len(d.last) || unsafe.StringData(s) != unsafe.StringData(d.last) || len(d.known) == 0 {
		d.look(s)
	}
	return d.at
}

// column adds rows from another dictionary: index says which of its words, translated
// into keys, and is all zeros if it is empty.
func (d *dict) column(keys, index []uint32, rows int) {
	if len(index) == 0 {
		d.keys = fill(d.keys, keys[0], rows)
		return
	}
	for _, i := range index {
		d.keys = append(d.keys, keys[i])
	}
}

func (d *dict) look(s string) {
	at, ok := d.known[s]
	if !ok {
		if d.known == nil {
			d.known = make(map[string]uint32, 64)
		}
		at = uint32(len(d.known))
		d.known[s] = at
		d.index.Append(s)
	}
	d.last, d.at = s, at
}

func (d *dict) reset() {
	clear(d.known)
	d.index.Reset()
	d.keys = d.keys[:0]
	d.last, d.at = "", 0
}

// Of the format of LowCardinality: the version of the keys, and flags that say
// that the dictionary comes along and is this block's own.
const (
	lowCardinalityVersion = 1
	lowCardinalityFlags   = 1<<9 | 1<<10
)

func (d *dict) Type() proto.ColumnType { return "LowCardinality(String)" }
func (d *dict) Rows() int              { return len(d.keys) }

// EncodeState is called before the column.
func (d *dict) EncodeState(b *proto.Buffer) { b.PutInt64(lowCardinalityVersion) }

// WriteColumn writes through a buffer, since the parts are small.
func (d *dict) WriteColumn(w *proto.Writer) { w.ChainBuffer(d.EncodeColumn) }

// EncodeColumn writes the dictionary and the keys in the smallest type.
func (d *dict) EncodeColumn(b *proto.Buffer) {
	width := 2
	switch n := d.index.Rows(); {
	case n <= 1<<8:
		width = 0
	case n <= 1<<16:
		width = 1
	}
	b.PutInt64(int64(lowCardinalityFlags | width))
	b.PutInt64(int64(d.index.Rows()))
	d.index.EncodeColumn(b)
	b.PutInt64(int64(len(d.keys)))
	switch width {
	case 0:
		for _, k := range d.keys {
			b.Buf = append(b.Buf, byte(k))
		}
	case 1:
		for _, k := range d.keys {
			b.Buf = binary.LittleEndian.AppendUint16(b.Buf, uint16(k))
		}
	default:
		for _, k := range d.keys {
			b.Buf = binary.LittleEndian.AppendUint32(b.Buf, k)
		}
	}
}

// row is the value of a row.
func (d *dict) row(i int) string { return d.index.Row(int(d.keys[i])) }
