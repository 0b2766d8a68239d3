package server

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go/compress"

	"github.com/latchkey-dev/latchkey/services/internal/engine/chdb"
	"github.com/latchkey-dev/latchkey/services/internal/engine/sql"
	"github.com/latchkey-dev/latchkey/services/internal/engine/wire"
)

// protocolRevision is what this server speaks: query parameters (54459) and
// elapsed times in progress (54460), and nothing of what came later.
const protocolRevision = 54460

// minRevision is that of ClickHouse 18.10, the first whose blocks hold
// LowCardinality columns as they are.
const minRevision = 54405

// revisionWriteInfo is the first at which progress tells of written rows.
const revisionWriteInfo = 54420

// Packets of the client.
const (
	clientHello  = 0
	clientQuery  = 1
	clientData   = 2
	clientCancel = 3
	clientPing   = 4
)

// Packets of the server.
const (
	serverHello       = 0
	serverData        = 1
	serverException   = 2
	serverProgress    = 3
	serverPong        = 4
	serverEndOfStream = 5
	serverProfileInfo = 6
)

const (
	maxQueryText     = 64 << 20
	maxSettingLength = 16 << 20
	maxNameLength    = 1 << 16
	maxSettings      = 10_000
	helloTimeout     = 30 * time.Second
	writeTimeout     = 5 * time.Minute
	progressInterval = time.Second
)

// serveNative accepts connections until the listener is closed.
func (s *Server) serveNative() {
	slots := make(chan struct{}, maxConnections)
	for {
		conn, err := s.cfg.Native.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Too many open files pass; a closed listener was told apart above.
			s.log.Warn("accept failed", "error", err)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-s.ctx.Done():
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			s.log.Warn("too many native connections", "limit", maxConnections)
			_ = conn.Close()
			continue
		}
		busy := new(atomic.Bool)
		s.liveMu.Lock()
		s.live[conn] = busy
		s.liveMu.Unlock()
		s.conns.Go(func() {
			defer func() {
				s.liveMu.Lock()
				delete(s.live, conn)
				s.liveMu.Unlock()
				_ = conn.Close()
				<-slots
			}()
			s.serveConn(conn, busy)
		})
	}
}

// nativeConn is one client.
type nativeConn struct {
	srv      *Server
	conn     net.Conn
	in       *wire.Reader
	out      *bufio.Writer
	outMu    sync.Mutex // progress comes between blocks
	busy     *atomic.Bool
	ses      *session
	revision int

	compressed bool
	compressor *compress.Writer
	block      []byte // reused
}

func (s *Server) serveConn(conn net.Conn, busy *atomic.Bool) {
	c := &nativeConn{srv: s, conn: conn, in: wire.NewReader(conn), out: bufio.NewWriterSize(conn, 1<<16), busy: busy}
	_ = conn.SetReadDeadline(time.Now().Add(helloTimeout))
	if err := c.hello(); err != nil {
		if e := (*chdb.Error)(nil); errors.As(err, &e) {
			_ = c.sendException(err)
		}
		s.log.Debug("native handshake failed", "error", err)
		return
	}
	defer c.ses.close()
	_ = conn.SetReadDeadline(time.Time{})
	for s.ctx.Err() == nil {
		packet, err := c.in.Uvarint()
		if err != nil {
			return
		}
		busy.Store(true)
		err = c.handle(packet)
		busy.Store(false)
		if err != nil {
			s.log.Debug("native connection ends", "error", err)
			return
		}
	}
}

// handle answers one packet; an error ends the connection.
func (c *nativeConn) handle(packet uint64) error {
	switch packet {
	case clientPing:
		return c.send([]byte{serverPong})
	case clientCancel: // of a query that ended before it came
		return nil
	case clientData: // of an INSERT that failed before its data came
		return c.skipData()
	case clientQuery:
		return c.query()
	default:
		err := exception(codeUnexpectedPacket, "UNEXPECTED_PACKET_FROM_CLIENT", "Unexpected packet %d from client", packet)
		return errors.Join(err, c.sendException(err))
	}
}

