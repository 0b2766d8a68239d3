package engine_test

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
)

type answer struct {
	status int
	body   string
	header http.Header
	err    error
}

func post(t testing.TB, e *engine.Engine, params string, body io.Reader, headers ...string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+e.HTTPAddr()+"/?"+params, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		if headers[i] != "" {
			req.Header.Set(headers[i], headers[i+1])
		}
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, string(b), res.Header, err}
}

func params(pairs ...string) string {
	v := url.Values{}
	for i := 0; i+1 < len(pairs); i += 2 {
		v.Set(pairs[i], pairs[i+1])
	}
	return v.Encode()
}

func TestHTTPQueries(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for _, c := range []struct {
		name, params, body string
		status             int
		want               string // whole, or a part if it ends with "…"
	}{
		{"body", "", "SELECT 1", 200, "1\n"},
		{"trailing semicolon and comment", "", "SELECT 1; -- done\n", 200, "1\n"},
		{"url", params("query", "SELECT 2"), "", 200, "2\n"},
		{"url and body", params("query", "SELECT"), "3", 200, "3\n"},
		{"format clause", "", "SELECT 1 AS x FORMAT JSONEachRow", 200, "{\"x\":1}\n"},
		{"default format", params("default_format", "CSVWithNames"), "SELECT 1 AS x", 200, "\"x\"\n1\n"},
		{"format within", "", "SELECT count() FROM (SELECT 1 AS format) FORMAT TSV", 200, "1\n"},
		{"setting", params("max_threads", "7"), "SELECT getSetting('max_threads')", 200, "7\n"},
		{"parameter", params("param_who", "a 'b' \\\\ c"), "SELECT {who:String}", 200, "a \\'b\\' \\\\ c\n"},
		{"typed parameter", params("param_n", "42"), "SELECT {n:UInt64} + 1", 200, "43\n"},
		{"database", params("database", "system"), "SELECT currentDatabase()", 200, "system\n"},
		{"empty result", "", "SELECT 1 WHERE 0", 200, ""},
		{"show", "", "SHOW DATABASES LIKE 'system'", 200, "system\n"},
		{"explain", "", "EXPLAIN SYNTAX SELECT 1", 200, "SELECT 1\nFROM system.one\n"},
		{"syntax error", "", "SELEC 1", 400, "Code: 62. DB::Exception: Syntax error…"},
		{"unknown table", "", "SELECT * FROM nowhere", 404, "Code: 60. DB::Exception:…"},
		{"unknown database", params("database", "nowhere"), "SELECT 1", 404, "Code: 81. DB::Exception:…"},
		{"unknown setting", params("nosuch", "1"), "SELECT 1", 404, "Code: 115. DB::Exception:…"},
		{"no query", "", "", 400, "Code: 62.…"},
		{"two statements", "", "SELECT 1; SELECT 2", 400, "Code: 62. DB::Exception: Syntax error: multi-statements are not allowed…"},
		{"time limit", params("max_execution_time", "1", "wait_end_of_query", "1"), "SELECT sleepEachRow(0.2) FROM numbers(100) SETTINGS max_block_size = 1", 408, "Code: 159.…"},
		{"out to a file", "", "SELECT 1 INTO OUTFILE '/tmp/never'", 403, "Code: 497.…"},
		{"in from a file", "", "INSERT INTO t FROM INFILE '/etc/passwd' FORMAT CSV", 403, "Code: 497.…"},
		{"file function", "", "SELECT * FROM file('/etc/passwd', LineAsString)", 403, "Code: 497.…"},
		{"file as table", "", "SELECT * FROM `/etc/passwd`", 404, "Code: 60.…"},
		{"file as table of default", "", "SELECT * FROM default.`/etc/passwd`", 404, "Code: 60.…"},
		{"error in the answer's middle", "", "SELECT throwIf(number = 300000) FROM numbers(400000)", 200, "0\n…"},
		{"nothing for exit", "", "exit", 400, "Code: 62.…"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := post(t, e, c.params, strings.NewReader(c.body))
			if a.status != c.status {
				t.Errorf("status %d, want %d", a.status, c.status)
			}
			if part, ok := strings.CutSuffix(c.want, "…"); ok && !strings.HasPrefix(a.body, part) || !ok && a.body != c.want {
				t.Errorf("got %.300q, want %q", a.body, c.want)
			}
			if a.status != 200 && a.header.Get("X-ClickHouse-Exception-Code") == "" {
				t.Error("no X-ClickHouse-Exception-Code")
			}
			if c.name == "error in the answer's middle" && (a.err == nil || !strings.Contains(a.body, "\r\n__exception__\r\n") || !strings.Contains(a.body, "Code: 395")) {
				t.Errorf("a broken answer passes for a whole one: %v, …%q", a.err, a.body[max(0, len(a.body)-200):])
			}
		})
	}
}

