package engine_test

import (
	"context"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
)

var dedupTables = []string{
	"CREATE TABLE events (a UInt64, s String) ENGINE = MergeTree ORDER BY a SETTINGS non_replicated_deduplication_window = 1000",
	"CREATE TABLE sums (k UInt64, n UInt64) ENGINE = SummingMergeTree ORDER BY k SETTINGS non_replicated_deduplication_window = 1000",
	"CREATE MATERIALIZED VIEW sums_mv TO sums AS SELECT a % 10 AS k, count() AS n FROM events GROUP BY k",
}

// insertOnce sends rows in blocks, with a token.
func insertOnce(ctx context.Context, conn driver.Conn, token string, from, rows, blocks int) error {
	ctx = clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{
		"insert_deduplicate": 1, "insert_deduplication_token": token, "deduplicate_blocks_in_dependent_materialized_views": 1,
	}))
	batch, err := conn.PrepareBatch(ctx, "INSERT INTO events")
	if err != nil {
		return err
	}
	for i := range rows {
		if err := batch.Append(uint64(from+i), "row"); err != nil {
			return err
		}
		if blocks > 1 && (i+1)%(rows/blocks) == 0 {
			if err := batch.Flush(); err != nil {
				return err
			}
		}
	}
	return batch.Send()
}

func counts(t testing.TB, conn driver.Conn) (rows, unique, rolled uint64) {
	t.Helper()
	if err := conn.QueryRow(t.Context(), "SELECT count(), uniqExact(a) FROM events").Scan(&rows, &unique); err != nil {
		t.Fatal(err)
	}
	if err := conn.QueryRow(t.Context(), "SELECT sum(n) FROM sums").Scan(&rolled); err != nil {
		t.Fatal(err)
	}
	return rows, unique, rolled
}

func TestDeduplicationToken(t *testing.T) {
	t.Parallel()
	e := enginetest.Start(t)
	for name, protocol := range protocols {
		for _, blocks := range []int{1, 8} {
			t.Run(fmt.Sprintf("%s/%d blocks", name, blocks), func(t *testing.T) {
				t.Parallel()
				conn := open(t, e, protocol, enginetest.Database(t, e))
				for _, ddl := range dedupTables {
					if err := conn.Exec(t.Context(), ddl); err != nil {
						t.Fatal(err)
					}
				}
				const rows = 200_000
				for _, try := range []struct {
					token string
					from  int
				}{{"a", 0}, {"a", 0}, {"b", rows}, {"a", 0}, {"b", rows}, {"a", 5 * rows}} {
					if err := insertOnce(t.Context(), conn, try.token, try.from, rows, blocks); err != nil {
						t.Fatal(err)
					}
				}
				if all, unique, rolled := counts(t, conn); all != 2*rows || unique != 2*rows || rolled != 2*rows {
					t.Errorf("%d rows, %d unique, %d in the rollup, want %d", all, unique, rolled, 2*rows)
				}
			})
		}
	}
}

// More rows than the engine puts into one part: every part of the insert must
// be told again by its place.
func TestDeduplicationOfManyParts(t *testing.T) {
	if os.Getenv("LATCHKEY_TEST_LONG") == "" {
		t.Skip("set LATCHKEY_TEST_LONG=1 to insert millions of rows")
	}
	t.Parallel()
	e := enginetest.Start(t)
	conn := open(t, e, clickhouse.Native, enginetest.Database(t, e))
	for _, ddl := range dedupTables {
		if err := conn.Exec(t.Context(), ddl); err != nil {
			t.Fatal(err)
		}
	}
	const rows = 3_000_000
	for range 2 {
		if err := insertOnce(t.Context(), conn, "big", 0, rows, 30); err != nil {
			t.Fatal(err)
		}
	}
	if all, unique, rolled := counts(t, conn); all != rows || unique != rows || rolled != rows {
		t.Errorf("%d rows, %d unique, %d in the rollup, want %d", all, unique, rolled, rows)
	}
}

// Whatever was answered is there after kill -9, whatever was not is there once
// when the same token is sent again, and the ports stay.
func TestKilledWhileInserting(t *testing.T) {
	t.Parallel()
	e := enginetest.StartOwn(t)
	conn := open(t, e, clickhouse.Native, "default")
	for _, ddl := range dedupTables {
		if err := conn.Exec(t.Context(), ddl); err != nil {
			t.Fatal(err)
		}
	}
	const kills, rows, writers = 4, 10_000, 2
	var (
		wg       sync.WaitGroup
		inserted [writers]int
		stop     = make(chan struct{})
	)
	for w := range writers {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				from := (n*writers + w) * rows
				for insertOnce(t.Context(), conn, fmt.Sprint(from), from, rows, 1) != nil { // again until answered
					if t.Context().Err() != nil {
						return
					}
				}
				inserted[w]++
			}
		})
	}
	for k := range kills {
		before := e.Pid()
		waitFor(t, func() bool { return countOf(t, e) >= uint64(k*3*rows) })
		if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() bool { return e.Restarts() > k && e.Pid() != before })
	}
	close(stop)
	wg.Wait()
	want := uint64((inserted[0] + inserted[1]) * rows)
	if all, unique, rolled := counts(t, conn); all != want || unique != want || rolled != want {
		t.Errorf("%d rows, %d unique, %d in the rollup, want %d", all, unique, rolled, want)
	}
}

func countOf(t *testing.T, e *engine.Engine) uint64 {
	var n uint64
	_, _ = fmt.Sscan(enginetest.Query(t, e, "SELECT count() FROM events"), &n)
	return n
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for !ok() {
		select {
		case <-t.Context().Done():
			t.Fatal("gave up waiting")
		case <-pause():
		}
	}
}

// Killed between writing a block's id and making its part visible, the engine
// must not take the repeated insert for one that it has.
func TestInsertLostAmidDeduplicationComesBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	e, err := engine.Start(t.Context(), engine.Config{DataDir: dir, NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	conn := open(t, e, clickhouse.Native, "default")
	for _, ddl := range dedupTables {
		if err := conn.Exec(t.Context(), ddl); err != nil {
			t.Fatal(err)
		}
	}
	for n, token := range []string{"a", "b"} {
		if err := insertOnce(t.Context(), conn, token, n*100, 100, 1); err != nil {
			t.Fatal(err)
		}
	}
	lost := enginetest.Query(t, e, "SELECT path FROM system.parts WHERE table = 'events' AND active ORDER BY name DESC LIMIT 1")
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(lost); err != nil { // as if its rename had not been done
		t.Fatal(err)
	}
	e = enginetest.StartIn(t, dir)
	conn = open(t, e, clickhouse.Native, "default")
	for n, token := range []string{"a", "b"} {
		if err := insertOnce(t.Context(), conn, token, n*100, 100, 1); err != nil {
			t.Fatal(err)
		}
	}
	if all, unique, rolled := counts(t, conn); all != 200 || unique != 200 || rolled != 200 {
		t.Errorf("%d rows, %d unique, %d in the rollup, want 200", all, unique, rolled)
	}
}