func (c *nativeConn) hello() error {
	packet, err := c.in.Uvarint()
	if err != nil {
		return err
	}
	if packet != clientHello {
		return exception(codeUnexpectedPacket, "UNEXPECTED_PACKET_FROM_CLIENT", "Unexpected packet %d from client, expected Hello", packet)
	}
	var d decoder
	d.in = c.in
	_ = d.str(maxNameLength) // client name
	_, _ = d.num(), d.num()  // its version
	revision := d.num()
	database, user, password := d.str(maxNameLength), d.str(maxNameLength), d.str(maxNameLength)
	if d.err != nil {
		return d.err
	}
	c.revision = int(min(revision, protocolRevision))
	if c.revision < minRevision {
		return exception(codeNotImplemented, "NOT_IMPLEMENTED", "Clients older than ClickHouse 18.10 (protocol revision %d) are not supported", minRevision)
	}
	if err := c.srv.authenticate(user, password); err != nil {
		return err
	}
	if c.ses, err = c.srv.openSession(database); err != nil {
		return err
	}
	b := []byte{serverHello}
	b = wire.AppendString(b, "ClickHouse")
	b = binary.AppendUvarint(b, uint64(c.srv.version[0]))
	b = binary.AppendUvarint(b, uint64(c.srv.version[1]))
	b = binary.AppendUvarint(b, protocolRevision)
	b = wire.AppendString(b, c.srv.timezone)
	b = wire.AppendString(b, "latchkey")
	b = binary.AppendUvarint(b, uint64(c.srv.version[2]))
	if err := c.send(b); err != nil {
		c.ses.close()
		return err
	}
	if c.revision >= 54458 { // addendum: a quota key
		if _, err := c.in.String(maxNameLength); err != nil {
			c.ses.close()
			return err
		}
	}
	return nil
}

// nativeQuery is a Query packet.
type nativeQuery struct {
	body       string
	settings   []setting
	parameters map[string]string
	compressed bool
}

func (c *nativeConn) readQuery() (q nativeQuery, err error) {
	d := decoder{in: c.in}
	_ = d.str(maxNameLength) // query id: the engine makes its own
	c.skipClientInfo(&d)
	for n := 0; d.err == nil; n++ {
		name := d.str(maxNameLength)
		if name == "" {
			break
		}
		if n > maxSettings {
			return q, wire.ErrTooLong
		}
		if c.revision < 54429 {
			// In the old form the type decides how a value is written; all that
			// such clients set in practice are numbers.
			q.settings = append(q.settings, setting{name: name, value: strconv.FormatUint(d.num(), 10), optional: true})
			continue
		}
		flags, value := d.num(), d.str(maxSettingLength)
		if flags&2 != 0 {
			value = restoreField(value)
		}
		q.settings = append(q.settings, setting{name: name, value: value, optional: flags&1 == 0})
	}
	if c.revision >= 54441 {
		_ = d.str(maxNameLength) // interserver secret
	}
	_ = d.num() // stage: always to the end
	q.compressed = d.num() != 0
	q.body = d.str(maxQueryText)
	if c.revision < 54459 {
		return q, d.err
	}
	q.parameters = map[string]string{}
	for d.err == nil {
		name := d.str(maxNameLength)
		if name == "" {
			break
		}
		if len(q.parameters) > maxSettings {
			return q, wire.ErrTooLong
		}
		_ = d.num() // flags
		q.parameters[name] = restoreField(d.str(maxSettingLength))
	}
	return q, d.err
}

func (c *nativeConn) skipClientInfo(d *decoder) {
	if d.num() == 0 { // no query
		return
	}
	for range 3 { // initial user, query id, address
		_ = d.str(maxNameLength)
	}
	if c.revision >= 54449 {
		d.skip(8) // time
	}
	tcp := d.num() == 1
	if tcp {
		for range 3 { // OS user, host name, client name
			_ = d.str(maxNameLength)
		}
		_, _, _ = d.num(), d.num(), d.num() // version, revision
	} else {
		d.skip(1) // method
		_ = d.str(maxNameLength)
		if c.revision >= 54443 {
			_ = d.str(maxNameLength)
		}
		if c.revision >= 54447 {
			_ = d.str(maxNameLength)
		}
	}
	_ = d.str(maxNameLength) // quota key
	if c.revision >= 54448 {
		_ = d.num() // distributed depth
	}
	if tcp {
		_ = d.num() // patch
	}
	if c.revision >= 54442 && d.num() == 1 { // OpenTelemetry
		d.skip(16 + 8)
		_ = d.str(maxNameLength)
		d.skip(1)
	}
	if c.revision >= 54453 {
		_, _, _ = d.num(), d.num(), d.num() // parallel replicas
	}
}

