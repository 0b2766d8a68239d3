package wire

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// source is what a column's bytes are walked over in: a stream that is copied,
// or a slice.
type source interface {
	// skip passes n bytes.
	skip(n uint64) error
	// u64 passes a little-endian number and returns it.
	u64() (uint64, error)
	// strings passes so many strings with their lengths.
	strings(rows uint64) error
}

type kind int

const (
	fixed kind = iota // size bytes a row
	stringKind
	array // also Map: its element is a Tuple
	nullable
	lowCardinality
	tuple
	jsonText
)

// columnType is what must be known of a type to find the end of its column.
type columnType struct {
	kind kind
	size uint64
	args []*columnType
}

// walk passes a column of rows > 0 rows: first the state of every nested
// column, then the data.
func (t *columnType) walk(s source, rows uint64) error {
	if err := t.walkState(s); err != nil {
		return err
	}
	return t.walkData(s, rows)
}

func (t *columnType) walkState(s source) error {
	if t.kind == lowCardinality || t.kind == jsonText {
		version, err := s.u64()
		if err != nil {
			return err
		}
		if version != 1 { // shared dictionaries; or JSON as text
			return fmt.Errorf("serialization version %d is not supported here", version)
		}
		return nil
	}
	for _, arg := range t.args {
		if err := arg.walkState(s); err != nil {
			return err
		}
	}
	return nil
}

func (t *columnType) walkData(s source, rows uint64) error {
	if rows > maxRows {
		return ErrTooLong
	}
	switch t.kind {
	case fixed:
		return s.skip(t.size * rows)
	case stringKind, jsonText:
		return s.strings(rows)
	case nullable:
		if err := s.skip(rows); err != nil {
			return err
		}
		return t.args[0].walkData(s, rows)
	case array:
		if rows == 0 {
			return nil
		}
		if err := s.skip(8 * (rows - 1)); err != nil {
			return err
		}
		elements, err := s.u64() // offsets are cumulative: the last is the count
		if err != nil {
			return err
		}
		return t.args[0].walkData(s, elements)
	case lowCardinality:
		return t.walkLowCardinality(s, rows)
	default: // tuple
		for _, arg := range t.args {
			if err := arg.walkData(s, rows); err != nil {
				return err
			}
		}
		return nil
	}
}

// walkLowCardinality passes flags, the dictionary and the indexes, which may
// come in several groups (SerializationLowCardinality.cpp).
func (t *columnType) walkLowCardinality(s source, rows uint64) error {
	for rows > 0 {
		flags, err := s.u64()
		if err != nil {
			return err
		}
		if flags&(1<<8) != 0 {
			return errors.New("a shared LowCardinality dictionary is not supported here")
		}
		if flags&(1<<9) != 0 {
			keys, err := s.u64()
			if err != nil {
				return err
			}
			if err := t.args[0].walkData(s, keys); err != nil {
				return err
			}
		}
		group, err := s.u64()
		if err != nil {
			return err
		}
		if group == 0 || group > rows || flags&0xff > 3 {
			return errors.New("LowCardinality column is malformed")
		}
		if err := s.skip(group << (flags & 0xff)); err != nil {
			return err
		}
		rows -= group
	}
	return nil
}

var fixedSizes = map[string]uint64{
	"Int8": 1, "UInt8": 1, "Bool": 1, "Enum8": 1, "Nothing": 1,
	"Int16": 2, "UInt16": 2, "Enum16": 2, "Date": 2, "BFloat16": 2,
	"Int32": 4, "UInt32": 4, "Float32": 4, "Date32": 4, "DateTime": 4, "DateTime32": 4, "Time": 4, "IPv4": 4, "Decimal32": 4,
	"Int64": 8, "UInt64": 8, "Float64": 8, "DateTime64": 8, "Time64": 8, "Decimal64": 8,
	"Int128": 16, "UInt128": 16, "UUID": 16, "IPv6": 16, "Decimal128": 16,
	"Int256": 32, "UInt256": 32, "Decimal256": 32,
}

// aliases are types that are stored as others.
var aliases = map[string]string{
	"Point": "Tuple(Float64,Float64)", "Ring": "Array(Point)", "LineString": "Array(Point)",
	"Polygon": "Array(Ring)", "MultiLineString": "Array(LineString)", "MultiPolygon": "Array(Polygon)",
}

const (
	maxTypeDepth  = 32
	maxTypeLength = 1 << 16
)

// UnsupportedTypeError says that the server around the engine cannot pass a type on.
type UnsupportedTypeError struct{ Type string }

func (e *UnsupportedTypeError) Error() string {
	return fmt.Sprintf("type %s cannot be sent in blocks by the embedded engine; convert it in the query "+
		"(toString(…), finalizeAggregation(…), a -Merge function) or use a text format over HTTP", e.Type)
}

func parseType(name string) (*columnType, error) {
	if len(name) > maxTypeLength {
		return nil, ErrTooLong
	}
	return parseTypeAt(name, 0)
}

