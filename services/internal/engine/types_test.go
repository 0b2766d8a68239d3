package engine_test

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
)

// typeCases are values that must come back as they went in, alone, in an array
// and among others. want is what toString gives for the first.
var typeCases = []struct {
	name   string
	values []any
	text   string // toString of the first value
}{
	{"String", []any{"a", "", strings.Repeat("long ", 30_000), "naïve 'quoted' \\ \n\t\x00"}, "a"},
	{"LowCardinality(String)", []any{"x", "y", "x", ""}, "x"},
	{"LowCardinality(Nullable(String))", []any{ptr("x"), (*string)(nil), ptr("x")}, "x"},
	{"FixedString(3)", []any{"abc", "xyz"}, "abc"},
	{"UInt8", []any{uint8(0), uint8(255)}, "0"},
	{"UInt16", []any{uint16(1), uint16(65535)}, "1"},
	{"UInt32", []any{uint32(1), uint32(1 << 31)}, "1"},
	{"UInt64", []any{uint64(1), uint64(1) << 63}, "1"},
	{"Int8", []any{int8(-1), int8(127)}, "-1"},
	{"Int64", []any{int64(-1), int64(1) << 62}, "-1"},
	{"Float32", []any{float32(0.5), float32(-3)}, "0.5"},
	{"Float64", []any{0.5, -1e300}, "0.5"},
	{"Bool", []any{true, false}, "true"},
	{"Date", []any{time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)}, "2026-11-21"},
	{"DateTime", []any{time.Date(2026, 11, 21, 17, 40, 0, 0, time.UTC)}, "2026-11-21 17:40:00"},
	{"DateTime64(9, 'UTC')", []any{time.Date(2026, 11, 21, 17, 40, 0, 123456789, time.UTC)}, "2026-11-21 17:40:00.123456789"},
	{"UUID", []any{uuid.MustParse("0198f2d4-0000-7000-8000-000000000001")}, "0198f2d4-0000-7000-8000-000000000001"},
	{"IPv4", []any{net.ParseIP("203.0.113.7"), net.ParseIP("0.0.0.1")}, "203.0.113.7"},
	{"IPv6", []any{net.ParseIP("2001:db8::7"), net.ParseIP("203.0.113.7")}, "2001:db8::7"},
	{"Enum8('allow' = 1, 'deny' = 2)", []any{"allow", "deny"}, "allow"},
	{"Enum16('a)b' = -500, 'c, d' = 2)", []any{"a)b", "c, d"}, "a)b"},
	{"Array(String)", []any{[]string{"a", "b"}, []string{}, []string{"c"}}, "['a','b']"},
	{"Array(Array(UInt8))", []any{[][]uint8{{1, 2}, {}, {3}}, [][]uint8{}}, "[[1,2],[],[3]]"},
	{"Array(LowCardinality(String))", []any{[]string{"a", "b"}, []string{}, []string{"b"}}, "['a','b']"},
	{"Nullable(String)", []any{ptr("x"), (*string)(nil)}, "x"},
	{"Nullable(Float64)", []any{ptr(1.5), (*float64)(nil)}, "1.5"},
	{"Map(String, UInt64)", []any{map[string]uint64{"a": 1}, map[string]uint64{}}, "{'a':1}"},
	{"Map(LowCardinality(String), Array(UInt8))", []any{map[string][]uint8{"a": {1, 2}}}, "{'a':[1,2]}"},
	{"SimpleAggregateFunction(max, UInt64)", []any{uint64(7)}, "7"},
	{"Int128", nil, ""},
	{"Decimal(18, 4)", nil, ""},
	{"Decimal(50, 4)", nil, ""},
}

func ptr[T any](v T) *T { return &v }

func TestTypes(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for name, protocol := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := open(t, e, protocol, enginetest.Database(t, e))
			for i, c := range typeCases {
				t.Run(c.name, func(t *testing.T) {
					table := fmt.Sprintf("t%d", i)
					// The columns beside it show that its end was found.
					if err := conn.Exec(t.Context(), "CREATE TABLE "+table+" (n UInt32, v "+c.name+", tail String) ENGINE = MergeTree ORDER BY n"); err != nil {
						t.Fatal(err)
					}
					if c.values == nil { // only read
						if err := conn.Exec(t.Context(), "INSERT INTO "+table+" SELECT number, toInt64(number), 'tail' FROM numbers(3)"); err != nil {
							t.Fatal(err)
						}
					} else {
						storeValues(t, conn, table, c.values, c.text)
					}
					readValues(t, conn, table, c.values)
				})
			}
		})
	}
}

// storeValues inserts values in one batch and checks how the engine writes the first.
func storeValues(t *testing.T, conn driver.Conn, table string, values []any, want string) {
	t.Helper()
	batch, err := conn.PrepareBatch(t.Context(), "INSERT INTO "+table)
	if err != nil {
		t.Fatal(err)
	}
	for n, v := range values {
		if err := batch.Append(uint32(n), v, "tail"); err != nil {
			t.Fatal(err)
		}
	}
	if err := batch.Send(); err != nil {
		t.Fatal(err)
	}
	var text string
	if err := conn.QueryRow(t.Context(), "SELECT toString(v) FROM "+table+" WHERE n = 0").Scan(&text); err != nil {
		t.Fatal(err)
	}
	if text != want {
		t.Errorf("stored %q, want %q", text, want)
	}
}