func TestHTTPGet(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for path, want := range map[string]string{
		"/ping": "Ok.\n", "/": "Ok.\n", "/replicas_status": "Ok.\n", "/?query=SELECT+1": "1\n",
		"/?query=CREATE+DATABASE+never_by_get": "",
	} {
		res, err := http.Get("http://" + e.HTTPAddr() + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if want == "" {
			if res.StatusCode == http.StatusOK {
				t.Errorf("%s changed something: a GET must not", path)
			}
			continue
		}
		if string(body) != want || res.StatusCode != http.StatusOK {
			t.Errorf("%s: %s %q, want %q", path, res.Status, body, want)
		}
	}
}

func TestHTTPInserts(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	zipped := func(wrap func(io.Writer) io.WriteCloser) func(string) io.Reader {
		return func(s string) io.Reader {
			var b bytes.Buffer
			w := wrap(&b)
			_, _ = io.WriteString(w, s)
			_ = w.Close()
			return &b
		}
	}
	plain := func(s string) io.Reader { return strings.NewReader(s) }
	big := strings.Repeat("{\"a\":1,\"s\":\"x\"}\n", 200_000)
	for _, c := range []struct {
		name, query, body, encoding, want string
		encode                            func(string) io.Reader
	}{
		{"values", "", "INSERT INTO t VALUES (1, 'a'), (2, 'it''s; fine'),\n(3, 'FORMAT')", "", "3\t6", plain},
		{"values, columns, semicolon", "", "INSERT INTO t (s, a) VALUES ('x', 5);\n", "", "1\t5", plain},
		{"json lines in the body", "", "INSERT INTO t FORMAT JSONEachRow\n{\"a\":1}\n{\"a\":2,\"s\":\"x\"}", "", "2\t3", plain},
		{"query in the url", "INSERT INTO t FORMAT CSV", "1,\"a\"\n2,\"b\"\n", "", "2\t3", plain},
		{"table with database and quotes", "INSERT INTO `{db}`.\"t\" (a) FORMAT TSV", "1\n2\n", "", "2\t3", plain},
		{"settings clause", "INSERT INTO t (a, s) SETTINGS async_insert = 0 FORMAT TSV", "1\tx\n", "", "1\t1", plain},
		{"many rows", "INSERT INTO t FORMAT JSONEachRow", big, "", "200000\t200000", plain},
		{"many rows behind the query", "", "INSERT INTO t FORMAT JSONEachRow\n" + big, "", "200000\t200000", plain},
		{"gzip", "INSERT INTO t FORMAT JSONEachRow", big, "gzip", "200000\t200000", zipped(func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) })},
		{"lz4", "INSERT INTO t FORMAT JSONEachRow", big, "lz4", "200000\t200000", zipped(func(w io.Writer) io.WriteCloser { return lz4.NewWriter(w) })},
		{"zstd", "INSERT INTO t FORMAT JSONEachRow", big, "zstd", "200000\t200000", zipped(func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z })},
		{"select", "", "INSERT INTO t SELECT number, 's' FROM numbers(4)", "", "4\t6", plain},
		{"no data", "INSERT INTO t FORMAT JSONEachRow", "", "", "0\t0", plain},
		{"comment before", "", "/* a */ INSERT -- b\n INTO TABLE t VALUES (9, 'x')", "", "1\t9", plain},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db := enginetest.Database(t, e)
			enginetest.Query(t, e, "CREATE TABLE "+db+".t (a UInt64, s String DEFAULT 'none') ENGINE = MergeTree ORDER BY a")
			pairs := []string{"database", db}
			if c.query != "" {
				pairs = append(pairs, "query", strings.ReplaceAll(c.query, "{db}", db))
			}
			a := post(t, e, params(pairs...), c.encode(c.body), "Content-Encoding", c.encoding)
			if a.status != http.StatusOK || a.body != "" {
				t.Fatalf("status %d: %s", a.status, a.body)
			}
			if got := enginetest.Query(t, e, "SELECT count(), sum(a) FROM "+db+".t"); got != c.want {
				t.Errorf("table has %q, want %q", got, c.want)
			}
			if !strings.Contains(a.header.Get("X-ClickHouse-Summary"), "written_rows") {
				t.Errorf("summary %q", a.header.Get("X-ClickHouse-Summary"))
			}
		})
	}
}

