// Package wire reads and writes ClickHouse's native format and the primitives
// of its TCP protocol. Blocks pass through without being decoded: the engine
// speaks the format's revision 0, clients speak later ones, and the difference
// is a few bytes around each column. Lengths that a peer names never decide
// how much memory is taken.
package wire

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/ClickHouse/ch-go/compress"
)

// Revisions of the protocol that matter here.
const (
	RevisionBlockInfo           = 51903
	RevisionCustomSerialization = 54454
)

const (
	maxColumns = 100_000
	maxRows    = 1 << 33
	maxName    = 1 << 20
	bufferSize = 1 << 16
)

// ErrTooLong says that a peer named a length beyond the limit.
var ErrTooLong = errors.New("length is beyond the limit")

// Reader reads from a peer, compressed parts included.
type Reader struct {
	raw        *bufio.Reader
	compressed *bufio.Reader
	current    *bufio.Reader
}

// NewReader reads from r.
func NewReader(r io.Reader) *Reader {
	raw := bufio.NewReaderSize(r, bufferSize)
	return &Reader{raw: raw, current: raw}
}

// SetCompressed makes the next reads come from ClickHouse's compressed frames,
// or no longer.
func (r *Reader) SetCompressed(on bool) {
	r.current = r.raw
	if on {
		if r.compressed == nil {
			r.compressed = bufio.NewReaderSize(Decompress(r.raw), bufferSize)
		}
		r.current = r.compressed
	}
}

// Peek waits for one byte without taking it.
func (r *Reader) Peek() (byte, error) {
	b, err := r.raw.Peek(1)
	if err != nil {
		return 0, err
	}
	return b[0], nil
}

// Byte reads one byte.
func (r *Reader) Byte() (byte, error) { return r.current.ReadByte() }

// Uvarint reads a number of variable length.
func (r *Reader) Uvarint() (uint64, error) { return binary.ReadUvarint(r.current) }

// String reads a string of at most limit bytes.
func (r *Reader) String(limit int) (string, error) {
	n, err := r.Uvarint()
	if err != nil {
		return "", err
	}
	if n > uint64(limit) {
		return "", fmt.Errorf("string of %d bytes: %w", n, ErrTooLong)
	}
	if n <= bufferSize {
		b := make([]byte, n)
		_, err = io.ReadFull(r.current, b)
		return string(b), noEOF(err)
	}
	b, err := io.ReadAll(io.LimitReader(r.current, int64(n))) // grows with what really comes
	if err == nil && uint64(len(b)) < n {
		err = io.ErrUnexpectedEOF
	}
	return string(b), err
}

// Skip passes over n bytes.
func (r *Reader) Skip(n int) error {
	_, err := r.current.Discard(n)
	return noEOF(err)
}

// noEOF tells an end amid something from an end between two things.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Column is a column's name and ClickHouse type.
type Column struct{ Name, Type string }

// BlockHead describes a block.
type BlockHead struct {
	Columns []Column
	Rows    uint64
}

// CopyBlock reads one block of the given protocol revision and writes it in
// revision 0. A block without rows is read and not written.
func (r *Reader) CopyBlock(w *bufio.Writer, revision int) (BlockHead, error) {
	if revision >= RevisionBlockInfo {
		if err := r.skipBlockInfo(); err != nil {
			return BlockHead{}, fmt.Errorf("read block info: %w", err)
		}
	}
	var head BlockHead
	columns, err := r.Uvarint()
	if err != nil {
		return head, fmt.Errorf("read number of columns: %w", err)
	}
	if head.Rows, err = r.Uvarint(); err != nil {
		return head, fmt.Errorf("read number of rows: %w", noEOF(err))
	}
	if columns > maxColumns || head.Rows > maxRows {
		return head, fmt.Errorf("block of %d columns and %d rows: %w", columns, head.Rows, ErrTooLong)
	}
	through := &copier{r: r.current, w: w}
	if head.Rows > 0 {
		through.putUvarint(columns)
		through.putUvarint(head.Rows)
	}
	for range columns {
		c, err := r.copyColumn(through, head.Rows, revision)
		if err != nil {
			return head, fmt.Errorf("read column %q of type %q: %w", c.Name, c.Type, noEOF(err))
		}
		head.Columns = append(head.Columns, c)
	}
	return head, through.err
}

