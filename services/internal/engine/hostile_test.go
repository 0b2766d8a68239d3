package engine_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/engine/wire"
)

// hello is a correct Hello packet with the addendum behind it.
func hello() []byte {
	b := []byte{0}
	b = wire.AppendString(b, "test")
	b = append(b, 1, 1)
	b = binary.AppendUvarint(b, 54460)
	for _, s := range []string{"default", "default", "", ""} {
		b = wire.AppendString(b, s)
	}
	return b
}

// query is a correct Query packet up to its text.
func query(text string) []byte {
	b := []byte{1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1}
	b = binary.AppendUvarint(b, 54460)
	b = append(b, 0, 0, 0, 0, 0, 0, 0) // quota, depth, patch, no trace, replicas
	b = append(b, 0, 0, 2, 0)          // settings, secret, stage, compression
	return append(wire.AppendString(b, text), 0)
}

// Whatever bytes come, the engine lives on and takes no more memory than it was sent.
func TestHostileBytes(t *testing.T) {
	t.Parallel()
	e := enginetest.StartOwn(t)
	enginetest.Query(t, e, "CREATE TABLE t (a UInt64) ENGINE = Null")
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	emptyBlock := []byte{2, 0, 1, 0, 2, 0xff, 0xff, 0xff, 0xff, 0, 0, 0}
	inputs := [][]byte{
		[]byte("GET / HTTP/1.1\r\n\r\n"),
		{},
		{0},
		huge,
		join([]byte{0}, huge),
		join(hello(), []byte{9}), join(hello(), []byte{1}, huge), join(hello(), []byte{1, 0, 1}, huge),
		join(hello(), query("SELECT 1")), join(hello(), query("SELECT 1"), []byte{2}, huge),
		join(hello(), query("INSERT INTO t VALUES"), emptyBlock, []byte{2, 0, 0}, huge, huge),
		join(hello(), query("INSERT INTO t VALUES"), emptyBlock, []byte{2, 0, 0, 1}, huge, []byte("\x01a\x06String"), huge),
		join(hello(), query("INSERT INTO t VALUES"), emptyBlock, []byte{2, 0, 0, 1, 1}, []byte("\x01a\x06String\x00"), []byte("abcdef")),
		join(hello(), query("SELECT count() FROM system.numbers"), emptyBlock),
	}
	src := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		whole := join(hello(), query("SELECT 1"), emptyBlock, query("INSERT INTO t VALUES"), emptyBlock, emptyBlock)
		for range 1 + src.IntN(4) {
			whole[src.IntN(len(whole))] = byte(src.Uint32())
		}
		inputs = append(inputs, whole[:src.IntN(len(whole)+1)])
	}
	before := resident(t, e)
	pid := e.Pid()
	for _, input := range inputs {
		send(t, e, input)
	}
	if after := resident(t, e); after > before+200<<20 {
		t.Errorf("memory grew from %d MB to %d MB", before>>20, after>>20)
	}
	if e.Restarts() != 0 || e.Pid() != pid {
		t.Error("the engine died")
	}
	conn := open(t, e, clickhouse.Native, "")
	if err := conn.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	waitFor(t, func() bool { return enginetest.Query(t, e, "SELECT count() FROM system.processes") == "1" })
}

// send writes bytes, ends the stream and reads what comes.
func send(t *testing.T, e *engine.Engine, input []byte) {
	t.Helper()
	conn, err := net.Dial("tcp", e.NativeAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = conn.Write(input)
	_ = conn.(*net.TCPConn).CloseWrite()
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.Copy(io.Discard, conn); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Errorf("no end after %q", input)
	}
}

// A query that wants more memory than there is fails; the engine does not.
func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	e, err := engine.Start(t.Context(), engine.Config{DataDir: t.TempDir(), NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0", MemoryLimit: 600 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	a := post(t, e, "", strings.NewReader("SELECT length(groupArray(repeat(toString(number), 100))) FROM numbers(10000000)"))
	if a.status == 200 || !strings.HasPrefix(a.body, "Code: 241.") {
		t.Errorf("status %d: %.200s", a.status, a.body)
	}
	if got := enginetest.Query(t, e, "SELECT 1"); got != "1" || e.Restarts() != 0 {
		t.Errorf("afterwards: %q, %d restarts", got, e.Restarts())
	}
}

// Close ends queries that would never end.
func TestCloseEndsRunningQueries(t *testing.T) {
	t.Parallel()
	e, err := engine.Start(t.Context(), engine.Config{DataDir: t.TempDir(), NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	for _, protocol := range protocols {
		conn := open(t, e, protocol, "")
		go func() { _ = conn.Exec(t.Context(), "SELECT count() FROM system.numbers") }()
	}
	waitFor(t, func() bool { return enginetest.Query(t, e, "SELECT count() FROM system.processes") == "3" })
	pid := e.Pid()
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if e.Pid() != 0 || pid == 0 {
		t.Errorf("process %d still runs", pid)
	}
}
