package server

import (
	"compress/gzip"
	"compress/zlib"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/ClickHouse/ch-go/compress"
	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/latchkey-dev/latchkey/services/internal/engine/chdb"
	"github.com/latchkey-dev/latchkey/services/internal/engine/sql"
	"github.com/latchkey-dev/latchkey/services/internal/engine/wire"
)

// headSize is how much of a body is read to find where an INSERT's data begins.
const headSize = 1 << 20

// notSettings are URL parameters with a meaning of their own.
var notSettings = []string{
	"query", "database", "user", "password", "default_format", "query_id", "session_id", "session_timeout", "session_check",
	"compress", "decompress", "client_protocol_version", "quota_key", "stacktrace", "role", "buffer_size", "wait_end_of_query", "close_session",
}

// streamed are the formats whose pieces, laid end to end, are the whole.
var streamed = []string{
	"Native", "TSV", "TabSeparated", "TSVRaw", "TabSeparatedRaw", "CSV", "JSONEachRow", "JSONLines", "NDJSON",
	"JSONStringsEachRow", "JSONCompactEachRow", "RowBinary", "LineAsString", "RawBLOB",
}

var contentTypes = map[string]string{
	"JSON": "application/json", "JSONCompact": "application/json", "JSONStrings": "application/json", "JSONColumns": "application/json",
	"JSONEachRow": "application/x-ndjson", "JSONLines": "application/x-ndjson", "NDJSON": "application/x-ndjson",
	"JSONCompactEachRow": "application/x-ndjson",
	"CSV":                "text/csv; charset=UTF-8; header=absent", "CSVWithNames": "text/csv; charset=UTF-8; header=present",
	"CSVWithNamesAndTypes": "text/csv; charset=UTF-8; header=present",
	"Native":               "application/octet-stream", "RowBinary": "application/octet-stream", "Parquet": "application/octet-stream",
	"Arrow": "application/octet-stream", "ArrowStream": "application/octet-stream", "XML": "application/xml; charset=UTF-8",
	"Pretty": "text/plain; charset=UTF-8", "Vertical": "text/plain; charset=UTF-8", "Markdown": "text/markdown; charset=UTF-8",
}

// HealthPath answers 200 if the engine itself answers, however many queries wait.
const HealthPath = "/-/healthy"

func (s *Server) serveHealth(w http.ResponseWriter) {
	s.adminMu.Lock()
	defer s.adminMu.Unlock()
	if err := s.admin.Exec("SELECT 1"); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	_, _ = io.WriteString(w, "Ok.\n")
}

func (s *Server) serveHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case HealthPath:
		s.serveHealth(w)
		return
	case "/ping", "/replicas_status":
		_, _ = io.WriteString(w, "Ok.\n")
		return
	case "/", "/query":
	default:
		http.Error(w, "There is no handle "+r.URL.Path+"\n\nUse / or /ping for health checks.\n"+
			"Send queries from your program with POST method or GET /?query=...", http.StatusNotFound)
		return
	}
	values := r.URL.Query()
	if !s.trusts(r) {
		http.Error(w, "Requests that another web site makes a browser send are refused.", http.StatusForbidden)
		return
	}
	if (r.Method == http.MethodGet || r.Method == http.MethodHead) && !values.Has("query") {
		_, _ = io.WriteString(w, "Ok.\n")
		return
	}
	x := &exchange{srv: s, w: w, r: r, values: values}
	defer x.cleanUp()
	if err := x.serve(); err != nil {
		x.fail(err)
	}
}

