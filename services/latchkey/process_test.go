package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
)

// binary is the latchkey that the tests run as its users do: a process.
var binary string

func TestMain(m *testing.M) {
	if engine.IsChild() {
		os.Exit(engine.ChildMain())
	}
	// The tests have APIs of their own, whatever the environment names.
	for _, name := range []string{"LATCHKEY_API_URL", "LATCHKEY_API_KEY", "LATCHKEY_DATA"} {
		_ = os.Unsetenv(name)
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "latchkey-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binary = filepath.Join(dir, "latchkey")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build latchkey: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// process is one running latchkey. Its output is told if the test fails.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	mu   sync.Mutex
	out  bytes.Buffer
	done chan struct{}
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// startProcess runs latchkey with nothing of LATCHKEY_ in its environment but env.
func startProcess(t *testing.T, env []string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(binary, args...), done: make(chan struct{})}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "LATCHKEY_") || strings.HasPrefix(v, "LATCHKEY_CACHE_DIR=") {
			p.cmd.Env = append(p.cmd.Env, v)
		}
	}
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.Stdout, p.cmd.Stderr = p, p
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("output of latchkey %s:\n%s", strings.Join(args, " "), p.output())
		}
	})
	return p
}

// interrupt is Ctrl-C; it returns how long stopping took.
func (p *process) interrupt() time.Duration {
	p.t.Helper()
	began := time.Now()
	if err := p.cmd.Process.Signal(syscall.SIGINT); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-p.done:
	case <-time.After(15 * time.Second):
		p.t.Fatalf("latchkey does not stop")
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		p.t.Errorf("latchkey stopped with exit code %d", code)
	}
	return time.Since(began)
}

// installation is a running `latchkey up`.
type installation struct {
	*process
	dir   string
	addrs map[string]string
}

var anyPorts = []string{
	"--console-addr", "127.0.0.1:0", "--edge-addr", "127.0.0.1:0", "--edge-grpc-addr", "127.0.0.1:0",
	"--nats-addr", "127.0.0.1:0", "--clickhouse-addr", "127.0.0.1:0", "--clickhouse-http-addr", "127.0.0.1:0",
}

func startUp(t *testing.T, dir string, args ...string) *installation {
	t.Helper()
	in := &installation{dir: dir, process: startProcess(t, nil, append(append([]string{"up", "--data", dir}, anyPorts...), args...)...)}
	eventually(t, time.Minute, "latchkey up is ready", func() error {
		select {
		case <-in.done:
			t.Fatal("latchkey up ended")
		default:
		}
		content, err := os.ReadFile(filepath.Join(dir, "addresses.json"))
		if err != nil {
			return err
		}
		return json.Unmarshal(content, &in.addrs)
	})
	return in
}

// eventually waits for a condition that another process brings about.
func eventually(t *testing.T, limit time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s: %v", limit, what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// run runs a command to its end against the installation.
func (in *installation) run(args ...string) (stdout string) {
	in.t.Helper()
	return runCommand(in.t, append(args, "--data", in.dir)...)
}

func runCommand(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("latchkey %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

// runJSON is run for a command that answers in JSON.
func (in *installation) runJSON(into any, args ...string) {
	in.t.Helper()
	out := in.run(append(args, "--output", "json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		in.t.Fatalf("latchkey %s answers no JSON: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// sql asks ClickHouse as curl does.
func (in *installation) sql(query string) (string, error) {
	ctx, cancel := context.WithTimeout(in.t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+in.addrs["clickhouse_http"], strings.NewReader(query))
	if err != nil {
		return "", err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, body)
	}
	return strings.TrimSpace(string(body)), err
}

// wantSQL waits until a query answers want.
func (in *installation) wantSQL(query, want string) {
	in.t.Helper()
	eventually(in.t, 30*time.Second, query+" answers "+want, func() error {
		got, err := in.sql(query)
		if err == nil && got != want {
			err = fmt.Errorf("it answers %q", got)
		}
		return err
	})
}

// post sends a body with a key and decodes the answer.
func post(t *testing.T, url, key, contentType string, body io.Reader, into any) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", contentType)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	if err := json.NewDecoder(bufio.NewReader(res.Body)).Decode(into); err != nil {
		t.Fatalf("answer of %s: %v", url, err)
	}
	return res.StatusCode
}
