package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"

	migrations "github.com/latchkey-dev/latchkey/schemas/clickhouse"
)

// Migration is one step of the schema.
type Migration struct {
	Version int64     `json:"version"`
	Name    string    `json:"name"`
	Applied bool      `json:"applied"`
	At      time.Time `json:"applied_at,omitzero"`
}

// Migrate creates the database and brings its schema to this version. Every
// step may run twice, so several processes may call it at once.
func (s *Store) Migrate(ctx context.Context) ([]Migration, error) {
	if err := s.createDatabase(ctx); err != nil {
		return nil, err
	}
	p, done, err := s.provider()
	if err != nil {
		return nil, err
	}
	defer done()
	results, err := p.Up(ctx)
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	applied := make([]Migration, len(results))
	for i, r := range results {
		applied[i] = Migration{Version: r.Source.Version, Name: r.Source.Path, Applied: true, At: time.Now()}
	}
	return applied, nil
}

// Migrations lists every step and whether it was applied. A database that does
// not exist yet has none applied.
func (s *Store) Migrations(ctx context.Context) ([]Migration, error) {
	if err := s.createDatabase(ctx); err != nil {
		return nil, err
	}
	p, done, err := s.provider()
	if err != nil {
		return nil, err
	}
	defer done()
	statuses, err := p.Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("read schema version: %w", err)
	}
	all := make([]Migration, len(statuses))
	for i, st := range statuses {
		all[i] = Migration{
			Version: st.Source.Version, Name: st.Source.Path,
			Applied: st.State == goose.StateApplied, At: st.AppliedAt,
		}
	}
	return all, nil
}

// createDatabase connects to the database that is always there.
func (s *Store) createDatabase(ctx context.Context) error {
	opts := *s.opts
	opts.Auth.Database = "default"
	conn, err := clickhouse.Open(&opts)
	if err != nil {
		return fmt.Errorf("open ClickHouse: %w", redact(err, s.opts))
	}
	defer conn.Close()
	if err := conn.Exec(ctx, "CREATE DATABASE IF NOT EXISTS "+quote(s.Database())+s.onCluster()); err != nil {
		return fmt.Errorf("create database %s: %w", s.Database(), err)
	}
	return nil
}

func quote(name string) string { return "`" + strings.ReplaceAll(name, "`", "``") + "`" }

func (s *Store) onCluster() string {
	if s.cluster == "" {
		return ""
	}
	return " ON CLUSTER " + quote(s.cluster)
}

func (s *Store) provider() (*goose.Provider, func(), error) {
	db := clickhouse.OpenDB(s.opts)
	p, err := goose.NewProvider("", db, s.files(), goose.WithStore(versions{s}), goose.WithIsolateDDL(true))
	if err != nil {
		_ = db.Close()
		return nil, nil, fmt.Errorf("read migrations: %w", err)
	}
	return p, func() { _ = p.Close() }, nil
}

// files are the migrations, for a cluster with ON CLUSTER in every statement and
// Replicated engines.
func (s *Store) files() fs.FS {
	if s.cluster == "" {
		return migrations.Migrations
	}
	return clusterFiles{migrations.Migrations, s.onCluster()}
}

// clusterFiles are files whose text is rewritten when they are opened.
type clusterFiles struct {
	fs.FS
	onCluster string
}

// Open opens a file; its text is that for the cluster.
func (c clusterFiles) Open(name string) (fs.File, error) {
	f, err := c.FS.Open(name)
	if err != nil || !strings.HasSuffix(name, ".sql") {
		return f, err
	}
	text, err := io.ReadAll(f)
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("read migration %s: %w", name, err)
	}
	return &clusterFile{f, strings.NewReader(clustered(string(text), c.onCluster))}, nil
}

type clusterFile struct {
	fs.File
	text *strings.Reader
}

func (f *clusterFile) Read(b []byte) (int, error) { return f.text.Read(b) }

// clustered rewrites the few statements that our migrations use: the name that
// follows IF [NOT] EXISTS or ALTER TABLE is where ON CLUSTER belongs.
func clustered(text, onCluster string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		for _, head := range []string{"IF NOT EXISTS ", "IF EXISTS ", "ALTER TABLE "} {
			before, rest, ok := strings.Cut(line, head)
			if !ok || strings.HasPrefix(strings.TrimSpace(line), "--") {
				continue
			}
			n := strings.IndexAny(rest, " ;")
			if n < 0 {
				n = len(rest)
			}
			line = before + head + rest[:n] + onCluster + rest[n:]
			break
		}
		if strings.HasPrefix(line, "ENGINE = ") && strings.Contains(line, "MergeTree") {
			line = strings.Replace(line, "ENGINE = ", "ENGINE = Replicated", 1)
		}
		lines[i] = line
	}
	return strings.Join(lines, "\n")
}

// versions is goose's memory of what was applied, in table schema_migrations.
type versions struct{ s *Store }

func (versions) Tablename() string { return "schema_migrations" }

func (v versions) CreateVersionTable(ctx context.Context, db database.DBTxConn) error {
	engine := "MergeTree"
	if v.s.cluster != "" {
		engine = "ReplicatedMergeTree"
	}
	_, err := db.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS schema_migrations"+v.s.onCluster()+
		" (version_id Int64, is_applied UInt8, tstamp DateTime DEFAULT now()) ENGINE = "+engine+" ORDER BY version_id")
	return err
}

// Insert writes by SELECT, which every ClickHouse and every protocol takes alike.
func (versions) Insert(ctx context.Context, db database.DBTxConn, req database.InsertRequest) error {
	_, err := db.ExecContext(ctx, fmt.Sprintf(
		"INSERT INTO schema_migrations (version_id, is_applied, tstamp) SELECT %d, 1, now()", req.Version))
	return err
}

func (versions) Delete(ctx context.Context, db database.DBTxConn, version int64) error {
	_, err := db.ExecContext(ctx, fmt.Sprintf(
		"ALTER TABLE schema_migrations DELETE WHERE version_id = %d SETTINGS mutations_sync = 2", version))
	return err
}

func (versions) GetMigration(ctx context.Context, db database.DBTxConn, version int64) (*database.GetMigrationResult, error) {
	row := db.QueryRowContext(ctx, fmt.Sprintf(
		"SELECT tstamp, is_applied = 1 FROM schema_migrations WHERE version_id = %d ORDER BY tstamp DESC LIMIT 1", version))
	var r database.GetMigrationResult
	var applied uint8
	if err := row.Scan(&r.Timestamp, &applied); errors.Is(err, sql.ErrNoRows) {
		return nil, database.ErrVersionNotFound
	} else if err != nil {
		return nil, err
	}
	r.IsApplied = applied == 1
	return &r, nil
}

func (versions) GetLatestVersion(ctx context.Context, db database.DBTxConn) (int64, error) {
	var version int64
	var rows uint64
	if err := db.QueryRowContext(ctx, "SELECT max(version_id), count() FROM schema_migrations").Scan(&version, &rows); err != nil {
		return 0, err
	}
	if rows == 0 {
		return 0, database.ErrVersionNotFound
	}
	return version, nil
}

func (versions) ListMigrations(ctx context.Context, db database.DBTxConn) (list []*database.ListMigrationsResult, err error) {
	rows, err := db.QueryContext(ctx, "SELECT DISTINCT version_id FROM schema_migrations ORDER BY version_id DESC")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		r := &database.ListMigrationsResult{IsApplied: true}
		if err := rows.Scan(&r.Version); err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	return list, rows.Err()
}