func (r *Reader) skipBlockInfo() error {
	for {
		field, err := r.Uvarint()
		if err != nil {
			return err
		}
		switch field {
		case 0:
			return nil
		case 1: // is_overflows
			err = r.Skip(1)
		case 2: // bucket_num
			err = r.Skip(4)
		default:
			err = fmt.Errorf("unknown field %d", field)
		}
		if err != nil {
			return err
		}
	}
}

func (r *Reader) copyColumn(through *copier, rows uint64, revision int) (c Column, err error) {
	if c.Name, err = r.String(maxName); err != nil {
		return c, err
	}
	if c.Type, err = r.String(maxName); err != nil {
		return c, err
	}
	if revision >= RevisionCustomSerialization {
		custom, err := r.Byte()
		if err != nil {
			return c, err
		}
		if custom != 0 {
			return c, errors.New("custom serialization is not supported here")
		}
	}
	if rows == 0 {
		return c, nil
	}
	t, err := parseType(c.Type)
	if err != nil {
		return c, err
	}
	through.putString(c.Name)
	through.putString(c.Type)
	return c, t.walk(through, rows)
}

// copier writes what it reads; errors of the writer stick in it.
type copier struct {
	r   *bufio.Reader
	w   *bufio.Writer
	err error
}

func (c *copier) write(b []byte) {
	if _, err := c.w.Write(b); err != nil && c.err == nil {
		c.err = fmt.Errorf("write block: %w", err)
	}
}

func (c *copier) putUvarint(n uint64) {
	var b [binary.MaxVarintLen64]byte
	c.write(b[:binary.PutUvarint(b[:], n)])
}

func (c *copier) putString(s string) {
	c.putUvarint(uint64(len(s)))
	c.write([]byte(s))
}

// window waits for bytes and returns what is buffered.
func (c *copier) window() ([]byte, error) {
	if c.r.Buffered() == 0 {
		if _, err := c.r.Peek(1); err != nil {
			return nil, err
		}
	}
	return c.r.Peek(c.r.Buffered())
}

func (c *copier) take(b []byte) {
	c.write(b)
	_, _ = c.r.Discard(len(b))
}

func (c *copier) skip(n uint64) error {
	for n > 0 && c.err == nil {
		b, err := c.window()
		if err != nil {
			return err
		}
		b = b[:min(n, uint64(len(b)))]
		n -= uint64(len(b))
		c.take(b)
	}
	return c.err
}

func (c *copier) u64() (uint64, error) {
	var b [8]byte
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		return 0, err
	}
	c.write(b[:])
	return binary.LittleEndian.Uint64(b[:]), c.err
}

func (c *copier) strings(rows uint64) error {
	for rows > 0 && c.err == nil {
		b, err := c.window()
		if err != nil {
			return err
		}
		n, whole := wholeStrings(b, rows)
		c.take(b[:n])
		if rows -= whole; rows == 0 {
			break
		}
		// The next string reaches beyond the window.
		length, err := binary.ReadUvarint(c.r)
		if err != nil {
			return err
		}
		c.putUvarint(length)
		if err := c.skip(length); err != nil {
			return err
		}
		rows--
	}
	return c.err
}

// wholeStrings counts how many of at most rows length-prefixed strings lie
// complete in b, and their bytes.
func wholeStrings(b []byte, rows uint64) (n int, whole uint64) {
	for whole < rows {
		length, k := binary.Uvarint(b[n:])
		if k <= 0 || length > uint64(len(b)-n-k) {
			break
		}
		n += k + int(length)
		whole++
	}
	return n, whole
}

