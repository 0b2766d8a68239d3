package chaos

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/collector"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// TestMain makes the test binary the binary of every process of the suite.
func TestMain(m *testing.M) {
	switch os.Getenv("CHAOS_ROLE") {
	case "collector":
		exit(collectorMain)
	case "nats":
		exit(natsMain)
	}
	enginetest.Main(m)
}

func exit(fn func(context.Context) error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	err := fn(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, os.Getenv("CHAOS_ROLE")+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func quiet() *slog.Logger {
	level := slog.LevelError
	if os.Getenv("CHAOS_VERBOSE") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})).With("pid", os.Getpid())
}

func collectorMain(ctx context.Context) error {
	var cfg collector.Config
	if err := run.Load(&cfg); err != nil {
		return err
	}
	collector.LimitMemory()
	for {
		nc, err := bus.Connect(os.Getenv("LATCHKEY_NATS_URL"), "collector")
		if err == nil {
			defer nc.Close()
			c, err := collector.New(ctx, cfg, run.Deps{NATS: nc, Log: quiet(), Metrics: prometheus.NewRegistry(), Bus: busConfig()})
			if err == nil {
				return c.Run(ctx)
			}
			nc.Close()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func busConfig() bus.Config {
	n, _ := strconv.Atoi(os.Getenv("CHAOS_REPLICAS"))
	return bus.Config{Replicas: max(n, 1), Partitions: 4} // an existing stream keeps its own
}

func natsMain(ctx context.Context) error {
	opts := natsd.Options{DataDir: os.Getenv("CHAOS_DIR"), Addr: os.Getenv("CHAOS_ADDR")}
	if name := os.Getenv("CHAOS_NAME"); name != "" {
		opts.Cluster = natsd.Cluster{
			Name: "chaos", ServerName: name, Addr: os.Getenv("CHAOS_CLUSTER_ADDR"), Routes: strings.Split(os.Getenv("CHAOS_ROUTES"), ","),
		}
	}
	s, err := natsd.Start(ctx, opts)
	if err != nil {
		return err
	}
	<-ctx.Done()
	s.Shutdown()
	return nil
}

// process is a process that may die and is started again.
type process struct {
	t    *testing.T
	role string
	env  []string

	mu  sync.Mutex
	cmd *exec.Cmd
}

func start(t *testing.T, role string, env ...string) *process {
	t.Helper()
	p := &process{t: t, role: role, env: env}
	p.start()
	t.Cleanup(p.kill)
	return p
}

func (p *process) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(append(os.Environ(), "CHAOS_ROLE="+p.role), p.env...)
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		p.t.Errorf("start %s: %v", p.role, err)
	}
}

// kill is kill -9.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd.Process != nil && p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

func (p *process) signal(s os.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Signal(s)
	}
}

// peakMemory is the most that the process ever had resident, in bytes.
func (p *process) peakMemory() uint64 {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kb uint64
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kb); err == nil {
			return kb << 10
		}
	}
	p.t.Fatal("the system does not tell the peak of a process's memory")
	return 0
}

// freeAddr is an address that nobody listens on right now, for processes that
// must come back where they were.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// proxy is a wire to ClickHouse that can swallow answers and be cut.
type proxy struct {
	listener net.Listener
	target   string
	// swallow is how many answers to lose: what the server sends next on a
	// connection that has just sent a block does not arrive, and the wire breaks.
	swallow atomic.Int64
	down    atomic.Bool
	lost    atomic.Int64

	mu    sync.Mutex
	conns map[net.Conn]bool
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, target: target, conns: map[net.Conn]bool{}}
	go p.serve()
	t.Cleanup(func() { _ = l.Close(); p.cut() })
	return p
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

func (p *proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		if p.down.Load() {
			_ = client.Close()
			continue
		}
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		p.mu.Lock()
		p.conns[client], p.conns[server] = true, true
		p.mu.Unlock()
		var sent atomic.Int64
		go p.pipe(server, client, func(n int) bool { sent.Add(int64(n)); return true })
		go p.pipe(client, server, func(int) bool {
			// Only answers to something large: those of inserts.
			if sent.Swap(0) > 4096 && p.swallow.Load() > 0 && p.swallow.Add(-1) >= 0 {
				p.lost.Add(1)
				return false
			}
			return true
		})
	}
}

func (p *proxy) pipe(to, from net.Conn, pass func(int) bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if !pass(n) {
				// The server has done its work; a while later the wire breaks.
				time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
				return
			}
			if _, werr := to.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				return
			}
			return
		}
	}
}

// cut breaks every connection.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close()
	}
	clear(p.conns)
}
