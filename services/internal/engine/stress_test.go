package engine_test

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/ClickHouse/clickhouse-go/v2"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
)

// resident is the process's memory in bytes.
func resident(t *testing.T, e *engine.Engine) int64 {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", e.Pid()))
	if err != nil {
		t.Skipf("no /proc here: %v", err)
	}
	for line := range strings.Lines(string(content)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

func openFiles(t *testing.T, e *engine.Engine) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.Pid()))
	if err != nil {
		t.Skipf("no /proc here: %v", err)
	}
	return len(entries)
}

// Many short queries of all kinds, several at a time, leave nothing behind.
func TestNothingLeaks(t *testing.T) {
	t.Parallel()
	e := enginetest.StartOwn(t)
	native := open(t, e, clickhouse.Native, "default")
	enginetest.Query(t, e, "CREATE TABLE t (a UInt64, s String) ENGINE = Null")
	round := func(queries int) {
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for i := range queries / 4 {
					work(t, e, native, w+i)
				}
			})
		}
		wg.Wait()
	}
	total := 2000
	if os.Getenv("LATCHKEY_TEST_LONG") != "" {
		total = 10_000
	}
	round(total / 2) // caches fill
	before, files := resident(t, e), openFiles(t, e)
	round(total)
	after, filesAfter := resident(t, e), openFiles(t, e)
	t.Logf("resident %d MB, then %d MB; %d open files, then %d", before>>20, after>>20, files, filesAfter)
	if after > before+before/2 {
		t.Errorf("memory grew from %d MB to %d MB within %d queries", before>>20, after>>20, total)
	}
	if filesAfter > files+20 {
		t.Errorf("open files grew from %d to %d", files, filesAfter)
	}
}

func work(t *testing.T, e *engine.Engine, native clickhouse.Conn, n int) {
	var err error
	switch n % 6 {
	case 0:
		var v uint64
		err = native.QueryRow(t.Context(), "SELECT max(number) FROM numbers(10000)").Scan(&v)
	case 1:
		if native.Exec(t.Context(), "SELECT * FROM nowhere") == nil {
			t.Error("a query of an unknown table worked")
		}
	case 2:
		var res *http.Response
		if res, err = http.Post("http://"+e.HTTPAddr()+"/?database=nowhere", "", strings.NewReader("SELECT 1")); err == nil {
			err = res.Body.Close()
		}
	case 3:
		enginetest.Query(t, e, "SELECT count() FROM system.tables FORMAT JSON")
	case 4:
		enginetest.Query(t, e, "INSERT INTO t FORMAT JSONEachRow\n"+strings.Repeat("{\"a\":1,\"s\":\"x\"}\n", 100))
	case 5:
		batch, prepareErr := native.PrepareBatch(t.Context(), "INSERT INTO t")
		if prepareErr != nil {
			t.Error(prepareErr)
			return
		}
		for i := range 100 {
			if err := batch.Append(uint64(i), "x"); err != nil {
				t.Error(err)
			}
		}
		err = batch.Send()
	}
	if err != nil {
		t.Errorf("query kind %d: %v", n%6, err)
	}
}
