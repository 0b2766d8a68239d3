// Package engine runs a real ClickHouse beside us without any installation: the
// engine as a shared library, in a process of its own that speaks ClickHouse's
// native protocol and HTTP. Its death or its memory never takes us along.
//
// The process is our own binary, executed again. So main must begin with
//
//	if engine.IsChild() {
//		os.Exit(engine.ChildMain())
//	}
package engine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/latchkey-dev/latchkey/services/internal/engine/server"
	"github.com/latchkey-dev/latchkey/services/internal/npm"
)

// libraries are the packages that carry the engine, by GOOS/GOARCH. A line
// needs the integrity that npm publishes for that very version.
var libraries = map[string]npm.Package{
	"linux/amd64": {
		Name: "@chdb/lib-linux-x64-gnu", Version: "26.5.3",
		Integrity: "sha512-fPrLmRt5Moor9yGz4mazbrNje4t7X9KB2mTGkXFWRxRBs2iKy8yh6jx11xsa0Qr3iDFMU/yHqd+bVdYJXu3QaQ==",
		Files:     []string{libraryFile},
	},
}

const (
	libraryFile  = "libchdb.so"
	startTimeout = 60 * time.Second
	stopTimeout  = 4 * time.Second // the child itself gives up before that
	maxBackoff   = 10 * time.Second
	steady       = 30 * time.Second // after so long a death is a new one

	watchInterval = 10 * time.Second
	answerTimeout = 60 * time.Second
)

// Config says where the engine lives. Its tags are those of the environment,
// without the LATCHKEY_ prefix.
type Config struct {
	// DataDir holds the database; one engine at a time may use it.
	DataDir string
	// NativeAddr and HTTPAddr are where it listens; port 0 takes a free one.
	NativeAddr string `env:"CLICKHOUSE_ADDR" envDefault:"127.0.0.1:9000"`
	HTTPAddr   string `env:"CLICKHOUSE_HTTP_ADDR" envDefault:"127.0.0.1:8123"`
	// Password of the user "default". Without one only loopback addresses are allowed.
	Password string `env:"CLICKHOUSE_PASSWORD"`
	// MemoryLimit in bytes bounds what queries and merges may take together;
	// 0 means a quarter of the machine's memory, at least 1 GB and at most 4 GB.
	MemoryLimit int64 `env:"CLICKHOUSE_MEMORY"`
	// Library is the path of a libchdb.so; empty fetches the pinned one.
	Library string `env:"CLICKHOUSE_LIBRARY"`
	// Fetch says how the library is fetched if the cache lacks it.
	Fetch npm.Options `env:"-"`
	// Log may be nil.
	Log *slog.Logger `env:"-"`
}

// Engine is a running ClickHouse. Its addresses stay the same when it is
// restarted: the listeners belong to us, and a client that connects meanwhile
// waits for the next process.
type Engine struct {
	cfg         Config
	log         *slog.Logger
	native, web *net.TCPListener
	restarts    atomic.Int64
	pid         atomic.Int64

	cancel   context.CancelFunc
	done     chan struct{}
	closeErr error
	once     sync.Once
}

// Fetch gets the engine's library into the cache and returns its path. With the
// library in the cache it returns at once.
func Fetch(ctx context.Context, opts npm.Options) (string, error) {
	p, ok := libraries[runtime.GOOS+"/"+runtime.GOARCH]
	if !ok {
		return "", fmt.Errorf("there is no embedded ClickHouse for %s/%s: point LATCHKEY_CLICKHOUSE_URL at a ClickHouse server", runtime.GOOS, runtime.GOARCH)
	}
	dir, err := p.Fetch(ctx, opts)
	if err != nil {
		return "", fmt.Errorf("get the ClickHouse engine (or point LATCHKEY_CLICKHOUSE_URL at a ClickHouse server): %w", err)
	}
	return filepath.Join(dir, libraryFile), nil
}

// Cached tells whether Fetch would return at once.
func Cached(opts npm.Options) bool {
	p, ok := libraries[runtime.GOOS+"/"+runtime.GOARCH]
	return ok && p.Cached(opts)
}

// Start fetches the engine if needed, starts it and waits until it answers. ctx
// bounds the start only: the engine runs until Close, and ends with this
// process, however that ends.
func Start(ctx context.Context, cfg Config) (*Engine, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.Library == "" {
		opts := cfg.Fetch
		if opts.Log == nil {
			opts.Log = cfg.Log
		}
		library, err := Fetch(ctx, opts)
		if err != nil {
			return nil, err
		}
		cfg.Library = library
	}
	e := &Engine{cfg: cfg, log: cfg.Log, done: make(chan struct{})}
	if err := e.listen(ctx); err != nil {
		return nil, err
	}
	child, err := e.spawn(ctx)
	if err != nil {
		return nil, errors.Join(err, e.closeListeners())
	}
	watch, cancel := context.WithCancel(context.Background())
	e.cancel = cancel
	go e.supervise(watch, child)
	return e, nil
}

