package engine_test

import (
	"database/sql"
	"errors"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
)

func TestMain(m *testing.M) { enginetest.Main(m) }

// open connects clickhouse-go.
func open(t testing.TB, e *engine.Engine, protocol clickhouse.Protocol, database string, change ...func(*clickhouse.Options)) driver.Conn {
	t.Helper()
	addr := e.NativeAddr()
	if protocol == clickhouse.HTTP {
		addr = e.HTTPAddr()
	}
	opts := &clickhouse.Options{Addr: []string{addr}, Protocol: protocol, Auth: clickhouse.Auth{Database: database}}
	for _, c := range change {
		c(opts)
	}
	conn, err := clickhouse.Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

var protocols = map[string]clickhouse.Protocol{"native": clickhouse.Native, "http": clickhouse.HTTP}

func TestQueryAndBatch(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for name, protocol := range protocols {
		for compression, method := range map[string]clickhouse.CompressionMethod{"none": clickhouse.CompressionNone, "lz4": clickhouse.CompressionLZ4} {
			t.Run(name+"/"+compression, func(t *testing.T) {
				t.Parallel()
				conn := open(t, e, protocol, enginetest.Database(t, e), func(o *clickhouse.Options) {
					o.Compression = &clickhouse.Compression{Method: method}
				})
				checkQueryAndBatch(t, conn)
			})
		}
	}
}

func checkQueryAndBatch(t *testing.T, conn driver.Conn) {
	ctx := t.Context()
	if err := conn.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	if err := conn.Exec(ctx, "CREATE TABLE t (a UInt64, s String, l LowCardinality(String), at DateTime64(9, 'UTC')) ENGINE = MergeTree ORDER BY a"); err != nil {
		t.Fatal(err)
	}
	batch, err := conn.PrepareBatch(ctx, "INSERT INTO t (a, s, l, at)")
	if err != nil {
		t.Fatal(err)
	}
	const rows = 100_000
	now := time.Now().UTC().Truncate(time.Nanosecond)
	for i := range rows {
		if err := batch.Append(uint64(i), "row", []string{"x", "y"}[i%2], now); err != nil {
			t.Fatal(err)
		}
	}
	if err := batch.Send(); err != nil {
		t.Fatal(err)
	}
	var (
		count, sum uint64
		kinds      uint64
		at         time.Time
	)
	if err := conn.QueryRow(ctx, "SELECT count(), sum(a), uniqExact(l), max(at) FROM t").Scan(&count, &sum, &kinds, &at); err != nil {
		t.Fatal(err)
	}
	if count != rows || sum != rows*(rows-1)/2 || kinds != 2 || !at.Equal(now) {
		t.Errorf("read back count %d, sum %d, kinds %d, time %v (want %v)", count, sum, kinds, at, now)
	}
	all, err := conn.Query(ctx, "SELECT a, s, l, at FROM t ORDER BY a")
	if err != nil {
		t.Fatal(err)
	}
	defer all.Close()
	var n uint64
	for all.Next() {
		var (
			a    uint64
			s, l string
		)
		if err := all.Scan(&a, &s, &l, &at); err != nil {
			t.Fatal(err)
		}
		if a != n || s != "row" {
			t.Fatalf("row %d is %d %q", n, a, s)
		}
		n++
	}
	if err := all.Err(); err != nil || n != rows {
		t.Errorf("read %d rows, %v", n, err)
	}
	if err := conn.QueryRow(ctx, "SELECT a FROM t WHERE a = 1000000").Scan(&n); !errors.Is(err, sql.ErrNoRows) {
		t.Errorf("no row: %v", err)
	}
	err = conn.Exec(ctx, "SELECT * FROM nowhere")
	var exception *clickhouse.Exception
	if !errors.As(err, &exception) || exception.Code != 60 {
		t.Errorf("unknown table: %v", err)
	}
	if err := conn.Ping(ctx); err != nil {
		t.Errorf("after an exception: %v", err)
	}
}
