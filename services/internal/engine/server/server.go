// Package server speaks ClickHouse's native protocol and its HTTP interface
// around the engine in package chdb, so that any ClickHouse client can talk to it.
package server

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/netutil"

	"github.com/latchkey-dev/latchkey/services/internal/engine/chdb"
	"github.com/latchkey-dev/latchkey/services/internal/engine/sql"
)

const (
	maxConnections = 512
	maxQueries     = 64 // that run at the same time; more wait
	drainTimeout   = 1200 * time.Millisecond
)

// HiddenDatabase is the name, in the engine's configuration, of the database that
// shows files as tables. The server detaches it.
const HiddenDatabase = "_files"

// Config is what a server needs.
type Config struct {
	Library *chdb.Library
	// SpoolDir holds the data of INSERTs while they come in. The server empties it.
	SpoolDir string
	// Password is asked of every client if it is not empty; the user is "default".
	Password string
	Log      *slog.Logger
	// Native and HTTP are closed by Serve.
	Native, HTTP net.Listener
}

// Server is one running ClickHouse.
type Server struct {
	cfg  Config
	lib  *chdb.Library
	log  *slog.Logger
	slot chan struct{}

	sessions atomic.Uint64
	spools   atomic.Uint64

	adminMu sync.Mutex
	admin   *chdb.Conn // kills queries and reads their progress; also keeps the database open

	version  [3]int
	revision string
	timezone string

	ctx    context.Context // ends when running queries must
	cancel context.CancelFunc
	conns  sync.WaitGroup
	live   map[net.Conn]*atomic.Bool // native connections; true while a query runs
	liveMu sync.Mutex
}

// New opens the database.
func New(cfg Config) (*Server, error) {
	if err := os.RemoveAll(cfg.SpoolDir); err != nil {
		return nil, fmt.Errorf("clear spool: %w", err)
	}
	if err := os.MkdirAll(cfg.SpoolDir, 0o700); err != nil {
		return nil, fmt.Errorf("create spool: %w", err)
	}
	admin, err := cfg.Library.Connect()
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, lib: cfg.Library, log: cfg.Log, admin: admin,
		slot: make(chan struct{}, maxQueries), live: map[net.Conn]*atomic.Bool{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if err := admin.Exec("DETACH DATABASE IF EXISTS " + HiddenDatabase); err != nil {
		admin.Close()
		return nil, fmt.Errorf("hide files: %w", err)
	}
	out, err := admin.QueryString("SELECT version(), timezone(), toString(revision())", "TSV")
	if err != nil {
		admin.Close()
		return nil, fmt.Errorf("ask the engine for its version: %w", err)
	}
	fields := strings.Split(strings.TrimSpace(out), "\t")
	if len(fields) == 3 {
		s.timezone, s.revision = fields[1], fields[2]
		for i, part := range strings.SplitN(fields[0], ".", 4) {
			if i < len(s.version) {
				s.version[i], _ = strconv.Atoi(part)
			}
		}
	}
	return s, nil
}

// Version is the engine's, like "26.5.1".
func (s *Server) Version() string {
	return fmt.Sprintf("%d.%d.%d", s.version[0], s.version[1], s.version[2])
}

// Serve answers until ctx is done, then lets running queries end, for at most a
// second or so, and closes the database.
func (s *Server) Serve(ctx context.Context) error {
	web := &http.Server{
		Handler: http.HandlerFunc(s.serveHTTP), ReadHeaderTimeout: 30 * time.Second, IdleTimeout: 5 * time.Minute,
		MaxHeaderBytes: 1 << 20, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return s.ctx },
	}
	failed := make(chan error, 1)
	go s.serveNative()
	go func() {
		if err := web.Serve(netutil.LimitListener(s.cfg.HTTP, maxConnections)); !errors.Is(err, http.ErrServerClosed) {
			failed <- fmt.Errorf("serve HTTP: %w", err)
		}
	}()
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	return errors.Join(err, s.stop(web))
}

