// Package store is ClickHouse: how it is reached, its migrations, and the
// columnar insert. Only the collector writes; everyone may read.
package store

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
)

// Config says where ClickHouse is.
type Config struct {
	// URL is clickhouse://user:password@host:9000/latchkey, or http(s)://… for
	// its HTTP interface. Without a database, latchkey is meant.
	URL string `env:"CLICKHOUSE_URL" envDefault:"clickhouse://127.0.0.1:9000/latchkey"`
	// Cluster makes migrations run ON CLUSTER with Replicated engines.
	Cluster string `env:"CLICKHOUSE_CLUSTER"`
}

// DefaultDatabase is used when the URL names none.
const DefaultDatabase = "latchkey"

// Store is a pool of connections to one ClickHouse.
type Store struct {
	// Conn is for queries. It connects when it is first used.
	Conn driver.Conn

	opts    *clickhouse.Options
	cluster string
}

// Open reads the URL and makes the pool. It does not connect: ClickHouse may be
// away when a service starts.
func Open(_ context.Context, url string) (*Store, error) { return OpenConfig(Config{URL: url}) }

// OpenConfig is [Open] with everything that can be configured.
func OpenConfig(cfg Config) (*Store, error) {
	opts, err := options(cfg.URL)
	if err != nil {
		return nil, err
	}
	conn, err := clickhouse.Open(opts)
	if err != nil {
		return nil, fmt.Errorf("open ClickHouse: %w", redact(err, opts))
	}
	return &Store{Conn: conn, opts: opts, cluster: cfg.Cluster}, nil
}

func options(url string) (*clickhouse.Options, error) {
	opts, err := clickhouse.ParseDSN(url)
	if err != nil || !usable(url, opts.Addr) {
		// The error may hold the URL, and that a password.
		return nil, errors.New("read the ClickHouse URL: want clickhouse://user:password@host:9000/latchkey or http://host:8123/latchkey")
	}
	if opts.Auth.Database == "" {
		opts.Auth.Database = DefaultDatabase
	}
	if opts.DialTimeout == 0 || opts.DialTimeout > 5*time.Second {
		opts.DialTimeout = 5 * time.Second
	}
	if opts.MaxOpenConns == 0 {
		opts.MaxOpenConns = 16
	}
	opts.ClientInfo.Products = append(opts.ClientInfo.Products, struct{ Name, Version string }{"latchkey", "1"})
	return opts, nil
}

// usable tells whether a URL has a scheme that we speak and addresses to dial.
func usable(url string, addrs []string) bool {
	scheme, _, _ := strings.Cut(url, "://")
	if !slices.Contains([]string{"clickhouse", "clickhouses", "tcp", "http", "https"}, scheme) || len(addrs) == 0 {
		return false
	}
	for _, addr := range addrs {
		_, port, err := net.SplitHostPort(addr)
		if _, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil {
			return false
		}
	}
	return true
}

func redact(err error, opts *clickhouse.Options) error {
	if opts.Auth.Password != "" && strings.Contains(err.Error(), opts.Auth.Password) {
		return errors.New("connection options are not usable")
	}
	return err
}

// Ping asks ClickHouse whether it is there.
func (s *Store) Ping(ctx context.Context) error {
	if err := s.Conn.Ping(ctx); err != nil {
		return fmt.Errorf("reach ClickHouse at %s: %w", strings.Join(s.opts.Addr, ","), err)
	}
	return nil
}

// Database is the database of the URL.
func (s *Store) Database() string { return s.opts.Auth.Database }

// Addr is where ClickHouse is, without credentials.
func (s *Store) Addr() string { return strings.Join(s.opts.Addr, ",") }

// Close closes the pool.
func (s *Store) Close() error {
	if err := s.Conn.Close(); err != nil {
		return fmt.Errorf("close ClickHouse: %w", err)
	}
	return nil
}
