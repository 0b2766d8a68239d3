// Package chdb binds libchdb, the ClickHouse engine as a shared library,
// without cgo. Nothing here knows of networks; see package server for those.
//
// The library holds one database directory per process. A connection is a
// ClickHouse session (settings, current database, temporary tables) and costs
// a fraction of a millisecond to open; it runs one query at a time, several of
// them run in parallel.
package chdb

import (
	"errors"
	"fmt"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"github.com/ebitengine/purego"
)

// Library is the loaded engine.
type Library struct {
	args []string

	connect func(argc int32, argv **byte) *uintptr
	close   func(conn *uintptr)
	query   func(conn uintptr, query *byte, queryLen uintptr, format *byte, formatLen uintptr) uintptr
	destroy func(result uintptr)
	buffer  func(result uintptr) *byte
	length  func(result uintptr) uintptr
	elapsed func(result uintptr) float64
	message func(result uintptr) string

	rowsRead         func(result uintptr) uint64
	storageRowsRead  func(result uintptr) uint64
	storageBytesRead func(result uintptr) uint64
	rowsWritten      func(result uintptr) uint64
	bytesWritten     func(result uintptr) uint64

	streamQuery  func(conn uintptr, query *byte, queryLen uintptr, format *byte, formatLen uintptr) uintptr
	streamFetch  func(conn, stream uintptr) uintptr
	streamCancel func(conn, stream uintptr)
}

// Load opens the shared library at path. args are passed to the engine as
// ClickHouse's own command-line arguments, like "--path=DIR".
func Load(path string, args ...string) (lib *Library, err error) {
	handle, err := purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_GLOBAL)
	if err != nil {
		return nil, fmt.Errorf("load ClickHouse engine: %w", err)
	}
	defer func() {
		if r := recover(); r != nil { // purego panics on a symbol that is missing
			lib, err = nil, fmt.Errorf("load ClickHouse engine %s: %v", path, r)
		}
	}()
	lib = &Library{args: append([]string{"clickhouse"}, args...)}
	for symbol, fn := range map[string]any{
		"chdb_connect": &lib.connect, "chdb_close_conn": &lib.close,
		"chdb_query_n": &lib.query, "chdb_destroy_query_result": &lib.destroy,
		"chdb_result_buffer": &lib.buffer, "chdb_result_length": &lib.length,
		"chdb_result_elapsed": &lib.elapsed, "chdb_result_error": &lib.message,
		"chdb_result_rows_read":          &lib.rowsRead,
		"chdb_result_storage_rows_read":  &lib.storageRowsRead,
		"chdb_result_storage_bytes_read": &lib.storageBytesRead,
		"chdb_result_rows_written":       &lib.rowsWritten,
		"chdb_result_bytes_written":      &lib.bytesWritten,
		"chdb_stream_query_n":            &lib.streamQuery,
		"chdb_stream_fetch_result":       &lib.streamFetch,
		"chdb_stream_cancel_query":       &lib.streamCancel,
	} {
		purego.RegisterLibFunc(fn, handle, symbol)
	}
	// Go's runtime needs its own handlers for SIGSEGV, SIGPROF and their like.
	var setSignalHandlers func(bool)
	purego.RegisterLibFunc(&setSignalHandlers, handle, "chdb_set_signal_handlers_enabled")
	setSignalHandlers(false)
	return lib, nil
}

// Conn is one session. It is not safe for concurrent use.
type Conn struct {
	lib    *Library
	handle *uintptr
}

// Connect opens a session. The first one of a process opens the database.
func (l *Library) Connect() (*Conn, error) {
	argv := make([]*byte, len(l.args)+1)
	for i, arg := range l.args {
		argv[i] = cString(arg)
	}
	handle := l.connect(int32(len(l.args)), &argv[0])
	runtime.KeepAlive(argv)
	if handle == nil || *handle == 0 {
		return nil, errors.New("open the database: the engine refused (its log on stderr says why)")
	}
	return &Conn{lib: l, handle: handle}, nil
}

// Close ends the session; closing the last one of a process closes the database.
func (c *Conn) Close() {
	if c.handle != nil {
		c.lib.close(c.handle)
		c.handle = nil
	}
}

// Result is what a query, or one step of a stream, gave.
type Result struct {
	lib    *Library
	handle uintptr
}

// Stats say what a query did so far.
type Stats struct {
	RowsRead, BytesRead       uint64 // from storage
	RowsWritten, BytesWritten uint64
	ElapsedSeconds            float64
}

// Query runs one query to its end and returns its whole output in the given
// format. Errors of the engine are *Error.
func (c *Conn) Query(query, format string) (*Result, error) {
	q, f := cString(query), cString(format)
	handle := c.lib.query(*c.handle, q, uintptr(len(query)), f, uintptr(len(format)))
	return c.lib.result(handle)
}

// Exec runs one query whose output does not matter.
func (c *Conn) Exec(query string) error {
	r, err := c.Query(query, "Null")
	if err == nil {
		r.Close()
	}
	return err
}