// trusts refuses what a foreign page makes a browser send: cross-site forms, and
// names that a foreign DNS server points at this machine. Other clients send no
// Origin and use the name that they were given.
func (s *Server) trusts(r *http.Request) bool {
	if origin := r.Header.Get("Origin"); origin != "" {
		u, err := url.Parse(origin)
		if err != nil || u.Host != r.Host {
			return false
		}
	}
	if s.cfg.Password != "" {
		return true
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.ToLower(strings.Trim(host, "[]"))
	if net.ParseIP(host) != nil || !strings.Contains(host, ".") {
		return true
	}
	return slices.ContainsFunc([]string{".localhost", ".internal", ".local"}, func(suffix string) bool { return strings.HasSuffix(host, suffix) })
}

// exchange is one HTTP request with its answer.
type exchange struct {
	srv    *Server
	w      http.ResponseWriter
	r      *http.Request
	values url.Values
	ses    *session

	format     string
	out        io.Writer // nil until the head of the answer is sent
	closers    []func() error
	compressor *compress.Writer
	tag        string
	block      []byte
}

func (x *exchange) cleanUp() {
	if x.ses != nil {
		x.ses.close()
	}
}

func (x *exchange) serve() error {
	user, password := x.credentials()
	if err := x.srv.authenticate(user, password); err != nil {
		return err
	}
	body, err := x.body()
	if err != nil {
		return exception(codeBadArguments, "BAD_ARGUMENTS", "%v", err)
	}
	head, rest, err := x.head(body)
	if err != nil {
		return err
	}
	st, err := sql.Parse(head)
	if err != nil {
		return err
	}
	if st.Kind != sql.Insert && rest != nil {
		if head, err = x.wholeQuery(head, rest); err != nil {
			return err
		}
		if st, err = sql.Parse(head); err != nil {
			return err
		}
	}
	if err := x.open(); err != nil {
		return err
	}
	if st.Kind == sql.Insert {
		return x.insert(st, head[st.Insert.DataOffset:], rest)
	}
	return x.answer(st)
}

func (x *exchange) credentials() (user, password string) {
	if user, password, ok := x.r.BasicAuth(); ok {
		return user, password
	}
	if user := x.r.Header.Get("X-ClickHouse-User"); user != "" {
		return user, x.r.Header.Get("X-ClickHouse-Key")
	}
	return x.values.Get("user"), x.values.Get("password")
}

// body undoes the request's compression.
func (x *exchange) body() (io.Reader, error) {
	var body io.Reader = x.r.Body
	switch encoding := x.r.Header.Get("Content-Encoding"); encoding {
	case "", "identity":
	case "gzip", "x-gzip":
		zipped, err := gzip.NewReader(body)
		if err != nil {
			return nil, fmt.Errorf("read gzip body: %w", err)
		}
		body = zipped
	case "deflate":
		zipped, err := zlib.NewReader(body)
		if err != nil {
			return nil, fmt.Errorf("read deflate body: %w", err)
		}
		body = zipped
	case "br":
		body = brotli.NewReader(body)
	case "lz4":
		body = lz4.NewReader(body)
	case "zstd":
		zipped, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(128<<20))
		if err != nil {
			return nil, fmt.Errorf("read zstd body: %w", err)
		}
		x.closers = append(x.closers, func() error { zipped.Close(); return nil })
		body = zipped
	default:
		return nil, fmt.Errorf("unknown Content-Encoding %q", encoding)
	}
	if truthy(x.values.Get("decompress")) {
		body = wire.Decompress(body)
	}
	return body, nil
}

func truthy(s string) bool { return s != "" && s != "0" && s != "false" }

// head is the query, or as much of it as is needed to tell an INSERT's data
// from its text. rest is what was not read of the body, nil if nothing is left.
func (x *exchange) head(body io.Reader) (head string, rest io.Reader, err error) {
	query := x.values.Get("query")
	if query != "" {
		query += "\n"
		if st, err := sql.Parse(query); err == nil && st.Kind == sql.Insert {
			return query, body, nil
		}
	}
	b, err := io.ReadAll(io.LimitReader(body, headSize))
	if err != nil {
		return "", nil, exception(codeBadArguments, "BAD_ARGUMENTS", "cannot read the request's body: %v", err)
	}
	if len(b) < headSize {
		body = nil
	}
	return query + string(b), body, nil
}

func (x *exchange) wholeQuery(head string, rest io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(rest, maxQueryText))
	if err != nil {
		return "", exception(codeBadArguments, "BAD_ARGUMENTS", "cannot read the request's body: %v", err)
	}
	if len(b) == maxQueryText {
		return "", exception(codeQueryTooLarge, "QUERY_IS_TOO_LARGE", "Query is too large")
	}
	return head + string(b), nil
}

// open makes the session with the settings and parameters of the URL.
func (x *exchange) open() error {
	database := x.values.Get("database")
	if h := x.r.Header.Get("X-ClickHouse-Database"); h != "" {
		database = h
	}
	var err error
	if x.ses, err = x.srv.openSession(database); err != nil {
		return err
	}
	var settings []setting
	parameters := map[string]string{}
	for name, v := range x.values {
		if p, ok := strings.CutPrefix(name, "param_"); ok {
			parameters[p] = v[0]
		} else if !slices.Contains(notSettings, name) {
			settings = append(settings, setting{name: name, value: v[0]})
		}
	}
	if err := x.ses.apply(settings); err != nil {
		return err
	}
	if err := x.ses.setParameters(parameters); err != nil {
		return err
	}
	if x.r.Method == http.MethodPost || x.r.Method == http.MethodPut {
		return nil
	}
	return x.ses.conn.Exec("SET readonly = 2") // a link must not change anything
}