func (c *Config) check() error {
	if c.DataDir == "" {
		return errors.New("start ClickHouse engine: no data directory given")
	}
	dir, err := filepath.Abs(c.DataDir)
	if err != nil {
		return fmt.Errorf("start ClickHouse engine: %w", err)
	}
	c.DataDir = dir
	if c.NativeAddr == "" {
		c.NativeAddr = "127.0.0.1:9000"
	}
	if c.HTTPAddr == "" {
		c.HTTPAddr = "127.0.0.1:8123"
	}
	for _, addr := range []string{c.NativeAddr, c.HTTPAddr} {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return fmt.Errorf("start ClickHouse engine: %w", err)
		}
		ip := net.ParseIP(host)
		if c.Password == "" && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return fmt.Errorf("start ClickHouse engine: %s is not a loopback address; set LATCHKEY_CLICKHOUSE_PASSWORD to open it to others", addr)
		}
	}
	return nil
}

func (e *Engine) listen(ctx context.Context) (err error) {
	if e.native, err = listenTCP(ctx, e.cfg.NativeAddr); err != nil {
		return fmt.Errorf("listen for ClickHouse's native protocol: %w", err)
	}
	if e.web, err = listenTCP(ctx, e.cfg.HTTPAddr); err != nil {
		return errors.Join(fmt.Errorf("listen for ClickHouse's HTTP interface: %w", err), e.native.Close())
	}
	return nil
}

func listenTCP(ctx context.Context, addr string) (*net.TCPListener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func (e *Engine) closeListeners() error {
	return errors.Join(e.native.Close(), e.web.Close())
}

// NativeAddr is where the native protocol is spoken.
func (e *Engine) NativeAddr() string { return e.native.Addr().String() }

// HTTPAddr is where HTTP is spoken.
func (e *Engine) HTTPAddr() string { return e.web.Addr().String() }

// URL is what LATCHKEY_CLICKHOUSE_URL would be for this engine and a database.
func (e *Engine) URL(database string) string {
	u := url.URL{Scheme: "clickhouse", Host: e.NativeAddr(), Path: "/" + database}
	if e.cfg.Password != "" {
		u.User = url.UserPassword("default", e.cfg.Password)
	}
	return u.String()
}

// Restarts counts how often the engine died and was started again.
func (e *Engine) Restarts() int { return int(e.restarts.Load()) }

// Pid is the engine's process at this moment; 0 while there is none.
func (e *Engine) Pid() int { return int(e.pid.Load()) }

// Close ends running queries after a moment, closes the database and stops the
// process. It may be called twice.
func (e *Engine) Close() error {
	e.once.Do(e.cancel)
	<-e.done
	return e.closeErr
}

// child is one process.
type child struct {
	cmd     *exec.Cmd
	stdin   io.Closer // its end tells the child that we are gone
	exited  chan struct{}
	err     error
	started time.Time
}

// childConfig is what the child is told, in its environment.
type childConfig struct {
	Library, DataDir, Password string
	MemoryLimit                int64
}

const childVariable = "LATCHKEY_ENGINE_CHILD"

// spawn starts a process and waits until it has opened the database.
func (e *Engine) spawn(ctx context.Context) (*child, error) {
	cmd, ready, cleanUp, err := e.command()
	if err != nil {
		return nil, fmt.Errorf("start ClickHouse engine: %w", err)
	}
	defer ready.Close()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		cleanUp()
		return nil, fmt.Errorf("start ClickHouse engine: %w", err)
	}
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	cleanUp()
	if err != nil {
		return nil, fmt.Errorf("start ClickHouse engine: %w", err)
	}
	c := &child{cmd: cmd, stdin: stdin, exited: make(chan struct{}), started: time.Now()}
	go func() {
		e.relay(stderr)
		c.err = cmd.Wait()
		e.pid.Store(0)
		close(c.exited)
	}()
	e.pid.Store(int64(cmd.Process.Pid))

	answer := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(ready, 1<<16))
		answer <- strings.TrimSpace(string(b))
	}()
	select {
	case text := <-answer:
		if text == "ready" {
			return c, nil
		}
		c.stop(0)
		if text == "" {
			text = fmt.Sprintf("it ended at once: %v", c.err)
		}
		return nil, fmt.Errorf("start ClickHouse engine: %s", text)
	case <-time.After(startTimeout):
		c.stop(0)
		return nil, fmt.Errorf("start ClickHouse engine: not ready after %s", startTimeout)
	case <-ctx.Done():
		c.stop(0)
		return nil, fmt.Errorf("start ClickHouse engine: %w", context.Cause(ctx))
	}
}