// restoreField reads the dump of a Field, of which clients send strings only.
func restoreField(dump string) string {
	if len(dump) < 2 || dump[0] != '\'' || dump[len(dump)-1] != '\'' {
		return dump
	}
	return strings.NewReplacer(`\\`, `\`, `\'`, `'`, `\n`, "\n", `\t`, "\t", `\r`, "\r", `\0`, "\x00", `\b`, "\b", `\f`, "\f").Replace(dump[1 : len(dump)-1])
}

// query runs one Query packet to its end. An error ends the connection; what
// only the query did wrong goes to the client.
func (c *nativeConn) query() error {
	q, err := c.readQuery()
	if err != nil {
		return fmt.Errorf("read query: %w", err)
	}
	if c.compressed = q.compressed; c.compressed && c.compressor == nil {
		c.compressor = compress.NewWriter(compress.LevelZero, compress.LZ4)
	}
	external, err := c.readExternalTables()
	if err != nil {
		return fmt.Errorf("read external tables: %w", err)
	}
	defer c.dropExternalTables(external)

	var fatal error
	err = c.execute(q, external, &fatal)
	if fatal != nil {
		_ = c.sendException(fatal)
		return fatal
	}
	if err != nil {
		return c.sendException(err)
	}
	return c.send([]byte{serverEndOfStream})
}

func (c *nativeConn) execute(q nativeQuery, external []externalTable, fatal *error) error {
	st, err := sql.Parse(q.body)
	if err != nil {
		return err
	}
	if err := c.ses.apply(q.settings); err != nil {
		return err
	}
	if err := c.ses.setParameters(q.parameters); err != nil {
		return err
	}
	for _, t := range external {
		if err := c.loadExternalTable(t); err != nil {
			return err
		}
	}
	if st.Kind == sql.Insert {
		return c.insert(q, st, fatal)
	}
	return c.watch(fatal, func(ctx context.Context) error { return c.rows(ctx, st) })
}

// rows sends what a statement gives: a block with at least the columns, if it
// is one that gives rows.
func (c *nativeConn) rows(ctx context.Context, st sql.Statement) error {
	var rows, blocks, bytes uint64
	stats, err := c.ses.run(ctx, st, "Native", true, func(native []byte) error {
		for len(native) > 0 {
			rest, head, err := c.sendBlock(native)
			if err != nil {
				return err
			}
			rows, blocks, bytes = rows+head.Rows, blocks+1, bytes+uint64(len(native)-len(rest))
			native = rest
		}
		return nil
	})
	if err != nil {
		return err
	}
	if blocks == 0 {
		columns, err := c.ses.header(st)
		if err != nil {
			return err
		}
		if len(columns) > 0 {
			if err := c.sendHeader(columns); err != nil {
				return err
			}
		}
	}
	if err := c.sendProgress(progress{rows: stats.RowsRead, bytes: stats.BytesRead, writtenRows: stats.RowsWritten, writtenBytes: stats.BytesWritten}, uint64(stats.ElapsedSeconds*1e9)); err != nil {
		return err
	}
	return c.sendProfile(rows, blocks, bytes)
}

// watch runs fn, sending progress if it takes long and ending it if the client
// cancels or goes away.
func (c *nativeConn) watch(fatal *error, fn func(context.Context) error) error {
	ctx, cancel := context.WithCancel(c.srv.ctx)
	defer cancel()
	stop := make(chan struct{})
	var helpers sync.WaitGroup
	var cancelled bool
	helpers.Go(func() {
		packet, err := c.in.Peek()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded): // the query ended first
		case err != nil:
			cancel()
		case packet == clientCancel:
			_, _ = c.in.Byte()
			cancelled = true
			cancel()
		}
	})
	helpers.Go(func() { c.reportProgress(stop) })
	err := fn(ctx)
	close(stop)
	_ = c.conn.SetReadDeadline(time.Unix(1, 0)) // wakes the reader
	helpers.Wait()
	_ = c.conn.SetReadDeadline(time.Time{})
	if err != nil && ctx.Err() != nil {
		if !cancelled {
			*fatal = errors.New("the client went away, or the server stops")
		}
		return exception(codeQueryWasCancelled, "QUERY_WAS_CANCELLED", "Query was cancelled")
	}
	if netErr := net.Error(nil); errors.As(err, &netErr) {
		*fatal = err
	}
	return err
}

func (c *nativeConn) reportProgress(stop <-chan struct{}) {
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	var sent progress
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		if c.revision < revisionWriteInfo {
			continue // such a client takes no progress amid an INSERT
		}
		now, ok := c.srv.progressOf(c.ses.marker)
		if !ok {
			continue
		}
		// Clients add the packets up, so each holds what is new. The last
		// packet holds the whole, so these carry no rows: only a sign of life
		// and the total.
		if c.sendProgress(progress{total: now.total - min(now.total, sent.total)}, 0) != nil {
			return
		}
		sent = now
	}
}

// insert takes the data of an INSERT, from the query's text or from blocks.
func (c *nativeConn) insert(q nativeQuery, st sql.Statement, fatal *error) error {
	f, err := c.srv.spool()
	if err != nil {
		return err
	}
	defer c.srv.dropSpool(f)
	format := st.Insert.Format
	inline := q.body[st.Insert.DataOffset:]
	if strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(inline), ";")) != "" {
		if _, err := f.WriteString(inline); err != nil {
			return fmt.Errorf("write spool file: %w", err)
		}
	} else {
		format = "Native"
		rows, err := c.receiveBlocks(st, f, fatal)
		if err != nil || rows == 0 {
			return err
		}
	}
	return c.watch(fatal, func(ctx context.Context) error {
		stats, err := c.ses.insert(ctx, st.Insert, format, f.Name())
		if err != nil || c.revision < revisionWriteInfo {
			return err
		}
		return c.sendProgress(progress{writtenRows: stats.RowsWritten, writtenBytes: stats.BytesWritten}, uint64(stats.ElapsedSeconds*1e9))
	})
}

// receiveBlocks sends the columns that are wanted and spools the blocks that
// come until the empty one.
func (c *nativeConn) receiveBlocks(st sql.Statement, f *os.File, fatal *error) (rows uint64, err error) {
	columns, err := c.ses.insertColumns(st.Insert)
	if err != nil {
		return 0, err
	}
	if err := c.sendHeader(columns); err != nil {
		*fatal = err
		return 0, err
	}
	w := bufio.NewWriterSize(f, 1<<18)
	for {
		packet, err := c.in.Uvarint()
		if err == nil && packet == clientCancel {
			return 0, exception(codeQueryWasCancelled, "QUERY_WAS_CANCELLED", "Query was cancelled")
		}
		if err == nil && packet != clientData {
			err = exception(codeUnexpectedPacket, "UNEXPECTED_PACKET_FROM_CLIENT", "Unexpected packet %d from client, expected Data", packet)
		}
		if err == nil {
			_, err = c.in.String(maxNameLength)
		}
		if err != nil {
			*fatal = err
			return 0, err
		}
		head, err := c.readBlock(w)
		if err != nil {
			*fatal = err // where the next packet begins is not known
			return 0, err
		}
		if len(head.Columns) == 0 && head.Rows == 0 {
			return rows, w.Flush()
		}
		rows += head.Rows
	}
}

func (c *nativeConn) readBlock(w *bufio.Writer) (wire.BlockHead, error) {
	c.in.SetCompressed(c.compressed)
	defer c.in.SetCompressed(false)
	return c.in.CopyBlock(w, c.revision)
}

func (c *nativeConn) skipData() error {
	if _, err := c.in.String(maxNameLength); err != nil {
		return err
	}
	_, err := c.readBlock(bufio.NewWriter(io.Discard))
	return err
}

// externalTable came with a query.
type externalTable struct {
	name    string
	columns []wire.Column
	data    *os.File
}

// readExternalTables reads the Data packets behind a query, up to the empty one.
func (c *nativeConn) readExternalTables() (tables []externalTable, err error) {
	defer func() {
		if err != nil {
			c.dropExternalTables(tables)
			tables = nil
		}
	}()
	for {
		packet, err := c.in.Uvarint()
		if err != nil {
			return tables, err
		}
		if packet != clientData {
			return tables, fmt.Errorf("unexpected packet %d behind a query", packet)
		}
		name, err := c.in.String(maxNameLength)
		if err != nil {
			return tables, err
		}
		if name == "" {
			head, err := c.readBlock(bufio.NewWriter(io.Discard))
			if err != nil || len(head.Columns) == 0 {
				return tables, err
			}
			continue
		}
		f, err := c.srv.spool()
		if err != nil {
			return tables, err
		}
		tables = append(tables, externalTable{name: name, data: f})
		w := bufio.NewWriter(f)
		head, err := c.readBlock(w)
		if err := errors.Join(err, w.Flush()); err != nil {
			return tables, err
		}
		tables[len(tables)-1].columns = head.Columns
	}
}

func (c *nativeConn) loadExternalTable(t externalTable) error {
	defs := make([]string, len(t.columns))
	for i, col := range t.columns {
		defs[i] = sql.QuoteName(col.Name) + " " + col.Type
	}
	if err := c.ses.conn.Exec("CREATE TEMPORARY TABLE IF NOT EXISTS " + sql.QuoteName(t.name) + " (" + strings.Join(defs, ", ") + ")"); err != nil {
		return err
	}
	_, err := c.ses.insert(c.srv.ctx, sql.InsertHead{Into: "INSERT INTO " + sql.QuoteName(t.name)}, "Native", t.data.Name())
	return err
}

func (c *nativeConn) dropExternalTables(tables []externalTable) {
	for _, t := range tables {
		c.srv.dropSpool(t.data)
		if err := c.ses.conn.Exec("DROP TEMPORARY TABLE IF EXISTS " + sql.QuoteName(t.name)); err != nil {
			c.srv.log.Debug("could not drop an external table", "error", err)
		}
	}
}

// send writes whole packets and flushes them.
func (c *nativeConn) send(packets []byte) error {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := c.out.Write(packets); err != nil {
		return err
	}
	return c.out.Flush()
}

func (c *nativeConn) sendException(err error) error {
	e := asException(err)
	b := []byte{serverException}
	b = binary.LittleEndian.AppendUint32(b, uint32(e.Code))
	b = wire.AppendString(b, "DB::Exception")
	b = wire.AppendString(b, "DB::Exception: "+e.Message)
	b = wire.AppendString(b, "") // stack trace
	return c.send(append(b, 0))  // nothing nested
}

// sendBlock sends the first of the blocks in native.
func (c *nativeConn) sendBlock(native []byte) (rest []byte, head wire.BlockHead, err error) {
	c.block, rest, head, err = wire.AppendBlock(c.block[:0], native, c.revision)
	if err != nil {
		return rest, head, err
	}
	return rest, head, c.sendData()
}

func (c *nativeConn) sendHeader(columns []wire.Column) error {
	c.block = wire.AppendHeader(c.block[:0], columns, c.revision)
	return c.sendData()
}

func (c *nativeConn) sendData() error {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := c.out.Write([]byte{serverData, 0}); err != nil { // no table name
		return err
	}
	if err := writeFrames(c.out, c.block, c.compressed, c.compressor); err != nil {
		return err
	}
	if cap(c.block) > 16<<20 {
		c.block = nil // one huge block must not stay for the connection's life
	}
	return c.out.Flush()
}

// writeFrames writes b, in compressed frames of a megabyte if wanted.
func writeFrames(w io.Writer, b []byte, compressed bool, compressor *compress.Writer) error {
	if !compressed {
		_, err := w.Write(b)
		return err
	}
	for len(b) > 0 {
		part := b[:min(len(b), 1<<20)]
		b = b[len(part):]
		if err := compressor.Compress(part); err != nil {
			return fmt.Errorf("compress block: %w", err)
		}
		if _, err := w.Write(compressor.Data); err != nil {
			return err
		}
	}
	return nil
}

func (c *nativeConn) sendProgress(p progress, elapsedNs uint64) error {
	b := []byte{serverProgress}
	for _, n := range []uint64{p.rows, p.bytes, p.total} {
		b = binary.AppendUvarint(b, n)
	}
	if c.revision >= revisionWriteInfo {
		b = binary.AppendUvarint(b, p.writtenRows)
		b = binary.AppendUvarint(b, p.writtenBytes)
	}
	if c.revision >= 54460 {
		b = binary.AppendUvarint(b, elapsedNs)
	}
	return c.send(b)
}

func (c *nativeConn) sendProfile(rows, blocks, bytes uint64) error {
	b := []byte{serverProfileInfo}
	for _, n := range []uint64{rows, blocks, bytes} {
		b = binary.AppendUvarint(b, n)
	}
	return c.send(append(b, 0, 0, 0)) // no limit applied, none counted
}

// decoder reads the parts of a packet; the first error sticks.
type decoder struct {
	in  *wire.Reader
	err error
}

func (d *decoder) str(limit int) string {
	if d.err != nil {
		return ""
	}
	var s string
	s, d.err = d.in.String(limit)
	return s
}

func (d *decoder) num() uint64 {
	if d.err != nil {
		return 0
	}
	var n uint64
	n, d.err = d.in.Uvarint()
	return n
}

func (d *decoder) skip(n int) {
	if d.err == nil {
		d.err = d.in.Skip(n)
	}
}