// readValues reads a table back; without values it only counts three rows.
func readValues(t *testing.T, conn driver.Conn, table string, values []any) {
	t.Helper()
	rows, err := conn.Query(t.Context(), "SELECT n, v, tail, [v, v] AS many FROM "+table+" ORDER BY n")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	n := 0
	for ; rows.Next(); n++ {
		var (
			at   uint32
			tail string
		)
		v, many := reflect.New(rows.ColumnTypes()[1].ScanType()), reflect.New(rows.ColumnTypes()[3].ScanType())
		if err := rows.Scan(&at, v.Interface(), &tail, many.Interface()); err != nil {
			t.Fatal(err)
		}
		if int(at) != n || tail != "tail" {
			t.Errorf("row %d came as %d, %q", n, at, tail)
		}
		if values != nil && fmt.Sprint(deref(v)) != fmt.Sprint(deref(reflect.ValueOf(values[n]))) {
			t.Errorf("row %d came back as %v, want %v", n, deref(v), values[n])
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	if want := cmp.Or(len(values), 3); n != want {
		t.Errorf("%d rows, want %d", n, want)
	}
}

// deref is what a value or a pointer to it says.
func deref(v reflect.Value) any {
	for v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return nil
		}
		v = v.Elem()
	}
	if b, ok := v.Interface().(interface{ String() string }); ok {
		return b.String()
	}
	return v.Interface()
}

func TestUnsupportedTypesSaySo(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for name, protocol := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := open(t, e, protocol, "")
			rows, err := conn.Query(t.Context(), "SELECT uniqState(number) FROM numbers(3)")
			if err == nil {
				for rows.Next() {
				}
				err = rows.Err()
			}
			var exception *clickhouse.Exception
			if !errors.As(err, &exception) || exception.Code != 48 || !strings.Contains(exception.Message, "AggregateFunction") {
				t.Errorf("got %v, want NOT_IMPLEMENTED that names the type", err)
			}
			if err := conn.Ping(t.Context()); err != nil {
				t.Errorf("the connection does not live on: %v", err)
			}
		})
	}
}

// Aggregation states stay in the engine; what comes out of them is plain.
func TestAggregatingMaterializedView(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	conn := open(t, e, clickhouse.Native, enginetest.Database(t, e))
	for _, ddl := range []string{
		"CREATE TABLE events (key LowCardinality(String), at DateTime64(9, 'UTC'), ip IPv6) ENGINE = MergeTree ORDER BY at",
		"CREATE TABLE hourly (key LowCardinality(String), hour DateTime, ips AggregateFunction(uniq, IPv6), n SimpleAggregateFunction(sum, UInt64)) ENGINE = AggregatingMergeTree ORDER BY (key, hour)",
		"CREATE MATERIALIZED VIEW hourly_mv TO hourly AS SELECT key, toStartOfHour(at) AS hour, uniqState(ip) AS ips, count() AS n FROM events GROUP BY key, hour",
	} {
		if err := conn.Exec(t.Context(), ddl); err != nil {
			t.Fatal(err)
		}
	}
	batch, err := conn.PrepareBatch(t.Context(), "INSERT INTO events")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		if err := batch.Append("k", time.Unix(1_800_000_000, 0).UTC(), fmt.Sprintf("2001:db8::%x", i%7)); err != nil {
			t.Fatal(err)
		}
	}
	if err := batch.Send(); err != nil {
		t.Fatal(err)
	}
	var ips, n uint64
	if err := conn.QueryRow(t.Context(), "SELECT uniqMerge(ips), sum(n) FROM hourly").Scan(&ips, &n); err != nil || ips != 7 || n != 1000 {
		t.Errorf("rollup has %d addresses and %d events (%v), want 7 and 1000", ips, n, err)
	}
}

// JSON columns travel as text, the one form that all clients read.
func TestJSON(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for name, protocol := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := open(t, e, protocol, enginetest.Database(t, e))
			if err := conn.Exec(t.Context(), "CREATE TABLE t (n UInt8, v JSON) ENGINE = MergeTree ORDER BY n"); err != nil {
				t.Fatal(err)
			}
			batch, err := conn.PrepareBatch(t.Context(), "INSERT INTO t")
			if err != nil {
				t.Fatal(err)
			}
			if err := batch.Append(uint8(1), `{"a":{"b":1},"c":["x"]}`); err != nil {
				t.Fatal(err)
			}
			if err := batch.Send(); err != nil {
				t.Fatal(err)
			}
			var whole, part string
			if err := conn.QueryRow(t.Context(), "SELECT v, toString(v.a.b) FROM t").Scan(&whole, &part); err != nil {
				t.Fatal(err)
			}
			if whole != `{"a":{"b":1},"c":["x"]}` || part != "1" {
				t.Errorf("read %s and %s", whole, part)
			}
		})
	}
}
