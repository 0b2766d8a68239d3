package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/keys"
)

// keysAPI is a data directory as `up` leaves it, with a real keys API behind it.
func keysAPI(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	server, err := natsd.Start(t.Context(), natsd.Options{DataDir: filepath.Join(dir, "nats"), Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Shutdown)
	nc, err := server.Connect("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	service, err := keys.New(t.Context(), keys.Config{Prefix: "lk", AdminKeyPath: filepath.Join(dir, "admin.key")}, run.Deps{
		NATS: nc, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(), Bus: bus.Config{Replicas: 1, Partitions: 4},
	})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	apiServer := api.New(mux, api.Options{Keys: service.Keyset()})
	service.Register(apiServer.API)
	front := httptest.NewServer(apiServer.Handler())
	t.Cleanup(front.Close)
	addresses := fmt.Sprintf(`{"console":%q}`, strings.TrimPrefix(front.URL, "http://"))
	if err := os.WriteFile(filepath.Join(dir, "addresses.json"), []byte(addresses), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// latchkey runs a command and returns what it printed.
func latchkey(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := newRootCmd()
	cmd.SetOut(&out)
	cmd.SetErr(&errOut)
	cmd.SetArgs(args)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), err
}

// jsonCommands runs commands against dir and reads what they answer.
func jsonCommands(t *testing.T, dir string) func(args ...string) map[string]any {
	return func(args ...string) map[string]any {
		t.Helper()
		out, err := latchkey(t, append(args, "--data", dir, "--output", "json")...)
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		var v map[string]any
		if err := json.Unmarshal([]byte(out), &v); err != nil {
			t.Fatalf("%v: %v in %s", args, err, out)
		}
		return v
	}
}

func TestKeyCommands(t *testing.T) {
	t.Parallel()
	dir := keysAPI(t)
	do := jsonCommands(t, dir)
	org := do("org", "create", "--name", "Acme", "--owner-email", "owner@acme.example")["id"].(string)
	created := do("key", "create", "--org", org, "--name", "billing", "--scopes", "a:b,c:d", "--expires", "90d", "--tags", "x,y", "--owner", "ann")
	id := created["id"].(string)
	if !strings.HasPrefix(created["key"].(string), "lk_live_") || fmt.Sprint(created["scopes"]) != "[a:b c:d]" || created["expires_at"] == nil {
		t.Errorf("created %v", created)
	}
	rotated := do("key", "rotate", id, "--grace", "24h")
	next := rotated["id"].(string)
	if next == id || rotated["parent_key_id"] != id || rotated["key"] == created["key"] {
		t.Errorf("rotated %v", rotated)
	}
	if got := do("key", "show", id); got["successor_key_id"] != next {
		t.Errorf("shown %v", got)
	}
	if got := do("key", "suspend", next, "--reason", "odd traffic"); got["status"] != "suspended" {
		t.Errorf("suspended %v", got)
	}
	if got := do("key", "resume", next); got["status"] != "active" {
		t.Errorf("resumed %v", got)
	}
	if got := do("key", "revoke", next, "--reason", "keyCompromise"); got["status"] != "revoked" || got["revoke_reason"] != "keyCompromise" {
		t.Errorf("revoked %v", got)
	}
	if got := do("key", "list", "--org", org, "--status", "active")["keys"].([]any); len(got) != 1 {
		t.Errorf("listed %v", got)
	}
	if got := do("key", "list", "--org", org, "--limit", "1")["keys"].([]any); len(got) != 1 {
		t.Errorf("listed %v", got)
	}
	if got := do("org", "list")["orgs"].([]any); len(got) != 2 {
		t.Errorf("listed %v", got)
	}
	if got := do("org", "show", org); got["owner_email"] != "owner@acme.example" {
		t.Errorf("shown %v", got)
	}
	if got := do("org", "update", org, "--auto-rotate", "--rotation-days", "30", "--on-compromise", "suspend:critical", "--alert-budget", "0.5"); got["auto_rotate"] != true ||
		got["alert_budget"] != 0.5 ||
		got["rotation_days"] != 30.0 || fmt.Sprint(got["on_compromise"]) != "map[action:suspend severity:critical]" || got["name"] != "Acme" {
		t.Errorf("updated %v", got)
	}
	if got := do("key", "update", id, "--scopes", "a:b", "--allowed-cidrs", "198.51.100.7", "--on-compromise", "rotate", "--auto-rotate=false"); fmt.Sprint(got["scopes"]) != "[a:b]" ||
		fmt.Sprint(got["allowed_cidrs"]) != "[198.51.100.7/32]" || got["auto_rotate"] != false || got["owner"] != "ann" ||
		fmt.Sprint(got["on_compromise"]) != "map[action:rotate severity:high]" {
		t.Errorf("updated %v", got)
	}
	if got := do("audit", "--key", id, "--limit", "2")["events"].([]any); len(got) != 2 || got[0].(map[string]any)["type"] != "api_key.updated" {
		t.Errorf("audit %v", got)
	}
	table, err := latchkey(t, "key", "list", "--data", dir)
	if err != nil || !strings.Contains(table, id) || !strings.Contains(table, "a:b,c:d") || strings.Contains(table, created["key"].(string)) {
		t.Errorf("table: %v\n%s", err, table)
	}
}

func TestWebhookCommands(t *testing.T) {
	t.Parallel()
	do := jsonCommands(t, keysAPI(t))
	org := do("org", "create", "--name", "Acme", "--owner-email", "owner@acme.example")["id"].(string)
	hook := do("webhook", "create", "--org", org, "--url", "https://example.com/hooks", "--events", "alert.created")
	if !strings.HasPrefix(hook["secret"].(string), "whsec_") {
		t.Errorf("webhook %v", hook)
	}
	hookID := hook["id"].(string)
	if got := do("webhook", "rotate-secret", hookID); got["secret"] == hook["secret"] {
		t.Errorf("same secret %v", got)
	}
	if got := do("webhook", "list", "--org", org)["webhooks"].([]any); len(got) != 1 || got[0].(map[string]any)["secret"] != nil {
		t.Errorf("webhooks %v", got)
	}
	if got := do("webhook", "delete", hookID); got["deleted"] != true {
		t.Errorf("deleted %v", got)
	}
}

// An error says what is wrong and what to do.
func TestKeyCommandErrors(t *testing.T) {
	t.Parallel()
	dir := keysAPI(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"key", "show", "key_none", "--data", dir}, "no such key"},
		{[]string{"key", "create", "--org", "org_none", "--name", "x", "--scopes", "a:b", "--data", dir}, "no such organization"},
		{[]string{"key", "create", "--org", "org_system", "--name", "x", "--scopes", "all", "--data", dir}, "scopes[0]: scope \"all\""},
		{[]string{"key", "create", "--org", "org_system", "--name", "x", "--scopes", "a:b", "--expires", "soon", "--data", dir}, "--expires"},
		{[]string{"key", "create", "--name", "x"}, "scopes"},
		{[]string{"key", "update", "key_none", "--name", "x", "--data", dir}, "no such key"},
		{[]string{"webhook", "show", "whk_none", "--data", dir}, "no such webhook"},
		{[]string{"key", "list", "--data", t.TempDir()}, "is `latchkey up"},
		{[]string{"key", "list", "--data", dir, "--output", "xml"}, "neither table nor json"},
		{[]string{"key", "hygiene", "--data", dir}, "ClickHouse"},
		{[]string{"alert", "verdict", "alrt_1", "maybe", "--data", dir}, "expected"},
	} {
		if _, err := latchkey(t, c.args...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v", c.args, err)
		}
	}
}

func TestParseExpiry(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{
		"90d": now.AddDate(0, 0, 90), "12h": now.Add(12 * time.Hour), "2027-01-31": time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC),
		"2027-01-31T10:00:00+02:00": time.Date(2027, 1, 31, 8, 0, 0, 0, time.UTC),
	} {
		if got, err := parseExpiry(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %s, %v", text, got, err)
		}
	}
	if _, err := parseExpiry("soon", now); err == nil {
		t.Error("soon taken")
	}
}
