// Package natsd is the embedded NATS server: JetStream on disk, a real TCP port
// for everyone else, and connections inside the process that need no port.
package natsd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// DefaultSync is how often what JetStream acknowledged is forced to disk.
//
// A process that is killed loses nothing whatever the interval, since the
// operating system has the bytes already; only a machine that loses power loses
// what it acknowledged within the last interval. JetStream's own default is two
// minutes. "always" closes the gap and costs a disk's sync for each message,
// which frames of many events make affordable (about 300,000 events a second
// against two million).
const DefaultSync = 500 * time.Millisecond

// Options of an embedded server.
type Options struct {
	// DataDir is where the streams lie.
	DataDir string
	// Addr is where clients connect; port 0 takes a free one.
	Addr string
	// Sync is the interval of syncing to disk, 0 for [DefaultSync], less than 0
	// to sync before every acknowledgment.
	Sync time.Duration
	// Log gets the server's warnings and errors; may be nil.
	Log *slog.Logger
	// Cluster joins servers into one, see [Cluster]; zero for a lone one.
	Cluster Cluster
}

// Cluster says how a server finds its peers.
type Cluster struct {
	// Name is the same for all, ServerName differs.
	Name, ServerName string
	// Addr is where peers connect, Routes are theirs ("nats://host:port").
	Addr   string
	Routes []string
}

// ParseSync reads LATCHKEY_NATS_SYNC: "always", or a duration.
func ParseSync(s string) (time.Duration, error) {
	switch s {
	case "":
		return DefaultSync, nil
	case "always":
		return -1, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("sync interval %q is neither a duration nor \"always\"", s)
	}
	return d, nil
}

// Server is a running embedded server.
type Server struct {
	srv *server.Server
}

// Start runs a server and returns once it takes connections and its streams are
// recovered.
func Start(ctx context.Context, opts Options) (*Server, error) {
	so, err := serverOptions(opts)
	if err != nil {
		return nil, err
	}
	srv, err := server.NewServer(so)
	if err != nil {
		return nil, fmt.Errorf("configure NATS: %w", err)
	}
	if opts.Log != nil {
		srv.SetLoggerV2(logger{opts.Log.With("component", "nats")}, false, false, false)
	}
	srv.Start()
	for !srv.ReadyForConnections(100 * time.Millisecond) {
		if !srv.Running() {
			return nil, errors.New("start NATS: the server stopped; is its port taken or its directory in use?")
		}
		if err := ctx.Err(); err != nil {
			srv.Shutdown()
			srv.WaitForShutdown()
			return nil, fmt.Errorf("start NATS: %w", err)
		}
	}
	return &Server{srv: srv}, nil
}

func serverOptions(opts Options) (*server.Options, error) {
	host, port, err := splitAddr(opts.Addr)
	if err != nil {
		return nil, err
	}
	so := &server.Options{
		Host: host, Port: port, JetStream: true, StoreDir: opts.DataDir, DontListen: false,
		NoSigs: true, ServerName: "latchkey", MaxPayload: 8 << 20,
		// Frames of imports come faster than a spinning disk takes them.
		MaxPending: 128 << 20, JetStreamMaxStore: 1 << 50, JetStreamMaxMemory: 256 << 20,
	}
	switch {
	case opts.Sync < 0:
		so.SyncAlways = true
	case opts.Sync == 0:
		so.SyncInterval = DefaultSync
	default:
		so.SyncInterval = opts.Sync
	}
	if c := opts.Cluster; c.Name != "" {
		chost, cport, err := splitAddr(c.Addr)
		if err != nil {
			return nil, err
		}
		so.ServerName = c.ServerName
		so.Cluster = server.ClusterOpts{Name: c.Name, Host: chost, Port: cport}
		so.Routes = server.RoutesFromStr(strings.Join(c.Routes, ","))
	}
	return so, nil
}

func splitAddr(addr string) (string, int, error) {
	host, text, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, fmt.Errorf("read NATS address %q: %w", addr, err)
	}
	port, err := strconv.Atoi(text)
	if err != nil || port < 0 || port > 65535 {
		return "", 0, fmt.Errorf("read NATS address %q: bad port", addr)
	}
	if port == 0 {
		port = server.RANDOM_PORT
	}
	return host, port, nil
}

// Addr is where the server listens.
func (s *Server) Addr() string { return s.srv.Addr().String() }

// ClientURL is how others reach the server.
func (s *Server) ClientURL() string { return "nats://" + s.Addr() }

// Connect makes a connection inside the process.
func (s *Server) Connect(name string, opts ...nats.Option) (*nats.Conn, error) {
	return bus.Connect(s.ClientURL(), name, append(opts, nats.InProcessServer(s.srv))...)
}

// Shutdown writes everything down and stops; it may be called twice. Close the
// connections first: clients of a server that is gone keep trying to reconnect.
func (s *Server) Shutdown() {
	s.srv.Shutdown()
	s.srv.WaitForShutdown()
}

// logger writes the server's words to slog.
type logger struct{ log *slog.Logger }

func (l logger) Noticef(format string, v ...any) {
	l.log.Debug("NATS", "notice", fmt.Sprintf(format, v...))
}

func (l logger) Warnf(format string, v ...any) {
	l.log.Warn("NATS warns", "warning", fmt.Sprintf(format, v...))
}

func (l logger) Fatalf(format string, v ...any) {
	l.log.Error("NATS failed", "error", fmt.Sprintf(format, v...))
}

func (l logger) Errorf(format string, v ...any) {
	l.log.Error("NATS failed", "error", fmt.Sprintf(format, v...))
}
func (l logger) Debugf(string, ...any) {}
func (l logger) Tracef(string, ...any) {}
