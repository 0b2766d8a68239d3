package engine_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/ext"
	"github.com/pressly/goose/v3"

	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
)

func TestSessionsAreApart(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	one := func(o *clickhouse.Options) { o.MaxOpenConns = 1 }
	a, b := open(t, e, clickhouse.Native, "default", one), open(t, e, clickhouse.Native, "system", one)
	ask := func(conn clickhouse.Conn, ctx context.Context, query string) string {
		t.Helper()
		var s string
		if err := conn.QueryRow(ctx, query).Scan(&s); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
		return s
	}
	const threads = "SELECT toString(getSetting('max_threads'))"
	was := ask(a, t.Context(), threads)
	with := clickhouse.Context(t.Context(), clickhouse.WithSettings(clickhouse.Settings{"max_threads": 9}))
	if got := ask(a, with, threads); got != "9" {
		t.Errorf("a query's own setting is %s, want 9", got)
	}
	if got := ask(a, t.Context(), threads); got != was {
		t.Errorf("a query's setting stayed: %s, want %s", got, was)
	}
	if err := a.Exec(t.Context(), "SET max_threads = 5"); err != nil {
		t.Fatal(err)
	}
	if got := ask(a, with, threads); got != "9" {
		t.Errorf("a query's own setting is %s, want 9", got)
	}
	if got := ask(a, t.Context(), threads); got != "5" {
		t.Errorf("the session's setting is %s, want 5", got)
	}
	if got := ask(b, t.Context(), threads); got != was {
		t.Errorf("another session's setting is %s, want %s", got, was)
	}
	if got := ask(b, t.Context(), "SELECT currentDatabase()"); got != "system" {
		t.Errorf("database %s, want system", got)
	}
	if err := a.Exec(t.Context(), "CREATE TEMPORARY TABLE mine (a UInt8)"); err != nil {
		t.Fatal(err)
	}
	if err := a.Exec(t.Context(), "SELECT * FROM mine"); err != nil {
		t.Errorf("temporary table: %v", err)
	}
	if err := b.Exec(t.Context(), "SELECT * FROM mine"); err == nil {
		t.Error("another session sees a temporary table")
	}
}

func TestUnknownDatabaseFailsTheHandshake(t *testing.T) {
	t.Parallel()
	conn := open(t, enginetest.Start(t), clickhouse.Native, "nowhere")
	var exception *clickhouse.Exception
	if err := conn.Ping(t.Context()); !errors.As(err, &exception) || exception.Code != 81 {
		t.Errorf("got %v, want UNKNOWN_DATABASE", err)
	}
}

func TestUnknownSetting(t *testing.T) {
	t.Parallel()
	conn := open(t, enginetest.Start(t), clickhouse.Native, "")
	ctx := clickhouse.Context(t.Context(), clickhouse.WithSettings(clickhouse.Settings{"no_such_thing": 1}))
	var exception *clickhouse.Exception
	if err := conn.Exec(ctx, "SELECT 1"); !errors.As(err, &exception) || exception.Code != 115 {
		t.Errorf("got %v, want UNKNOWN_SETTING", err)
	}
	if err := conn.Exec(t.Context(), "SELECT 1"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestParameters(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for name, protocol := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := open(t, e, protocol, "")
			for _, value := range []string{"plain", "it's", `back\slash`, `"double"`, "naïve"} {
				var got string
				ctx := clickhouse.Context(t.Context(), clickhouse.WithParameters(clickhouse.Parameters{"who": value}))
				if err := conn.QueryRow(ctx, "SELECT {who:String}").Scan(&got); err != nil || got != value {
					t.Errorf("parameter %q came back as %q, %v", value, got, err)
				}
				if err := conn.QueryRow(t.Context(), "SELECT ?", value).Scan(&got); err != nil || got != value {
					t.Errorf("bound %q came back as %q, %v", value, got, err)
				}
			}
		})
	}
}

func TestCancelEndsTheQuery(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for name, protocol := range protocols {
		for kind, query := range map[string]string{
			"silent": "SELECT count() FROM system.numbers WHERE NOT ignore('%s')",
			"stream": "SELECT number FROM system.numbers WHERE NOT ignore('%s')",
			"insert": "INSERT INTO FUNCTION null('x UInt64') SELECT number FROM system.numbers WHERE NOT ignore('%s')",
		} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				conn := open(t, e, protocol, "")
				mark := "cancel " + name + kind
				running := func() bool {
					return enginetest.Query(t, e, "SELECT count() FROM system.processes WHERE query LIKE '%ignore(\\'"+mark+"\\')%' AND query NOT LIKE '%system.processes%'") != "0"
				}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() {
					query := fmt.Sprintf(query, mark)
					if kind != "stream" {
						done <- conn.Exec(ctx, query)
						return
					}
					rows, err := conn.Query(ctx, query)
					if err == nil {
						for rows.Next() {
						}
						err = rows.Err()
					}
					done <- err
				}()
				waitFor(t, running)
				cancel()
				if err := <-done; err == nil {
					t.Error("a cancelled query reports success")
				}
				waitFor(t, func() bool { return !running() })
			})
		}
	}
}