// insert spools what is inline and what follows, and loads it.
func (x *exchange) insert(st sql.Statement, inline string, rest io.Reader) error {
	f, err := x.srv.spool()
	if err != nil {
		return err
	}
	defer x.srv.dropSpool(f)
	if st.Insert.Format == "Values" {
		inline = strings.TrimRight(inline, " \t\r\n")
		if rest == nil {
			inline = strings.TrimSuffix(inline, ";")
		}
	} else if x.values.Get("query") != "" {
		// The line end that was put behind the URL's query is no data.
		inline = strings.TrimPrefix(inline, "\n")
	}
	written, err := f.WriteString(inline)
	if err != nil {
		return fmt.Errorf("write spool file: %w", err)
	}
	size := int64(written)
	if rest != nil {
		n, err := io.Copy(f, rest)
		if err != nil {
			return exception(codeIncorrectData, "INCORRECT_DATA", "cannot read the request's body: %v", err)
		}
		size += n
	}
	var stats chdb.Stats
	if size > 0 {
		if stats, err = x.ses.insert(x.r.Context(), st.Insert, st.Insert.Format, f.Name()); err != nil {
			return err
		}
	}
	x.begin(stats)
	return x.end()
}

// answer runs a statement and sends what it gives.
func (x *exchange) answer(st sql.Statement) error {
	x.format = st.Format
	if x.format == "" {
		x.format = x.values.Get("default_format")
	}
	if x.format == "" {
		x.format = x.r.Header.Get("X-ClickHouse-Format")
	}
	if x.format == "" {
		x.format = "TabSeparated"
	}
	revision, _ := strconv.Atoi(x.values.Get("client_protocol_version"))
	framed := strings.EqualFold(x.format, "Native") && revision > 0
	stream := slices.ContainsFunc(streamed, func(f string) bool { return strings.EqualFold(f, x.format) })
	if !framed && (truthy(x.values.Get("wait_end_of_query")) || truthy(x.values.Get("http_wait_end_of_query"))) {
		stream = false // the answer is whole before its head is sent
	}
	sent := false
	stats, err := x.ses.run(x.r.Context(), st, x.format, stream, func(b []byte) error {
		if x.out == nil {
			x.begin(chdb.Stats{})
		}
		sent = true
		if framed {
			return x.writeBlocks(b, revision)
		}
		return x.write(b)
	})
	if err != nil {
		return err
	}
	if x.out == nil {
		x.begin(stats)
	}
	if !sent && framed {
		columns, err := x.ses.header(st)
		if err == nil && len(columns) > 0 {
			err = x.write(wire.AppendHeader(nil, columns, revision))
		}
		if err != nil {
			return err
		}
	}
	return x.end()
}

func (x *exchange) writeBlocks(native []byte, revision int) (err error) {
	for len(native) > 0 {
		if x.block, native, _, err = wire.AppendBlock(x.block[:0], native, revision); err != nil {
			return err
		}
		if err = x.write(x.block); err != nil {
			return err
		}
	}
	return nil
}

func (x *exchange) write(b []byte) error {
	if err := writeFrames(x.out, b, x.compressor != nil, x.compressor); err != nil {
		return fmt.Errorf("send answer: %w", err)
	}
	return nil
}

// begin sends the head of the answer.
func (x *exchange) begin(stats chdb.Stats) {
	h := x.w.Header()
	x.commonHeader()
	if x.format != "" {
		h.Set("X-ClickHouse-Format", x.format)
		contentType := contentTypes[x.format]
		if contentType == "" {
			contentType = "text/tab-separated-values; charset=UTF-8"
		}
		h.Set("Content-Type", contentType)
	} else {
		h.Set("Content-Type", "text/plain; charset=UTF-8")
	}
	x.tag = rand.Text()[:16]
	h.Set("X-ClickHouse-Exception-Tag", x.tag)
	h.Set("X-ClickHouse-Summary", fmt.Sprintf(
		`{"read_rows":"%d","read_bytes":"%d","written_rows":"%d","written_bytes":"%d","total_rows_to_read":"0","result_rows":"0","result_bytes":"0","elapsed_ns":"%d"}`,
		stats.RowsRead, stats.BytesRead, stats.RowsWritten, stats.BytesWritten, uint64(stats.ElapsedSeconds*1e9)))
	x.out = x.w
	if truthy(x.values.Get("compress")) {
		x.compressor = compress.NewWriter(compress.LevelZero, compress.LZ4)
		if strings.EqualFold(x.values.Get("network_compression_method"), "zstd") {
			x.compressor = compress.NewWriter(compress.LevelZero, compress.ZSTD)
		}
		return
	}
	x.encode(h)
}

