package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/services/internal/engine/chdb"
	"github.com/latchkey-dev/latchkey/services/internal/engine/server"
)

// Files that the parent hands down, after stdin, stdout and stderr.
const (
	fdNative = 3
	fdHTTP   = 4
	fdReady  = 5
)

const (
	lockPatience = 5 * time.Second // a predecessor that was killed may still be ending
	exitPatience = 3 * time.Second
)

// IsChild tells whether this process was started to be the engine.
func IsChild() bool { return os.Getenv(childVariable) != "" }

// ChildMain is the engine's process. It returns the exit code.
func ChildMain() int {
	ready := os.NewFile(fdReady, "ready")
	if ready == nil {
		fmt.Fprintln(os.Stderr, "this command is started by Latchkey itself")
		return 2
	}
	if err := runChild(ready); err != nil {
		// The parent reads the first from the pipe, if it still listens, and the second from stderr.
		_, _ = fmt.Fprintln(ready, err)
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func runChild(ready *os.File) error {
	var cfg childConfig
	if err := json.Unmarshal([]byte(os.Getenv(childVariable)), &cfg); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	if err := os.Unsetenv(childVariable); err != nil { // holds the password
		return err
	}
	// Ctrl-C goes to the whole group; the parent decides when the engine stops.
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP)
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the parent
		cancel()
	}()

	native, err := inherit(fdNative)
	if err != nil {
		return err
	}
	web, err := inherit(fdHTTP)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("create data directory: %w", err)
	}
	unlock, err := lockDir(ctx, cfg.DataDir)
	if err != nil {
		return err
	}
	defer unlock()
	srv, err := open(cfg, native, web)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(ready, "ready"); err != nil {
		return fmt.Errorf("tell the parent: %w", err)
	}
	if err := ready.Close(); err != nil {
		return err
	}
	// Whatever hangs below, this process ends.
	context.AfterFunc(ctx, func() {
		time.AfterFunc(exitPatience, func() { os.Exit(3) })
	})
	return srv.Serve(ctx)
}

func open(cfg childConfig, native, web net.Listener) (*server.Server, error) {
	config := filepath.Join(cfg.DataDir, "config.xml")
	limit := cfg.MemoryLimit
	if limit == 0 {
		limit = defaultMemoryLimit()
	}
	if err := os.WriteFile(config, fmt.Appendf(nil, configXML, limit, mergeThreads()), 0o600); err != nil {
		return nil, fmt.Errorf("write the engine's configuration: %w", err)
	}
	db := filepath.Join(cfg.DataDir, "db")
	if err := prepareDatabase(db); err != nil {
		return nil, fmt.Errorf("prepare the database's directory: %w", err)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	forgotten, err := forgetLostParts(db)
	if err != nil {
		return nil, err
	}
	if forgotten > 0 {
		log.Info("inserts cut off by the last end may come again", "blocks", forgotten)
	}
	lib, err := chdb.Load(cfg.Library, "--path="+db, "--config-file="+config)
	if err != nil {
		return nil, err
	}
	return server.New(server.Config{
		Library: lib, SpoolDir: filepath.Join(cfg.DataDir, "spool"), Password: cfg.Password,
		Log: log, Native: native, HTTP: web,
	})
}

// prepareDatabase makes a database directory such as a server would have. Left
// to itself the engine, made for local use, gives the database "default" a second
// face that shows every file of the machine as a table. So that one gets another
// name, which the server detaches at once, and "default" is an ordinary database
// like any other.
func prepareDatabase(db string) error {
	// Without this folder the engine takes the database for one without a past,
	// and does not start what drops tables in the background: DROP … SYNC hangs.
	metadata := filepath.Join(db, "metadata")
	if err := os.MkdirAll(metadata, 0o700); err != nil {
		return err
	}
	definition, link := filepath.Join(metadata, "default.sql"), filepath.Join(metadata, "default")
	id := uuid.New()
	if target, err := os.Readlink(link); err == nil { // made anew at every start
		if known, err := uuid.Parse(filepath.Base(target)); err == nil {
			id = known
		}
		if err := os.Remove(link); err != nil {
			return err
		}
	}
	if _, err := os.Stat(definition); err == nil {
		return nil
	}
	return os.WriteFile(definition, fmt.Appendf(nil, "ATTACH DATABASE _ UUID '%s'\nENGINE = Atomic\n", id), 0o600)
}

// mergeThreads is how many threads merge: with more of them than processors, merges
// take from the inserts that made them necessary.
func mergeThreads() int { return min(max(runtime.NumCPU(), 2), 8) }

// configXML bounds memory and caches, and makes an INSERT durable before it is
// answered: without the two fsync settings a power cut can take parts away that
// were acknowledged.
const configXML = `<clickhouse>
	<max_server_memory_usage>%d</max_server_memory_usage>
	<default_database>` + server.HiddenDatabase + `</default_database>
	<mark_cache_size>67108864</mark_cache_size>
	<primary_index_cache_size>67108864</primary_index_cache_size>
	<index_mark_cache_size>16777216</index_mark_cache_size>
	<uncompressed_cache_size>0</uncompressed_cache_size>
	<index_uncompressed_cache_size>0</index_uncompressed_cache_size>
	<mmap_cache_size>256</mmap_cache_size>
	<compiled_expression_cache_size>33554432</compiled_expression_cache_size>
	<background_pool_size>%d</background_pool_size>
	<background_schedule_pool_size>8</background_schedule_pool_size>
	<merge_tree>
		<fsync_after_insert>1</fsync_after_insert>
		<fsync_part_directory>1</fsync_part_directory>
		<number_of_free_entries_in_pool_to_lower_max_size_of_merge>1</number_of_free_entries_in_pool_to_lower_max_size_of_merge>
		<number_of_free_entries_in_pool_to_execute_mutation>1</number_of_free_entries_in_pool_to_execute_mutation>
		<number_of_free_entries_in_pool_to_execute_optimize_entire_partition>1</number_of_free_entries_in_pool_to_execute_optimize_entire_partition>
	</merge_tree>
</clickhouse>
`

func inherit(fd uintptr) (net.Listener, error) {
	f := os.NewFile(fd, "listener")
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take over listener: %w", err)
	}
	return l, f.Close()
}

// lockDir makes sure that one engine at a time has the directory. The kernel
// frees the lock when its holder dies.
func lockDir(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "engine.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	deadline := time.Now().Add(lockPatience)
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) || ctx.Err() != nil {
			_ = f.Close()
			return nil, fmt.Errorf("another ClickHouse engine uses %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}