// QueryString runs one query and returns its output.
func (c *Conn) QueryString(query, format string) (string, error) {
	r, err := c.Query(query, format)
	if err != nil {
		return "", err
	}
	defer r.Close()
	return string(r.Bytes()), nil
}

// Stream is the output of a SELECT, block by block.
type Stream struct {
	conn   *Conn
	handle uintptr
	ended  bool
}

// Stream starts a SELECT. The session is busy until the stream is closed.
func (c *Conn) Stream(query, format string) (*Stream, error) {
	q, f := cString(query), cString(format)
	handle := c.lib.streamQuery(*c.handle, q, uintptr(len(query)), f, uintptr(len(format)))
	if handle == 0 {
		return nil, &Error{Code: codeUnknown, Name: "UNKNOWN_EXCEPTION", Message: "the engine gave no answer"}
	}
	if message := c.lib.message(handle); message != "" {
		c.lib.destroy(handle)
		return nil, parseError(message)
	}
	return &Stream{conn: c, handle: handle}, nil
}

// Next returns the next piece of output, or nil at the end. In format Native
// each piece is one block; in other formats each piece stands for itself, with
// the format's own head and foot.
func (s *Stream) Next() (*Result, error) {
	if s.ended {
		return nil, nil
	}
	r, err := s.conn.lib.result(s.conn.lib.streamFetch(*s.conn.handle, s.handle))
	if err != nil {
		s.ended = true
		return nil, err
	}
	if len(r.Bytes()) == 0 {
		s.ended = true
		r.Close()
		return nil, nil
	}
	if s.conn.lib.rowsRead(r.handle) == 0 { // the engine ends its stream here by itself
		s.ended = true
	}
	return r, nil
}

// Close frees the stream, cancelling what still runs.
func (s *Stream) Close() {
	if !s.ended {
		s.conn.lib.streamCancel(*s.conn.handle, s.handle)
		s.ended = true
	}
	s.conn.lib.destroy(s.handle)
}

func (l *Library) result(handle uintptr) (*Result, error) {
	if handle == 0 {
		return nil, &Error{Code: codeUnknown, Name: "UNKNOWN_EXCEPTION", Message: "the engine gave no answer"}
	}
	if message := l.message(handle); message != "" {
		l.destroy(handle)
		return nil, parseError(message)
	}
	return &Result{lib: l, handle: handle}, nil
}

// Bytes is the output. It lies in the engine's memory: do not keep it beyond Close.
func (r *Result) Bytes() []byte {
	n := r.lib.length(r.handle)
	if n == 0 {
		return nil
	}
	return unsafe.Slice(r.lib.buffer(r.handle), n)
}

// Stats tell what the query did.
func (r *Result) Stats() Stats {
	return Stats{
		RowsRead: r.lib.storageRowsRead(r.handle), BytesRead: r.lib.storageBytesRead(r.handle),
		RowsWritten: r.lib.rowsWritten(r.handle), BytesWritten: r.lib.bytesWritten(r.handle),
		ElapsedSeconds: r.lib.elapsed(r.handle),
	}
}

// Close frees the output.
func (r *Result) Close() { r.lib.destroy(r.handle) }

func cString(s string) *byte {
	b := make([]byte, len(s)+1)
	copy(b, s)
	return &b[0]
}

// Error is a ClickHouse exception.
type Error struct {
	// Code is ClickHouse's number, like 60 for UNKNOWN_TABLE.
	Code int
	// Name is the constant's name; it may be empty.
	Name string
	// Message is the text without the code before it and the name behind it.
	Message string
}

// codeUnknown is ClickHouse's UNKNOWN_EXCEPTION.
const codeUnknown = 1002

// Error has the form in which ClickHouse servers write exceptions.
func (e *Error) Error() string {
	s := "Code: " + strconv.Itoa(e.Code) + ". DB::Exception: " + e.Message
	if e.Name != "" {
		s += " (" + e.Name + ")"
	}
	return s
}

var (
	errorHead = regexp.MustCompile(`^(?:Code: (\d+)\. )?(?:DB::)?(?:Exception: )`)
	errorTail = regexp.MustCompile(`(?s)\s*(?:\(version [^)]*\))?\s*\(([A-Z][A-Z0-9_]+)\)\s*$`)
)

// parseError reads the engine's rendering of an exception, which may hold the
// code and the name twice.
func parseError(message string) *Error {
	e := &Error{Code: codeUnknown, Message: strings.TrimSpace(message)}
	for {
		m := errorHead.FindStringSubmatch(e.Message)
		if m == nil {
			break
		}
		if code, err := strconv.Atoi(m[1]); err == nil {
			e.Code = code
		}
		e.Message = e.Message[len(m[0]):]
	}
	for {
		m := errorTail.FindStringSubmatch(e.Message)
		if m == nil {
			break
		}
		if e.Name == "" {
			e.Name = m[1]
		}
		e.Message = e.Message[:len(e.Message)-len(m[0])]
	}
	return e
}
