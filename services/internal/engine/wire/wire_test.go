package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
)

// block is a small block in revision 0 with a column of every shape.
func block() []byte {
	var b []byte
	column := func(name, typ string, data ...byte) {
		b = AppendString(b, name)
		b = AppendString(b, typ)
		b = append(b, data...)
	}
	u64 := func(ns ...uint64) (out []byte) {
		for _, n := range ns {
			out = binary.LittleEndian.AppendUint64(out, n)
		}
		return out
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	b = append(b, 7, 2) // columns, rows
	column("n", "UInt16", 1, 0, 2, 0)
	column("s", "String", 1, 'a', 0)
	column("a", "Array(Nullable(String))", join(u64(1, 2), []byte{0, 1}, []byte{1, 'x', 0})...)
	column("l", "LowCardinality(String)", join(u64(1, 1<<9|1<<10, 2), []byte{0, 1, 'k'}, u64(2), []byte{1, 0})...)
	column("m", "Map(String, UInt8)", join(u64(1, 1), []byte{1, 'k'}, []byte{9})...)
	column("t", "Tuple(a UInt8, `b c` FixedString(2))", 1, 2, 'w', 'x', 'y', 'z')
	column("e", "Enum8('a,b(' = 1, 'it\\'s' = 2)", 1, 2)
	return b
}

func TestBlocksPassThroughUnchanged(t *testing.T) {
	t.Parallel()
	for _, revision := range []int{0, 54453, 54460} {
		framed, rest, head, err := AppendBlock(nil, append(block(), "next"...), revision)
		if err != nil || string(rest) != "next" || head.Rows != 2 || len(head.Columns) != 7 {
			t.Fatalf("revision %d: rest %q, head %+v, %v", revision, rest, head, err)
		}
		var out bytes.Buffer
		w := bufio.NewWriter(&out)
		r := NewReader(bytes.NewReader(framed))
		if _, err := r.CopyBlock(w, revision); err != nil {
			t.Fatalf("revision %d: %v", revision, err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), block()) {
			t.Errorf("revision %d: block came back changed", revision)
		}
		if _, err := r.Peek(); !errors.Is(err, io.EOF) {
			t.Errorf("revision %d: bytes are left", revision)
		}
	}
}

func TestTypes(t *testing.T) {
	t.Parallel()
	for name, ok := range map[string]bool{
		"UInt64": true, "DateTime64(9, 'Europe/Berlin')": true, "Decimal(38, 10)": true, "Nested(a UInt8, b String)": true,
		"Map(String, Array(Tuple(x Float64, y LowCardinality(Nullable(String)))))": true, "MultiPolygon": true,
		"SimpleAggregateFunction(groupUniqArrayArray, Array(String))": true, "IntervalDay": true, "JSON(max_dynamic_paths=8)": true,
		"Tuple()": true, "Enum8('x' = 1)": true, "FixedString(16)": true,
		"AggregateFunction(uniq, IPv6)": false, "Dynamic": false, "Variant(String, UInt8)": false, "": false, "Array(": false, "Array()": false,
		"FixedString(x)": false, "FixedString(0)": false, "LowCardinality(Array(String))": false, "Map(String)": false, "Decimal(99, 1)": false,
		strings.Repeat("Array(", 200) + "UInt8" + strings.Repeat(")", 200): false,
	} {
		if _, err := parseType(name); (err == nil) != ok {
			t.Errorf("%.60s: %v", name, err)
		}
	}
}

// A peer that names huge lengths and sends nothing costs no memory.
func TestHostileLengths(t *testing.T) {
	t.Parallel()
	column := func(typ string, data ...byte) []byte {
		b := []byte{1}
		b = binary.AppendUvarint(b, 1<<32)
		b = AppendString(b, "c")
		b = AppendString(b, typ)
		return append(b, data...)
	}
	huge := bytes.Repeat([]byte{0xff}, 9)
	inputs := map[string][]byte{
		"columns":     append(huge, 1),
		"rows":        append([]byte{1}, append(huge, 1)...),
		"name":        append([]byte{1, 1}, append(huge, 1)...),
		"fixed":       column("FixedString(16000000)"),
		"string":      column("String", append(huge, 1)...),
		"array":       column("Array(UInt8)", bytes.Repeat([]byte{0xff}, 64)...),
		"empty tuple": column("Array(Tuple())", bytes.Repeat([]byte{0xff}, 64)...),
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for name, input := range inputs {
		if _, err := NewReader(bytes.NewReader(input)).CopyBlock(bufio.NewWriter(io.Discard), 0); err == nil {
			t.Errorf("%s: no error", name)
		}
		if _, _, _, err := AppendBlock(nil, input, 54460); err == nil {
			t.Errorf("%s in memory: no error", name)
		}
	}
	if _, err := NewReader(bytes.NewReader(append(huge, 1))).String(1 << 30); !errors.Is(err, ErrTooLong) {
		t.Errorf("string: %v", err)
	}
	if _, err := NewReader(bytes.NewReader(binary.AppendUvarint(nil, 1<<29))).String(1 << 30); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("string that does not come: %v", err)
	}
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > 64<<20 {
		t.Errorf("hostile lengths cost %d MB", took>>20)
	}
}

func FuzzCopyBlock(f *testing.F) {
	for _, revision := range []int{0, 54453, 54460} {
		framed, _, _, _ := AppendBlock(nil, block(), revision)
		f.Add(framed, revision)
	}
	f.Add([]byte{1, 0, 2, 0xff, 0xff, 0xff, 0xff, 0, 0, 0}, 54460)
	f.Fuzz(func(t *testing.T, input []byte, revision int) {
		var out bytes.Buffer
		w := bufio.NewWriter(&out)
		head, err := NewReader(bytes.NewReader(input)).CopyBlock(w, revision)
		_ = w.Flush()
		if out.Len() > len(input)+1024 {
			t.Errorf("%d bytes became %d", len(input), out.Len())
		}
		if err != nil || head.Rows == 0 {
			return
		}
		// What was read must be readable again, with the same columns.
		_, rest, again, err := AppendBlock(nil, out.Bytes(), 0)
		if err != nil || len(rest) != 0 || again.Rows != head.Rows || len(again.Columns) != len(head.Columns) {
			t.Errorf("copied block reads as %+v with %d bytes left, %v; was %+v", again, len(rest), err, head)
		}
	})
}
