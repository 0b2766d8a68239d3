package store

import (
	"io/fs"
	"regexp"
	"strings"
	"testing"

	migrations "github.com/latchkey-dev/latchkey/schemas/clickhouse"
)

// TestClusteredMigrations looks at every statement that makes or drops something.
func TestClusteredMigrations(t *testing.T) {
	t.Parallel()
	s := &Store{cluster: "main"}
	names, err := fs.Glob(migrations.Migrations, "*.sql")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	ddl := regexp.MustCompile(`(?m)^(CREATE|DROP|ALTER) .*$`)
	for _, name := range names {
		text, err := fs.ReadFile(s.files(), name)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range ddl.FindAllString(string(text), -1) {
			if !strings.Contains(line, "EXISTS ") || !strings.Contains(line, " ON CLUSTER `main`") {
				t.Errorf("%s: %s", name, line)
			}
		}
		if strings.Contains(string(text), "ENGINE = MergeTree") || strings.Contains(string(text), "ENGINE = AggregatingMergeTree") {
			t.Errorf("%s has an engine that is not replicated", name)
		}
	}
}