// command prepares the process: listeners and the ready pipe go along as files.
func (e *Engine) command() (cmd *exec.Cmd, ready *os.File, cleanUp func(), err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, nil, err
	}
	told, err := json.Marshal(childConfig{Library: e.cfg.Library, DataDir: e.cfg.DataDir, Password: e.cfg.Password, MemoryLimit: e.cfg.MemoryLimit})
	if err != nil {
		return nil, nil, nil, err
	}
	native, err := e.native.File()
	if err != nil {
		return nil, nil, nil, err
	}
	web, err := e.web.File()
	if err != nil {
		return nil, nil, nil, errors.Join(err, native.Close())
	}
	ready, readyChild, err := os.Pipe()
	if err != nil {
		return nil, nil, nil, errors.Join(err, native.Close(), web.Close())
	}
	path := self
	if runtime.GOOS == "linux" {
		path = "/proc/self/exe" // the same program even after its file was replaced or removed
	}
	cmd = exec.CommandContext(context.Background(), path)                                  // it outlives the start's context
	cmd.Args = []string{filepath.Base(self), "engine", "run", "clickhouse", e.cfg.DataDir} // for those who read ps
	cmd.Env = append(os.Environ(), childVariable+"="+string(told), "TZ=UTC")
	cmd.ExtraFiles = []*os.File{native, web, readyChild}
	return cmd, ready, func() { _ = errors.Join(native.Close(), web.Close(), readyChild.Close()) }, nil
}

// relay passes the child's lines on to our log.
func (e *Engine) relay(stderr io.Reader) {
	lines := bufio.NewScanner(stderr)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" {
			e.log.Warn("ClickHouse engine says", "line", line)
		}
	}
	_, _ = io.Copy(io.Discard, stderr)
}

// stop asks the child to end and kills it after a while.
func (c *child) stop(patience time.Duration) {
	_ = c.stdin.Close()
	select {
	case <-c.exited:
	case <-time.After(patience):
		_ = c.cmd.Process.Kill()
		<-c.exited
	}
}

func (e *Engine) supervise(ctx context.Context, c *child) {
	defer close(e.done)
	backoff := 100 * time.Millisecond
	for {
		watch, stopWatching := context.WithCancel(ctx)
		go e.watchdog(watch, c)
		select {
		case <-ctx.Done():
		case <-c.exited:
		}
		stopWatching()
		if ctx.Err() != nil {
			c.stop(stopTimeout)
			e.closeErr = e.closeListeners()
			return
		}
		if time.Since(c.started) > steady {
			backoff = 100 * time.Millisecond
		}
		e.log.Error("ClickHouse engine died, starting it again", "error", c.err, "restarts", e.Restarts())
		for {
			next, err := e.spawn(ctx)
			if err == nil {
				c = next
				e.log.Info("ClickHouse engine is back", "restarts", e.restarts.Add(1))
				break
			}
			if ctx.Err() != nil {
				e.closeErr = e.closeListeners()
				return
			}
			e.log.Error("ClickHouse engine does not start", "error", err, "retry_in", backoff)
			select {
			case <-ctx.Done():
			case <-time.After(backoff):
			}
			backoff = min(2*backoff, maxBackoff)
		}
	}
}

// watchdog kills a process that lives and does not answer.
func (e *Engine) watchdog(ctx context.Context, c *child) {
	client := http.Client{Timeout: answerTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+e.HTTPAddr()+server.HealthPath, nil)
		if err != nil {
			return
		}
		res, err := client.Do(req)
		if err == nil {
			_ = res.Body.Close()
			continue
		}
		if ctx.Err() == nil && os.IsTimeout(err) {
			e.log.Error("ClickHouse engine does not answer, killing it", "timeout", answerTimeout)
			_ = c.cmd.Process.Kill()
			return
		}
	}
}

// defaultMemoryLimit is what Config.MemoryLimit 0 stands for on this machine.
func defaultMemoryLimit() int64 {
	const low, high = 1 << 30, 4 << 30
	content, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 2 << 30
	}
	for line := range strings.Lines(string(content)) {
		rest, ok := strings.CutPrefix(line, "MemTotal:")
		if !ok {
			continue
		}
		kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		if err == nil {
			return max(low, min(high, kb<<10/4))
		}
	}
	return 2 << 30
}