// stop goes from the outside in: no new connections, idle ones closed, running
// queries ended, the database closed.
func (s *Server) stop(web *http.Server) error {
	err := s.cfg.Native.Close()
	drain, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		_ = web.Shutdown(drain)
		s.conns.Wait()
	}()
	s.closeIdle()
	select {
	case <-idle:
	case <-drain.Done():
		s.log.Warn("ending queries that still run")
		s.cancel()
		_ = web.Close()
		s.closeAll()
		select {
		case <-idle:
		case <-time.After(drainTimeout):
			// A query that does not end keeps the engine open. What it has
			// stored is on disk; the rest dies with the process.
			return errors.Join(err, errors.New("a query did not end"))
		}
	}
	s.cancel()
	s.admin.Close()
	return err
}

func (s *Server) closeIdle() {
	s.liveMu.Lock()
	defer s.liveMu.Unlock()
	for conn, busy := range s.live {
		if !busy.Load() {
			_ = conn.Close()
		}
	}
}

func (s *Server) closeAll() {
	s.liveMu.Lock()
	defer s.liveMu.Unlock()
	for conn := range s.live {
		_ = conn.Close()
	}
}

// acquire waits for a place among the running queries.
func (s *Server) acquire(ctx context.Context) (release func(), err error) {
	select {
	case s.slot <- struct{}{}:
		return func() { <-s.slot }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// killUntil ends what a session runs. It says so until it ended, because a query
// that the engine has not begun yet is not killed.
func (s *Server) killUntil(ended <-chan struct{}, marker string) {
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		s.kill(marker)
		select {
		case <-ended:
			return
		case <-time.After(wait):
		}
	}
}

// kill ends what a session runs, if the engine has begun it.
func (s *Server) kill(marker string) {
	s.adminMu.Lock()
	defer s.adminMu.Unlock()
	if err := s.admin.Exec("KILL QUERY WHERE endsWith(Settings['log_comment'], " + sql.Quote(marker) + ") ASYNC"); err != nil {
		s.log.Warn("could not kill a query", "error", err)
	}
}

type progress struct {
	rows, bytes, total, writtenRows, writtenBytes uint64
}

// progressOf asks how far a session's query is.
func (s *Server) progressOf(marker string) (p progress, ok bool) {
	s.adminMu.Lock()
	out, err := s.admin.QueryString("SELECT read_rows, read_bytes, total_rows_approx, written_rows, written_bytes FROM system.processes "+
		"WHERE endsWith(Settings['log_comment'], "+sql.Quote(marker)+") LIMIT 1", "TSV")
	s.adminMu.Unlock()
	if err != nil || out == "" {
		return p, false
	}
	_, err = fmt.Sscan(out, &p.rows, &p.bytes, &p.total, &p.writtenRows, &p.writtenBytes)
	return p, err == nil
}

// authenticate checks a user's name and password.
func (s *Server) authenticate(user, password string) error {
	if s.cfg.Password == "" {
		return nil
	}
	if (user == "" || user == "default") && subtle.ConstantTimeCompare([]byte(password), []byte(s.cfg.Password)) == 1 {
		return nil
	}
	return exception(codeAuthentication, "AUTHENTICATION_FAILED",
		"%s: Authentication failed: password is incorrect, or there is no user with such name.", user)
}

// spool makes a file for an INSERT's data.
func (s *Server) spool() (*os.File, error) {
	f, err := os.OpenFile(fmt.Sprintf("%s/%d", s.cfg.SpoolDir, s.spools.Add(1)), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create spool file: %w", err)
	}
	return f, nil
}

func (s *Server) dropSpool(f *os.File) {
	if err := errors.Join(f.Close(), os.Remove(f.Name())); err != nil {
		s.log.Warn("could not remove a spool file", "error", err)
	}
}
