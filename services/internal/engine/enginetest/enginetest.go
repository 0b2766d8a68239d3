// Package enginetest gives tests a real ClickHouse.
package enginetest

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
)

// Main is what TestMain of a package with such tests calls: the test binary is
// the engine's binary, too.
//
//	func TestMain(m *testing.M) { enginetest.Main(m) }
func Main(m *testing.M) {
	if engine.IsChild() {
		os.Exit(engine.ChildMain())
	}
	code := m.Run()
	if err := closeShared(); err != nil {
		fmt.Fprintln(os.Stderr, "enginetest:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

var shared struct {
	once   sync.Once
	engine *engine.Engine
	dir    string
	err    error
}

// Start returns an engine that all tests of the binary share; it is fetched if
// need be and started once. Use [Database] to have a place of one's own in it.
func Start(t testing.TB) *engine.Engine {
	t.Helper()
	shared.once.Do(func() {
		if shared.dir, shared.err = os.MkdirTemp("", "latchkey-engine-*"); shared.err == nil {
			shared.engine, shared.err = engine.Start(context.Background(), config(shared.dir))
		}
	})
	if shared.err != nil {
		t.Fatalf("start ClickHouse: %v", shared.err)
	}
	return shared.engine
}

// StartOwn starts an engine for one test, which may kill it.
func StartOwn(t testing.TB) *engine.Engine {
	t.Helper()
	return StartIn(t, t.TempDir())
}

// StartIn is StartOwn on a given data directory.
func StartIn(t testing.TB, dir string) *engine.Engine {
	t.Helper()
	e, err := engine.Start(t.Context(), config(dir))
	if err != nil {
		t.Fatalf("start ClickHouse: %v", err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("stop ClickHouse: %v", err)
		}
	})
	return e
}

func config(dir string) engine.Config {
	return engine.Config{
		DataDir: dir, NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0", MemoryLimit: 2 << 30,
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
}

var databases atomic.Int64

// Database creates an empty database for one test and returns its name; it is
// dropped when the test ends.
func Database(t testing.TB, e *engine.Engine) string {
	t.Helper()
	name := fmt.Sprintf("test_%d", databases.Add(1))
	Query(t, e, "CREATE DATABASE "+name)
	t.Cleanup(func() {
		if _, err := ask(context.Background(), e, "DROP DATABASE IF EXISTS "+name+" SYNC"); err != nil {
			t.Logf("drop database: %v", err)
		}
	})
	return name
}

// Query asks over HTTP and returns the answer without its last line end.
func Query(t testing.TB, e *engine.Engine, query string) string {
	t.Helper()
	answer, err := ask(t.Context(), e, query)
	if err != nil {
		t.Fatalf("query %q: %v", query, err)
	}
	return answer
}

func ask(ctx context.Context, e *engine.Engine, query string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+e.HTTPAddr()+"/", strings.NewReader(query))
	if err != nil {
		return "", err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return "", err
	}
	answer := strings.TrimSuffix(string(body), "\n")
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", res.Status, answer)
	}
	return answer, nil
}

func closeShared() error {
	if shared.engine == nil {
		return nil
	}
	err := shared.engine.Close()
	if rmErr := os.RemoveAll(shared.dir); err == nil {
		err = rmErr
	}
	return err
}