func parseTypeAt(name string, depth int) (*columnType, error) {
	if depth > maxTypeDepth {
		return nil, ErrTooLong
	}
	name = strings.TrimSpace(name)
	base, inner, hasArgs := strings.Cut(name, "(")
	base = strings.TrimSpace(base)
	if hasArgs {
		if !strings.HasSuffix(inner, ")") {
			return nil, &UnsupportedTypeError{name}
		}
		inner = inner[:len(inner)-1]
	}
	if size, ok := fixedSizes[base]; ok {
		return &columnType{kind: fixed, size: size}, nil
	}
	if strings.HasPrefix(base, "Interval") {
		return &columnType{kind: fixed, size: 8}, nil
	}
	if of, ok := aliases[base]; ok {
		return parseTypeAt(of, depth+1)
	}
	args := splitArgs(inner)
	switch base {
	case "String":
		return &columnType{kind: stringKind}, nil
	case "FixedString":
		n, err := strconv.ParseUint(inner, 10, 24)
		if err != nil || n == 0 {
			return nil, &UnsupportedTypeError{name}
		}
		return &columnType{kind: fixed, size: n}, nil
	case "Decimal":
		return decimal(name, args)
	case "JSON", "Object":
		return &columnType{kind: jsonText}, nil
	case "Array", "Nullable", "LowCardinality":
		return parseNested(name, base, args, depth)
	case "Map":
		return parseMap(name, args, depth)
	case "Tuple":
		return parseTuple(args, depth)
	case "Nested":
		t, err := parseTuple(args, depth)
		return &columnType{kind: array, args: []*columnType{t}}, err
	case "SimpleAggregateFunction":
		if len(args) < 2 {
			return nil, &UnsupportedTypeError{name}
		}
		return parseTypeAt(args[1], depth+1)
	}
	return nil, &UnsupportedTypeError{name}
}

func decimal(name string, args []string) (*columnType, error) {
	if len(args) == 0 {
		return nil, &UnsupportedTypeError{name}
	}
	precision, err := strconv.Atoi(strings.TrimSpace(args[0]))
	t := &columnType{kind: fixed}
	switch {
	case err != nil || precision < 1 || precision > 76:
		return nil, &UnsupportedTypeError{name}
	case precision <= 9:
		t.size = 4
	case precision <= 18:
		t.size = 8
	case precision <= 38:
		t.size = 16
	default:
		t.size = 32
	}
	return t, nil
}

func parseNested(name, base string, args []string, depth int) (*columnType, error) {
	if len(args) != 1 {
		return nil, &UnsupportedTypeError{name}
	}
	of, err := parseTypeAt(args[0], depth+1)
	if err != nil {
		return nil, err
	}
	switch base {
	case "Array":
		return &columnType{kind: array, args: []*columnType{of}}, nil
	case "Nullable":
		return &columnType{kind: nullable, args: []*columnType{of}}, nil
	}
	if of.kind == nullable { // the dictionary's first key stands for NULL, there is no map
		of = of.args[0]
	}
	if of.kind != fixed && of.kind != stringKind {
		return nil, &UnsupportedTypeError{name}
	}
	return &columnType{kind: lowCardinality, args: []*columnType{of}}, nil
}

func parseMap(name string, args []string, depth int) (*columnType, error) {
	if len(args) != 2 {
		return nil, &UnsupportedTypeError{name}
	}
	t, err := parseTuple(args, depth)
	return &columnType{kind: array, args: []*columnType{t}}, err
}

// parseTuple takes elements with and without names: "UInt8" and "a UInt8".
func parseTuple(args []string, depth int) (*columnType, error) {
	t := &columnType{kind: tuple}
	for _, arg := range args {
		of, err := parseTypeAt(elementType(arg), depth+1)
		if err != nil {
			return nil, err
		}
		t.args = append(t.args, of)
	}
	return t, nil
}

func elementType(arg string) string {
	arg = strings.TrimSpace(arg)
	if strings.HasPrefix(arg, "`") {
		if i := strings.LastIndex(arg, "` "); i > 0 {
			return arg[i+2:]
		}
		return arg
	}
	name, rest, ok := strings.Cut(arg, " ")
	if ok && !strings.ContainsAny(name, "(,'") {
		return rest
	}
	return arg
}

// splitArgs splits at the commas of the outermost level; quotes may hold anything.
func splitArgs(inner string) []string {
	if strings.TrimSpace(inner) == "" {
		return nil
	}
	var args []string
	depth, from := 0, 0
	for i := 0; i < len(inner); i++ {
		switch c := inner[i]; c {
		case '(':
			depth++
		case ')':
			depth--
		case '\'', '`':
			for i++; i < len(inner) && inner[i] != c; i++ {
				if inner[i] == '\\' {
					i++
				}
			}
		case ',':
			if depth == 0 {
				args = append(args, inner[from:i])
				from = i + 1
			}
		}
	}
	return append(args, inner[from:])
}