func TestProgressAndProfile(t *testing.T) {
	t.Parallel()
	conn := open(t, enginetest.Start(t), clickhouse.Native, "")
	var (
		rows    atomic.Uint64
		profile atomic.Uint64
		packets atomic.Int64
	)
	ctx := clickhouse.Context(t.Context(),
		clickhouse.WithProgress(func(p *clickhouse.Progress) { rows.Add(p.Rows); packets.Add(1) }),
		clickhouse.WithProfileInfo(func(p *clickhouse.ProfileInfo) { profile.Add(p.Rows) }))
	result, err := conn.Query(ctx, "SELECT number % 10 AS k, sleepEachRow(0.000004) FROM numbers(500000) LIMIT 500000 SETTINGS max_block_size = 50000")
	if err != nil {
		t.Fatal(err)
	}
	for result.Next() {
	}
	if err := result.Err(); err != nil {
		t.Fatal(err)
	}
	// What is read while the last block is made is not counted any more.
	if n := rows.Load(); n < 250_000 || n > 500_000 || profile.Load() != 500_000 {
		t.Errorf("progress of %d rows, profile of %d, want about 500000 and 500000", rows.Load(), profile.Load())
	}
	if packets.Load() < 2 {
		t.Errorf("%d progress packets in a query of two seconds", packets.Load())
	}
}

func TestExternalTable(t *testing.T) {
	t.Parallel()
	conn := open(t, enginetest.Start(t), clickhouse.Native, "")
	table, err := ext.NewTable("wanted", ext.Column("id", "UInt64"), ext.Column("name", "LowCardinality(String)"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if err := table.Append(uint64(i), "x"); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second finds no trace of the first
		var n uint64
		if err := conn.QueryRow(clickhouse.Context(t.Context(), clickhouse.WithExternalTable(table)),
			"SELECT count() FROM numbers(5) WHERE number IN (SELECT id FROM wanted)").Scan(&n); err != nil || n != 5 {
			t.Errorf("got %d, %v, want 5", n, err)
		}
	}
}

func TestEmptyResultsHaveColumns(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for name, protocol := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := open(t, e, protocol, enginetest.Database(t, e))
			for query, want := range map[string]string{
				"SELECT 1 AS a, 'x' AS b WHERE 0": "a b",
				"SHOW TABLES":                     "name",
				"WITH 1 AS x SELECT x AS y FROM numbers(0) -- a comment":      "y",
				"SELECT number AS n FROM numbers(0) SETTINGS max_threads = 1": "n",
			} {
				rows, err := conn.Query(t.Context(), query)
				if err != nil {
					t.Errorf("%s: %v", query, err)
					continue
				}
				if got := strings.Join(rows.Columns(), " "); got != want {
					t.Errorf("%s: columns %q, want %q", query, got, want)
				}
				if rows.Next() {
					t.Errorf("%s: has a row", query)
				}
			}
		})
	}
}

