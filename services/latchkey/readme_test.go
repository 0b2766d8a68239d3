package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestReadmeFirstEvent runs the README's commands for the first event as they
// stand there, but for the ports.
func TestReadmeFirstEvent(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("the README's commands need curl")
	}
	readme, err := os.ReadFile(filepath.Join(repository, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(readme), "## Send the first event")
	_, script, found2 := strings.Cut(section, "```sh\n")
	script, _, found3 := strings.Cut(script, "```")
	if !found || !found2 || !found3 {
		t.Fatal("README.md has no commands for the first event")
	}
	work := t.TempDir()
	if err := os.Mkdir(filepath.Join(work, "bin"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(binary, filepath.Join(work, "bin", "latchkey")); err != nil {
		t.Fatal(err)
	}
	in := startUp(t, filepath.Join(work, "data"))
	script = strings.NewReplacer("127.0.0.1:8081", in.addrs["edge"], "127.0.0.1:8123", in.addrs["clickhouse_http"],
		// Not everybody's machine is as quick as ours.
		"sleep 2", `for i in $(seq 100); do curl -s http://`+in.addrs["clickhouse_http"]+` --data 'SELECT count() FROM latchkey.usage_events' | grep -q 1 && break; sleep 0.1; done`,
	).Replace(script)
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = work
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), `"accepted":1`) || !strings.Contains(string(out), "any-key-you-have\t1") {
		t.Errorf("the README's commands answer\n%s", out)
	}
}
