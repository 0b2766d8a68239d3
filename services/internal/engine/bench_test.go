package engine_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
)

// BenchmarkInsert sends batches of 100,000 rows that look like usage events,
// column by column.
func BenchmarkInsert(b *testing.B) {
	e := enginetest.Start(b)
	for name, protocol := range protocols {
		b.Run(name, func(b *testing.B) {
			conn := open(b, e, protocol, enginetest.Database(b, e))
			if err := conn.Exec(b.Context(), `CREATE TABLE t (at DateTime64(9, 'UTC'), org LowCardinality(String), key LowCardinality(String),
				ip IPv6, route LowCardinality(String), status UInt16, id String, latency UInt32) ENGINE = MergeTree ORDER BY (org, key, at)`); err != nil {
				b.Fatal(err)
			}
			const rows = 100_000
			at, text, ids, status, latency := make([]time.Time, rows), make([]string, rows), make([]string, rows), make([]uint16, rows), make([]uint32, rows)
			ips := make([]string, rows)
			for i := range rows {
				at[i], text[i], ids[i], ips[i] = time.Unix(int64(i), 0), "key_01", time.Unix(int64(i), 0).Format(time.RFC3339Nano), "2001:db8::7"
			}
			before := cpu(b, e)
			for b.Loop() {
				batch, err := conn.PrepareBatch(b.Context(), "INSERT INTO t")
				if err != nil {
					b.Fatal(err)
				}
				for i, v := range []any{at, text, text, ips, text, status, ids, latency} {
					if err := batch.Column(i).Append(v); err != nil {
						b.Fatal(err)
					}
				}
				if err := batch.Send(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(cpu(b, e)-before)/float64(b.N), "engine-cpu-ms/op")
			b.ReportMetric(float64(rows*b.N)/b.Elapsed().Seconds(), "rows/s")
		})
	}
}

// BenchmarkStart opens an empty database and asks one question.
func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		e := enginetest.StartOwn(b)
		enginetest.Query(b, e, "SELECT 1")
		if err := e.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// cpu is the processor time that the engine has used, in milliseconds: unlike
// the clock it says the same on a busy machine.
func cpu(b *testing.B, e *engine.Engine) int64 {
	b.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", e.Pid()))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(content[strings.LastIndexByte(string(content), ')')+1:]))
	user, _ := strconv.ParseInt(fields[11], 10, 64)
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	return 10 * (user + system) // in ticks of 10 ms
}