func TestInsertForms(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	conn := open(t, e, clickhouse.Native, enginetest.Database(t, e))
	ctx := t.Context()
	for _, q := range []string{
		"CREATE TABLE t (a UInt64, b String DEFAULT concat('d', toString(a)), m UInt64 MATERIALIZED a + 1, l UInt64 ALIAS a + 2) ENGINE = MergeTree ORDER BY a",
		"INSERT INTO t (a) VALUES (1), (2)",
		"INSERT INTO t VALUES (3, 'x')",
		"INSERT INTO t (b, a) SELECT 'y', 4",
		"INSERT INTO t (* EXCEPT (b)) VALUES (5)",
		"INSERT INTO t FORMAT JSONEachRow {\"a\": 6}",
	} {
		if err := conn.Exec(ctx, q); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
	batch, err := conn.PrepareBatch(ctx, "INSERT INTO t (b, a)")
	if err != nil {
		t.Fatal(err)
	}
	if err := batch.Append("z", uint64(7)); err != nil {
		t.Fatal(err)
	}
	if err := batch.Send(); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := conn.QueryRow(ctx, "SELECT arrayStringConcat(groupArray(concat(toString(a), b, toString(m), toString(l))), ' ') FROM (SELECT a, b, m, l FROM t ORDER BY a)").Scan(&got); err != nil {
		t.Fatal(err)
	}
	if want := "1d123 2d234 3x45 4y56 5d567 6d678 7z89"; got != want {
		t.Errorf("table has %s, want %s", got, want)
	}
	for _, q := range []string{"INSERT INTO nowhere (a)", "INSERT INTO t (nothing)"} {
		if _, err := conn.PrepareBatch(ctx, q); err == nil {
			t.Errorf("%s: no error", q)
		}
	}
}

func TestLargeResult(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	conn := open(t, e, clickhouse.Native, "")
	rows, err := conn.Query(t.Context(), "SELECT number, repeat('x', 100) FROM numbers(1000000)")
	if err != nil {
		t.Fatal(err)
	}
	n := uint64(0)
	for rows.Next() {
		var (
			v uint64
			s string
		)
		if err := rows.Scan(&v, &s); err != nil || v != n || len(s) != 100 {
			t.Fatalf("row %d: %d, %d bytes, %v", n, v, len(s), err)
		}
		n++
	}
	if err := rows.Err(); err != nil || n != 1_000_000 {
		t.Errorf("%d rows, %v", n, err)
	}
}

func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	conn := open(t, e, clickhouse.Native, "", func(o *clickhouse.Options) { o.MaxOpenConns = 40 })
	var wg sync.WaitGroup
	for range 40 {
		wg.Go(func() {
			var n uint64
			if err := conn.QueryRow(t.Context(), "SELECT count() FROM numbers(100000)").Scan(&n); err != nil || n != 100_000 {
				t.Errorf("got %d, %v", n, err)
			}
		})
	}
	wg.Wait()
}

func TestChGo(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for _, compression := range []ch.Compression{ch.CompressionDisabled, ch.CompressionLZ4, ch.CompressionZSTD} {
		t.Run(fmt.Sprint(compression), func(t *testing.T) {
			t.Parallel()
			client, err := ch.Dial(t.Context(), ch.Options{Address: e.NativeAddr(), Database: enginetest.Database(t, e), Compression: compression})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = client.Close() })
			if err := client.Do(t.Context(), ch.Query{Body: "CREATE TABLE t (a UInt64, s LowCardinality(String), at DateTime64(9, 'UTC')) ENGINE = MergeTree ORDER BY a"}); err != nil {
				t.Fatal(err)
			}
			var (
				a      proto.ColUInt64
				s      = new(proto.ColStr).LowCardinality()
				at     = new(proto.ColDateTime64).WithPrecision(proto.PrecisionNano)
				blocks int
			)
			err = client.Do(t.Context(), ch.Query{
				Body:  "INSERT INTO t (a, s, at) VALUES",
				Input: proto.Input{{Name: "a", Data: &a}, {Name: "s", Data: s}, {Name: "at", Data: at}},
				OnInput: func(context.Context) error {
					a.Reset()
					s.Reset()
					at.Reset()
					for i := range 1000 {
						a.Append(uint64(blocks*1000 + i))
						s.Append("v")
						at.Append(time.Unix(int64(i), 0))
					}
					if blocks++; blocks == 5 {
						return io.EOF
					}
					return nil
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			var sum proto.ColUInt64
			if err := client.Do(t.Context(), ch.Query{Body: "SELECT sum(a) AS sum FROM t", Result: proto.Results{{Name: "sum", Data: &sum}}}); err != nil {
				t.Fatal(err)
			}
			if sum.Rows() != 1 || sum[0] != 4999*5000/2 {
				t.Errorf("sum %v", sum)
			}
			if err := client.Ping(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestGoose(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	name := enginetest.Database(t, e)
	for scheme, addr := range map[string]string{"clickhouse": e.NativeAddr(), "http": e.HTTPAddr()} {
		t.Run(scheme, func(t *testing.T) {
			db, err := sql.Open("clickhouse", scheme+"://"+addr+"/"+name)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			files := fstest.MapFS{"1_one.sql": {Data: []byte("-- +goose Up\nCREATE TABLE " + scheme + "_one (a UInt8) ENGINE = MergeTree ORDER BY a;\nINSERT INTO " + scheme + "_one VALUES (1);\n-- +goose Down\nDROP TABLE " + scheme + "_one;\n")}}
			provider, err := goose.NewProvider(goose.DialectClickHouse, db, fs.FS(files), goose.WithTableName(scheme+"_versions"))
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := provider.Up(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if version, err := provider.GetDBVersion(t.Context()); err != nil || version != 1 {
				t.Errorf("version %d, %v", version, err)
			}
			if _, err := provider.DownTo(t.Context(), 0); err != nil {
				t.Error(err)
			}
		})
	}
}
