package engine_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
)

func pause() <-chan time.Time { return time.After(10 * time.Millisecond) }

func TestDataOutlivesTheEngine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	e, err := engine.Start(t.Context(), engine.Config{DataDir: dir, NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	enginetest.Query(t, e, "CREATE DATABASE latchkey")
	enginetest.Query(t, e, "CREATE TABLE latchkey.t (a UInt64) ENGINE = MergeTree ORDER BY a")
	enginetest.Query(t, e, "INSERT INTO latchkey.t SELECT number FROM numbers(1000)")
	pid := e.Pid()
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is still there: %v", pid, err)
	}
	e = enginetest.StartIn(t, dir)
	if got := enginetest.Query(t, e, "SELECT count() FROM latchkey.t"); got != "1000" {
		t.Errorf("%s rows after a restart, want 1000", got)
	}
}

func TestTwoEnginesNeverShareADirectory(t *testing.T) {
	if os.Getenv("LATCHKEY_TEST_LONG") == "" {
		t.Skip("waits for a lock; set LATCHKEY_TEST_LONG=1")
	}
	t.Parallel()
	dir := t.TempDir()
	enginetest.StartIn(t, dir)
	_, err := engine.Start(t.Context(), engine.Config{DataDir: dir, NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0"})
	if err == nil || !strings.Contains(err.Error(), "another ClickHouse engine uses") {
		t.Errorf("second engine: %v", err)
	}
}

func TestBeyondLoopbackNeedsAPassword(t *testing.T) {
	t.Parallel()
	_, err := engine.Start(t.Context(), engine.Config{DataDir: t.TempDir(), NativeAddr: "0.0.0.0:0", HTTPAddr: "127.0.0.1:0"})
	if err == nil || !strings.Contains(err.Error(), "LATCHKEY_CLICKHOUSE_PASSWORD") {
		t.Errorf("got %v, want an error that names the variable", err)
	}
}

func TestAddressInUseIsSaid(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = engine.Start(t.Context(), engine.Config{DataDir: t.TempDir(), NativeAddr: "127.0.0.1:0", HTTPAddr: l.Addr().String()})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want address in use", err)
	}
}

// TestParent is the process that TestEngineEndsWithItsParent kills.
func TestParent(t *testing.T) {
	dir := os.Getenv("ENGINE_TEST_PARENT")
	if dir == "" {
		t.Skip("only run by another test")
	}
	e, err := engine.Start(t.Context(), engine.Config{DataDir: dir, NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "started"), []byte(e.HTTPAddr()), 0o600); err != nil {
		t.Fatal(err)
	}
	select {}
}

func TestEngineEndsWithItsParent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	parent := exec.Command(os.Args[0], "-test.run=^TestParent$")
	parent.Env = append(os.Environ(), "ENGINE_TEST_PARENT="+dir)
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		_, err := os.Stat(filepath.Join(dir, "started"))
		return err == nil
	})
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait()
	// The directory is free again when the engine has ended.
	e := enginetest.StartIn(t, dir)
	if got := enginetest.Query(t, e, "SELECT 1"); got != "1" {
		t.Errorf("SELECT 1 gave %q", got)
	}
}