// slice walks over bytes in memory.
type slice struct {
	b  []byte
	at int
}

func (s *slice) skip(n uint64) error {
	if n > uint64(len(s.b)-s.at) {
		return io.ErrUnexpectedEOF
	}
	s.at += int(n)
	return nil
}

func (s *slice) u64() (uint64, error) {
	if len(s.b)-s.at < 8 {
		return 0, io.ErrUnexpectedEOF
	}
	s.at += 8
	return binary.LittleEndian.Uint64(s.b[s.at-8:]), nil
}

func (s *slice) strings(rows uint64) error {
	n, whole := wholeStrings(s.b[s.at:], rows)
	s.at += n
	if whole < rows {
		return io.ErrUnexpectedEOF
	}
	return nil
}

func (s *slice) uvarint() (uint64, error) {
	v, k := binary.Uvarint(s.b[s.at:])
	if k <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	s.at += k
	return v, nil
}

func (s *slice) string() (string, error) {
	n, err := s.uvarint()
	if err != nil {
		return "", err
	}
	from := s.at
	if err := s.skip(n); err != nil {
		return "", err
	}
	return string(s.b[from:s.at]), nil
}

// AppendBlock takes one revision 0 block from the front of native and appends
// it in the given revision. It returns what follows the block.
func AppendBlock(dst, native []byte, revision int) (out, rest []byte, head BlockHead, err error) {
	s := &slice{b: native}
	columns, err := s.uvarint()
	if err != nil {
		return dst, native, head, err
	}
	if head.Rows, err = s.uvarint(); err != nil {
		return dst, native, head, err
	}
	if columns > maxColumns || head.Rows > maxRows {
		return dst, native, head, ErrTooLong
	}
	dst = appendBlockInfo(dst, revision)
	dst = binary.AppendUvarint(dst, columns)
	dst = binary.AppendUvarint(dst, head.Rows)
	for range columns {
		var c Column
		if c.Name, err = s.string(); err != nil {
			return dst, native, head, err
		}
		if c.Type, err = s.string(); err != nil {
			return dst, native, head, err
		}
		head.Columns = append(head.Columns, c)
		dst = appendColumnHead(dst, c, revision)
		if head.Rows == 0 {
			continue
		}
		from := s.at
		t, err := parseType(c.Type)
		if err == nil {
			err = t.walk(s, head.Rows)
		}
		if err != nil {
			return dst, native, head, fmt.Errorf("column %q of type %q: %w", c.Name, c.Type, err)
		}
		dst = append(dst, native[from:s.at]...)
	}
	return dst, native[s.at:], head, nil
}

// AppendHeader appends a block without rows.
func AppendHeader(dst []byte, columns []Column, revision int) []byte {
	dst = appendBlockInfo(dst, revision)
	dst = binary.AppendUvarint(dst, uint64(len(columns)))
	dst = binary.AppendUvarint(dst, 0)
	for _, c := range columns {
		dst = appendColumnHead(dst, c, revision)
	}
	return dst
}

func appendBlockInfo(dst []byte, revision int) []byte {
	if revision < RevisionBlockInfo {
		return dst
	}
	return append(dst, 1, 0, 2, 0xff, 0xff, 0xff, 0xff, 0) // no overflows, bucket -1
}

func appendColumnHead(dst []byte, c Column, revision int) []byte {
	dst = AppendString(dst, c.Name)
	dst = AppendString(dst, c.Type)
	if revision >= RevisionCustomSerialization {
		dst = append(dst, 0)
	}
	return dst
}

// AppendString appends a length and the string.
func AppendString(dst []byte, s string) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(s))), s...)
}

// Decompress reads ClickHouse's compressed frames to their end.
func Decompress(r io.Reader) io.Reader { return frames{compress.NewReader(r)} }

type frames struct{ r *compress.Reader }

// Read unwraps the end of the stream, which io.Copy and its like look for.
func (f frames) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if errors.Is(err, io.EOF) {
		err = io.EOF
	}
	return n, err
}
