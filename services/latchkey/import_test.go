package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/ingest"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
)

// imported runs the command and returns its JSON answer.
func imported(t *testing.T, data string, args ...string) (sum ingest.Summary, err error) {
	t.Helper()
	cmd := newImportCmd()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	cmd.SetArgs(append([]string{"--data", data, "--wait=false", "--output", "json"}, args...))
	err = cmd.ExecuteContext(t.Context())
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &sum); err != nil {
			t.Fatalf("%v: %s", err, out.String())
		}
	}
	return sum, err
}

// upDir is a data directory that names a NATS server, as `up` writes it.
func upDir(t *testing.T) (string, jetstream.JetStream) {
	t.Helper()
	server := natstest.Start(t)
	js, err := jetstream.New(natstest.Connect(t, server))
	if err != nil {
		t.Fatal(err)
	}
	if err := bus.Ensure(t.Context(), js, bus.Config{}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := writeAddresses(dir, map[string]string{"nats": server.Addr()}); err != nil {
		t.Fatal(err)
	}
	return dir, js
}

// stored reads the events on USAGE.
func stored(t *testing.T, js jetstream.JetStream, history bool) map[string]int {
	t.Helper()
	s, err := js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		if (m.Header.Get(usage.HeaderMode) == usage.ModeHistory) != history {
			t.Errorf("message %d: mode %q", seq, m.Header.Get(usage.HeaderMode))
		}
		err = usage.Decode(m.Header.Get("Content-Type"), m.Data, m.Time, func(_ int, ev *usage.Event, bad error) {
			if bad != nil {
				t.Error(bad)
				return
			}
			if usage.Subject(usage.Partition(ev.KeyID, bus.DefaultPartitions)) != m.Subject {
				t.Errorf("key %s is on %s", ev.KeyID, m.Subject)
			}
			counts[ev.KeyID+" "+ev.ID+" "+ev.Time.String()]++
		})
		if err != nil {
			t.Error(err)
		}
	}
	return counts
}

func TestImportTwiceStoresOnce(t *testing.T) {
	pattern := "../../../shared/data/cloudtrail/CloudTrail/*.json"
	if files, _ := filepath.Glob(pattern); len(files) == 0 {
		t.Skip("no ../shared/data/cloudtrail beside the repository")
	}
	dir, js := upDir(t)
	for range 2 {
		sum, err := imported(t, dir, "--format", "cloudtrail", pattern)
		if err != nil || sum.Imported != 2815 || sum.LeftOut != 85 || len(sum.Reasons) != 1 {
			t.Fatalf("%+v, %v", sum, err)
		}
	}
	counts := stored(t, js, true)
	if len(counts) != 2815 {
		t.Errorf("%d events", len(counts))
	}
	for id, n := range counts {
		if n != 1 {
			t.Errorf("%s is there %d times", id, n)
		}
	}
}

func TestImportLive(t *testing.T) {
	dir, js := upDir(t)
	path := filepath.Join(dir, "access.log")
	text := `203.0.113.9 - alice [21/Nov/2025:09:00:00 +0100] "GET /v1/x HTTP/1.1" 200 1 "-" "curl"` + "\nnonsense\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	sum, err := imported(t, dir, "--format", "nginx", "--org", "org_1", "--live", path)
	if err != nil || sum.Imported != 1 || sum.LeftOut != 1 || sum.Reasons[0].Example != "access.log, line 2" {
		t.Fatalf("%+v, %v", sum, err)
	}
	if got := stored(t, js, false); len(got) != 1 {
		t.Errorf("%v", got)
	}
}

func TestImportFailures(t *testing.T) {
	dir, js := upDir(t)
	broken := filepath.Join(dir, "broken.json")
	if err := os.WriteFile(broken, []byte(`{"Records":[{"eventID":"a","eventTime":"2023-07-10T12:11:15Z","userIdentity":{"accessKeyId":"A"},"eventName":"x"},`), 0o600); err != nil {
		t.Fatal(err)
	}
	sum, err := imported(t, dir, "--format", "cloudtrail", broken)
	if err == nil || sum.Imported != 1 || len(sum.Errors) != 1 || !strings.Contains(sum.Errors[0], "broken.json") {
		t.Errorf("%+v, %v", sum, err)
	}
	if got := stored(t, js, true); len(got) != 1 {
		t.Errorf("what came before the break: %v", got)
	}
	for _, args := range [][]string{{"--format", "csv", broken}, {"--format", "nginx", filepath.Join(dir, "missing.log")}, {"--format", "nginx", "--org", "a b", broken}} {
		if _, err := imported(t, dir, args...); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
}