func TestHTTPInsertErrorNamesTheRow(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	db := enginetest.Database(t, e)
	enginetest.Query(t, e, "CREATE TABLE "+db+".t (a UInt64) ENGINE = MergeTree ORDER BY a")
	a := post(t, e, params("database", db, "query", "INSERT INTO t FORMAT JSONEachRow"), strings.NewReader("{\"a\":1}\n{\"a\":\"x\"}\n"))
	if a.status != http.StatusBadRequest || !strings.Contains(a.body, "at row 2") {
		t.Errorf("%d %s", a.status, a.body)
	}
	if got := enginetest.Query(t, e, "SELECT count() FROM "+db+".t"); got != "0" {
		t.Errorf("%s rows stored of a broken insert", got)
	}
}

func TestHTTPCompressedAnswers(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	a := post(t, e, params("enable_http_compression", "1"), strings.NewReader("SELECT number FROM numbers(100000)"), "Accept-Encoding", "gzip")
	if a.header.Get("Content-Encoding") != "gzip" {
		t.Fatalf("Content-Encoding %q", a.header.Get("Content-Encoding"))
	}
	r, err := gzip.NewReader(strings.NewReader(a.body))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil || !bytes.HasSuffix(b, []byte("\n99999\n")) {
		t.Errorf("%v, ends with %q", err, b[max(0, len(b)-20):])
	}
}

func TestPassword(t *testing.T) {
	t.Parallel()
	e, err := engine.Start(t.Context(), engine.Config{DataDir: t.TempDir(), NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0", Password: "s3cret"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	for _, c := range []struct {
		params, header, value string
		status                int
	}{
		{"", "", "", 401},
		{params("password", "wrong"), "", "", 401},
		{params("user", "default", "password", "s3cret"), "", "", 200},
		{params("user", "other", "password", "s3cret"), "", "", 401},
		{"", "Authorization", "Basic ZGVmYXVsdDpzM2NyZXQ=", 200},
	} {
		if a := post(t, e, c.params, strings.NewReader("SELECT 1"), c.header, c.value); a.status != c.status {
			t.Errorf("%q %q: status %d, want %d", c.params, c.value, a.status, c.status)
		}
	}
}

func TestForeignPagesAreRefused(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for _, c := range []struct {
		host, origin string
		status       int
	}{
		{"", "", 200},
		{"localhost:8123", "", 200},
		{"host.docker.internal:8123", "", 200},
		{"", "http://" + e.HTTPAddr(), 200},
		{"", "https://evil.example", 403},
		{"", "null", 403},
		{"evil.example:8123", "", 403},
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+e.HTTPAddr()+"/", strings.NewReader("SELECT 1"))
		if err != nil {
			t.Fatal(err)
		}
		if c.host != "" {
			req.Host = c.host
		}
		if c.origin != "" {
			req.Header.Set("Origin", c.origin)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != c.status {
			t.Errorf("%+v: status %d", c, res.StatusCode)
		}
	}
}