// encode honours Accept-Encoding, if the client also asked for it as ClickHouse
// wants it asked.
func (x *exchange) encode(h http.Header) {
	if !truthy(x.values.Get("enable_http_compression")) {
		return
	}
	accepted := x.r.Header.Get("Accept-Encoding")
	switch {
	case strings.Contains(accepted, "br"):
		w := brotli.NewWriterLevel(x.w, 3)
		x.out, x.closers = w, append(x.closers, w.Close)
		h.Set("Content-Encoding", "br")
	case strings.Contains(accepted, "gzip"):
		w := gzip.NewWriter(x.w)
		x.out, x.closers = w, append(x.closers, w.Close)
		h.Set("Content-Encoding", "gzip")
	case strings.Contains(accepted, "zstd"):
		w, err := zstd.NewWriter(x.w, zstd.WithEncoderConcurrency(1))
		if err == nil {
			x.out, x.closers = w, append(x.closers, w.Close)
			h.Set("Content-Encoding", "zstd")
		}
	case strings.Contains(accepted, "deflate"):
		w := zlib.NewWriter(x.w)
		x.out, x.closers = w, append(x.closers, w.Close)
		h.Set("Content-Encoding", "deflate")
	}
}

func (x *exchange) commonHeader() {
	h := x.w.Header()
	h.Set("X-ClickHouse-Server-Display-Name", "latchkey")
	h.Set("X-ClickHouse-Timezone", x.srv.timezone)
	id := x.values.Get("query_id")
	if id == "" {
		id = rand.Text()
	}
	h.Set("X-ClickHouse-Query-Id", id)
}

func (x *exchange) end() error {
	var err error
	for _, fn := range slices.Backward(x.closers) {
		err = errors.Join(err, fn())
	}
	x.closers = nil
	return err
}

// fail tells the client what went wrong. After the answer has begun there is no
// status to set any more: the exception is written behind it in the form that
// ClickHouse uses, and the connection is cut.
func (x *exchange) fail(err error) {
	if x.r.Context().Err() != nil && x.srv.ctx.Err() == nil {
		panic(http.ErrAbortHandler) // nobody is there to read it
	}
	e := asException(err)
	text := fmt.Sprintf("%v (version %s (embedded))\n", e, x.srv.Version())
	if x.out == nil {
		x.commonHeader()
		x.w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
		x.w.Header().Set("X-ClickHouse-Exception-Code", strconv.Itoa(e.Code))
		if e.Code == codeAuthentication {
			x.w.Header().Set("WWW-Authenticate", `Basic realm="ClickHouse server HTTP API"`)
		}
		x.w.WriteHeader(httpStatus(e.Code))
		_, _ = io.WriteString(x.w, text)
		return
	}
	message := fmt.Sprintf("\r\n__exception__\r\n%s\r\n%s%d %s\r\n__exception__\r\n", x.tag, text, len(text), x.tag)
	if x.write([]byte(message)) == nil && x.end() == nil {
		if f, ok := x.w.(http.Flusher); ok {
			f.Flush()
		}
	}
	panic(http.ErrAbortHandler)
}

// httpStatus follows ClickHouse's exceptionCodeToHTTPStatus.
func httpStatus(code int) int {
	switch code {
	case codeAuthentication, 192, 193, 194: // unknown user, wrong or no password
		return http.StatusUnauthorized
	case codeAccessDenied, 291, 492:
		return http.StatusForbidden
	case 6, 26, 27, 38, 41, 47, 53, 62, 69, 70, 72, 117, 120, 130, 386, 441, 456, 457, 523, 636:
		return http.StatusBadRequest
	case 16, 46, 50, 60, 73, 78, 81, 115:
		return http.StatusNotFound
	case 131:
		return http.StatusRequestEntityTooLarge
	case codeNotImplemented:
		return http.StatusNotImplemented
	case 159, 160:
		return http.StatusRequestTimeout
	case 209, 439:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
