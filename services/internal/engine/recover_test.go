package engine

import (
	"os"
	"path/filepath"
	"testing"
)

func TestForgetLostParts(t *testing.T) {
	t.Parallel()
	db := t.TempDir()
	table := filepath.Join(db, "store", "abc", "abc-def")
	logs := filepath.Join(table, "deduplication_logs")
	for _, dir := range []string{logs, filepath.Join(table, "202611_1_3_1"), filepath.Join(table, "202611_5_5_0_9"), filepath.Join(table, "tmp_insert_202611_6_6_0"), filepath.Join(table, "detached")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	first, last := filepath.Join(logs, "deduplication_log_9.txt"), filepath.Join(logs, "deduplication_log_10.txt")
	write(t, first, "1\t202611_1_1_0\tmerged\n1\t202611_4_4_0\tdropped\n1\t202610_2_2_0\tother partition\n")
	write(t, last, "2\t202611_4_4_0\tdropped\n1\t202611_5_5_0\tmutated\n1\t202611_6_6_0\tlost\n1\t2026")
	n, err := forgetLostParts(db)
	if err != nil || n != 2 {
		t.Fatalf("took back %d, %v, want 2", n, err)
	}
	known := map[string]string{}
	for _, file := range []string{first, last} {
		if err := readDeduplicationLog(file, known); err != nil {
			t.Fatal(err)
		}
	}
	if len(known) != 2 || known["merged"] == "" || known["mutated"] == "" {
		t.Errorf("left are %v, want merged and mutated", known)
	}
	if n, err := forgetLostParts(db); err != nil || n != 0 {
		t.Errorf("again: %d, %v", n, err)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
