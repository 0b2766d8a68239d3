package store_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

func TestMain(m *testing.M) { enginetest.Main(m) }

// open makes a database of its own with all migrations, by both protocols.
func open(t *testing.T, scheme string) *store.Store {
	t.Helper()
	e := enginetest.Start(t)
	db := enginetest.Database(t, e)
	addr := e.NativeAddr()
	if scheme == "http" {
		addr = e.HTTPAddr()
	}
	s, err := store.Open(t.Context(), fmt.Sprintf("%s://%s/%s", scheme, addr, db))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	applied, err := s.Migrate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(applied) < 3 {
		t.Fatalf("applied %+v", applied)
	}
	return s
}

func count(t *testing.T, s *store.Store, query string) (n uint64) {
	t.Helper()
	if err := s.Conn.QueryRow(t.Context(), query).Scan(&n); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return n
}

func TestMigrateTwice(t *testing.T) {
	t.Parallel()
	s := open(t, "clickhouse")
	applied, err := s.Migrate(t.Context())
	if err != nil || len(applied) != 0 {
		t.Fatalf("second run applied %+v, %v", applied, err)
	}
	all, err := s.Migrations(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if !m.Applied {
			t.Errorf("%s is not applied", m.Name)
		}
	}
}

// TestInsertOnce inserts the same block three times under one token: table and
// both rollups hold it once.
func TestInsertOnce(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"clickhouse", "http"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			s := open(t, scheme)
			in := s.Inserter()
			defer in.Close()
			block := func(n int) proto.Input {
				var id, org, key proto.ColStr
				var at proto.ColDateTime64
				at.WithPrecision(proto.PrecisionNano)
				for i := range n {
					id.Append(fmt.Sprint(i))
					org.Append("org_a")
					key.Append(fmt.Sprint("key_", i%10))
					at.Append(time.Date(2026, 11, 21, 17, 0, i%3600, 0, time.UTC))
				}
				return proto.Input{{Name: "id", Data: id}, {Name: "org_id", Data: org}, {Name: "key_id", Data: key}, {Name: "time", Data: at}}
			}
			for _, insert := range []struct {
				token string
				rows  int
			}{{"a", 1000}, {"b", 500}, {"a", 1000}, {"b", 500}, {"a", 1000}} {
				if err := in.Insert(t.Context(), "usage_events", block(insert.rows),
					store.Setting{Name: "insert_deduplication_token", Value: insert.token},
					store.Setting{Name: "deduplicate_blocks_in_dependent_materialized_views", Value: "1"}); err != nil {
					t.Fatal(err)
				}
			}
			for query, want := range map[string]uint64{
				"SELECT count() FROM usage_events":                                          1500,
				"SELECT sum(events) FROM usage_hourly":                                      1500,
				"SELECT sum(events) FROM key_last_used":                                     1500,
				"SELECT toUInt64(uniq(key_id)) FROM key_last_used":                          10,
				"SELECT count() FROM (SELECT key_id, count() FROM usage_events GROUP BY 1)": 10,
			} {
				if got := count(t, s, query); got != want {
					t.Errorf("%s: %d, want %d", query, got, want)
				}
			}
		})
	}
}

func TestBadURLHidesThePassword(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"ftp://u:geheim@host", "clickhouse://u:geheim@host:x/x", "::geheim"} {
		if _, err := store.Open(t.Context(), url); err == nil || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%s: %v", url, err)
		}
	}
}
