package sql

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		query  string
		kind   Kind
		text   string
		format string
	}{
		{"SELECT 1", Select, "SELECT 1", ""},
		{"select 1;", Select, "select 1", ""},
		{" -- note\n/* more */ SELECT 1 FORMAT JSON ;; -- end", Select, " -- note\n/* more */ SELECT 1  ", "JSON"},
		{"SELECT 'FORMAT x; SELECT', \"a;b\", `c;d` FROM t FORMAT `CSV`", Select, "SELECT 'FORMAT x; SELECT', \"a;b\", `c;d` FROM t ", "CSV"},
		{"SELECT 1 FORMAT JSON SETTINGS max_threads = 1", Select, "SELECT 1  SETTINGS max_threads = 1", "JSON"},
		{"SELECT 'it''s', 'a\\'b;' AS x", Select, "SELECT 'it''s', 'a\\'b;' AS x", ""},
		{"SELECT $$ ; $$, $tag$ ';' $tag$", Select, "SELECT $$ ; $$, $tag$ ';' $tag$", ""},
		{"(SELECT 1) UNION ALL (SELECT 2)", Select, "(SELECT 1) UNION ALL (SELECT 2)", ""},
		{"SELECT format('{}', 'x')", Select, "SELECT format('{}', 'x')", ""},
		{"SHOW TABLES", Show, "SHOW TABLES", ""},
		{"SET a = 1", Set, "SET a = 1", ""},
		{"CREATE TABLE t (a UInt8) ENGINE = MergeTree ORDER BY a", Other, "CREATE TABLE t (a UInt8) ENGINE = MergeTree ORDER BY a", ""},
		{"INSERT INTO t SELECT * FROM u", Other, "INSERT INTO t SELECT * FROM u", ""},
		{"INSERT INTO t (a, b) WITH 1 AS x SELECT x, 2", Other, "INSERT INTO t (a, b) WITH 1 AS x SELECT x, 2", ""},
		{"INSERT INTO t (SELECT 1)", Other, "INSERT INTO t (SELECT 1)", ""},
		{"INSERT INTO FUNCTION null('x UInt8') SELECT 1", Other, "INSERT INTO FUNCTION null('x UInt8') SELECT 1", ""},
	} {
		s, err := Parse(c.query)
		if err != nil || s.Kind != c.kind || s.Text != c.text || s.Format != c.format {
			t.Errorf("%q: %+v, %v", c.query, s, err)
		}
	}
}

func TestParseInsert(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		query string
		want  InsertHead
		data  string
	}{
		{"INSERT INTO t VALUES (1)", InsertHead{Into: "INSERT INTO t", Table: "t", Format: "Values"}, " (1)"},
		{"insert into db.`t x` (a, `b)`) values", InsertHead{Into: "insert into db.`t x` (a, `b)`)", Table: "db.`t x`", Columns: "(a, `b)`)", Format: "Values"}, ""},
		{"INSERT INTO TABLE t FORMAT JSONEachRow\n{\"a\":1}", InsertHead{Into: "INSERT INTO TABLE t", Table: "t", Format: "JSONEachRow"}, "{\"a\":1}"},
		{"INSERT INTO t FORMAT Native \x01\x02", InsertHead{Into: "INSERT INTO t", Table: "t", Format: "Native"}, "\x01\x02"},
		{"INSERT INTO t FORMAT TSV\r\n\tx", InsertHead{Into: "INSERT INTO t", Table: "t", Format: "TSV"}, "\tx"},
		{"INSERT INTO t (a) SETTINGS x = 'VALUES', y = 2 FORMAT CSV\n;", InsertHead{Into: "INSERT INTO t (a)", Table: "t", Columns: "(a)", Settings: "SETTINGS x = 'VALUES', y = 2", Format: "CSV"}, ";"},
		{"INSERT INTO t (a, b)", InsertHead{Into: "INSERT INTO t (a, b)", Table: "t", Columns: "(a, b)", Format: "Values"}, ""},
		{"INSERT INTO t (* EXCEPT(a)) VALUES", InsertHead{Into: "INSERT INTO t (* EXCEPT(a))", Table: "t", Columns: "(* EXCEPT(a))", Format: "Values"}, ""},
	} {
		s, err := Parse(c.query)
		if err != nil || s.Kind != Insert {
			t.Errorf("%q: %+v, %v", c.query, s, err)
			continue
		}
		data := c.query[s.Insert.DataOffset:]
		s.Insert.DataOffset = 0
		if s.Insert != c.want || data != c.data {
			t.Errorf("%q: %+v with data %q", c.query, s.Insert, data)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	for query, want := range map[string]error{
		"": ErrEmpty, " -- nothing\n": ErrEmpty, ";": ErrEmpty,
		"SELECT 1; SELECT 2": ErrMultiple, "CREATE TABLE t (a Int8); DROP TABLE t;": ErrMultiple,
		"SELECT * FROM file('/etc/passwd')": ErrFiles, "SELECT FILE ('x')": ErrFiles, "SELECT * FROM `file`('x')": ErrFiles,
		"SELECT 1 INTO OUTFILE 'x'": ErrFiles, "SELECT 1 INTO /* */ outfile 'x'": ErrFiles, "INSERT INTO t FROM INFILE 'x'": ErrFiles,
		"INSERT INTO FUNCTION file('x') SELECT 1":           ErrFiles,
		"CREATE TABLE t (a String) ENGINE = File(CSV, 'x')": ErrFiles, "CREATE DATABASE d ENGINE = Filesystem('/')": ErrFiles,
		"exit": ErrExit, " QUIT ;": ErrExit,
	} {
		if _, err := Parse(query); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", query, err, want)
		}
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	for list, want := range map[string][]string{"(a, `b c`,n.x)": {"a", "b c", "n.x"}, "": nil, "(`we``ird`)": {"we`ird"}} {
		if got, plain := Names(list); !plain || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v", list, got, plain)
		}
	}
	for _, list := range []string{"(*)", "(* EXCEPT(a))", "(a, 1)", "()"} {
		if _, plain := Names(list); plain {
			t.Errorf("%q passes for names", list)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, q := range []string{"SELECT 1 FORMAT JSON", "INSERT INTO t (a) VALUES (1)", "INSERT INTO t FORMAT CSV\n1", "$a$", "'", "/*", "`\\"} {
		f.Add(q)
	}
	f.Fuzz(func(t *testing.T, query string) {
		s, err := Parse(query)
		if err != nil {
			return
		}
		if s.Kind == Insert && (s.Insert.DataOffset < 0 || s.Insert.DataOffset > len(query) || !strings.HasPrefix(query, s.Insert.Into)) {
			t.Errorf("%q: %+v", query, s.Insert)
		}
		if len(s.Text) > len(query) {
			t.Errorf("%q became longer: %q", query, s.Text)
		}
		Names(s.Insert.Columns)
	})
}
