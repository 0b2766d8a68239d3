package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gofrs/flock"
	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// upAddrs are the addresses of `up`, by their name in addresses.json.
var upAddrs = []struct{ name, fallback, usage string }{
	{"console", "127.0.0.1:8080", "console and REST API"},
	{"edge", "127.0.0.1:8081", "edge: forward-auth and POST /v1/usage"},
	{"edge_grpc", "127.0.0.1:8082", "edge: Envoy ext_authz"},
	{"nats", "127.0.0.1:4222", "NATS"},
	{"clickhouse_http", "127.0.0.1:8123", "ClickHouse, HTTP"},
	{"clickhouse", "127.0.0.1:9000", "ClickHouse, native"},
	{"smtp", "127.0.0.1:0", "mailbox, SMTP"},
}

// upOptions are the flags of `up`.
type upOptions struct {
	data        string
	addrs       map[string]*string
	demo, check bool
}

func newUpCmd() *cobra.Command {
	o := upOptions{addrs: map[string]*string{}}
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run everything in one place: NATS, ClickHouse, all services, the console",
		Long: `Runs NATS JetStream in this process, the ClickHouse engine beside it, every
service and the console, on loopback. All state lies in the data directory:
admin.key holds the first admin key, addresses.json every address once all is
ready (also with port 0), latchkey.log the log.

With LATCHKEY_NATS_URL, LATCHKEY_CLICKHOUSE_URL or LATCHKEY_SMTP_URL set, that
server is used instead of the built-in one.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return up(cmd.Context(), cmd.OutOrStdout(), o) },
	}
	cmd.Flags().StringVar(&o.data, "data", os.Getenv("LATCHKEY_DATA"), "data `DIR` (default: latchkey in the user's data directory)")
	cmd.Flags().BoolVar(&o.demo, "demo", false, "a made-up organization with a dozen keys, four of which are misused")
	cmd.Flags().BoolVar(&o.check, "check", false, "with --demo: exit 0 once each of the four has led to its mail, 1 with the reason after two minutes")
	for _, a := range upAddrs {
		env := "LATCHKEY_" + strings.ToUpper(a.name) + "_ADDR"
		value := a.fallback
		if v := os.Getenv(env); v != "" {
			value = v
		}
		o.addrs[a.name] = cmd.Flags().String(strings.ReplaceAll(a.name, "_", "-")+"-addr", value, a.usage+" ($"+env+")")
	}
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error { return o.complete(cmd) }
	return cmd
}

// complete fills in what depends on other flags. A check that was given no data
// directory uses a fresh one, and any free ports, so that it can run beside
// another Latchkey.
func (o *upOptions) complete(cmd *cobra.Command) error {
	if o.check && !o.demo {
		return errors.New("--check goes with --demo")
	}
	if o.check {
		for _, a := range upAddrs {
			if !cmd.Flags().Changed(strings.ReplaceAll(a.name, "_", "-")+"-addr") && os.Getenv("LATCHKEY_"+strings.ToUpper(a.name)+"_ADDR") == "" {
				*o.addrs[a.name] = "127.0.0.1:0"
			}
		}
	}
	if o.data != "" || o.check {
		return nil
	}
	base := os.Getenv("XDG_DATA_HOME")
	if base == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return fmt.Errorf("find a data directory: %w (name one with --data)", err)
		}
		base = filepath.Join(home, ".local", "share")
	}
	o.data = filepath.Join(base, "latchkey")
	if o.demo {
		o.data += "-demo"
	}
	return nil
}

func up(ctx context.Context, out io.Writer, o upOptions) (err error) {
	began := time.Now()
	if o.data == "" {
		dir, err := os.MkdirTemp("", "latchkey-check-")
		if err != nil {
			return fmt.Errorf("make a data directory: %w", err)
		}
		o.data = dir
		defer func() {
			if err == nil { // after a failure its log tells more
				err = os.RemoveAll(dir)
			}
		}()
	}
	unlock, err := lockData(o.data)
	if err != nil {
		return err
	}
	defer unlock()
	log, closeLog, err := upLogger(o.data)
	if err != nil {
		return err
	}
	defer closeLog()

	s := &stack{opts: o, out: out, log: log, group: run.NewGroup(), addrs: map[string]string{}}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.start(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("%w (the log is in %s)", err, filepath.Join(o.data, logName))
	}
	s.ready(began)
	if o.demo {
		return s.demo(ctx)
	}
	return s.group.Wait(ctx)
}

// lockData takes the directory for this process alone.
func lockData(dir string) (func(), error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the data directory: %w", err)
	}
	lock := flock.New(filepath.Join(dir, "lock"))
	taken, err := lock.TryLock()
	if err != nil {
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	if !taken {
		return nil, fmt.Errorf("another `latchkey up` uses %s: stop it, or name another directory with --data", dir)
	}
	return func() { _ = lock.Unlock() }, nil
}

const (
	addressesName = "addresses.json"
	logName       = "latchkey.log"
	maxLogBytes   = 64 << 20
)

// upLogger writes to a file in the data directory, begun anew when it is large,
// so that the terminal stays free for what a person wants to see there.
func upLogger(dir string) (*slog.Logger, func(), error) {
	path := filepath.Join(dir, logName)
	if info, err := os.Stat(path); err == nil && info.Size() > maxLogBytes {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, nil, fmt.Errorf("rotate the log: %w", err)
		}
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("open the log: %w", err)
	}
	var level slog.Level
	if v := os.Getenv("LATCHKEY_LOG_LEVEL"); v != "" {
		if err := level.UnmarshalText([]byte(v)); err != nil {
			return nil, nil, fmt.Errorf("LATCHKEY_LOG_LEVEL: %w", err)
		}
	}
	return slog.New(slog.NewTextHandler(file, &slog.HandlerOptions{Level: level})), func() { _ = file.Close() }, nil
}

// writeAddresses tells other processes where everything is; its presence means
// that all is ready.
func writeAddresses(dir string, addrs map[string]string) error {
	content, err := json.MarshalIndent(addrs, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, addressesName)
	if err := os.WriteFile(path+".new", append(content, '\n'), 0o600); err != nil {
		return fmt.Errorf("write addresses: %w", err)
	}
	return os.Rename(path+".new", path)
}

// httpURL is an address as a person types it: 0.0.0.0 is reached over loopback.
func httpURL(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "http://" + addr
	}
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, port)
}
