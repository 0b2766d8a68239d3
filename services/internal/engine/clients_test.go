package engine_test

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
)

// clickhouse-client of Debian speaks the protocol of 2018: the oldest that we serve.
func TestClickHouseClient(t *testing.T) {
	t.Parallel()
	client, err := exec.LookPath("clickhouse-client")
	if err != nil {
		t.Skip("no clickhouse-client here: apt-get install clickhouse-client")
	}
	e := enginetest.Start(t)
	db := enginetest.Database(t, e)
	_, port, err := net.SplitHostPort(e.NativeAddr())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ query, input, want string }{
		{"SELECT 1, 'x', toLowCardinality('y'), [1, 2]", "", "1\tx\ty\t[1,2]\n"},
		{"CREATE TABLE t (a UInt64, s String) ENGINE = MergeTree ORDER BY a", "", ""},
		{"INSERT INTO t FORMAT TSV", "1\ta\n2\tb\n", ""},
		{"INSERT INTO t VALUES (3, 'c')", "", ""},
		{"SELECT * FROM t ORDER BY a FORMAT CSV", "", "1,\"a\"\n2,\"b\"\n3,\"c\"\n"},
		{"SELECT a FROM t WHERE 0", "", ""},
		{"SHOW TABLES", "", "t\n"},
	} {
		cmd := exec.Command(client, "--host=127.0.0.1", "--port="+port, "--database="+db, "--max_threads=2", "--query="+c.query)
		cmd.Stdin = strings.NewReader(c.input)
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
		// Debian's build aborts in its last clean-up, so its exit code says nothing.
		out, _ := cmd.Output()
		if string(out) != c.want {
			t.Errorf("%s: %q, want %q", c.query, out, c.want)
		}
	}
}
