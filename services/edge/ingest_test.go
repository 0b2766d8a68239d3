package edge

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// TestPostManyEvents posts 100,000 lines, one of them broken, in one body.
func TestPostManyEvents(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	rec, secret := newKey(t, "key_pub", "org_acme", "usage:write")
	h.put(rec)
	const n, broken = 100_000, 77_777
	var body bytes.Buffer
	at := time.Now().UTC().Format(time.RFC3339)
	for i := range n {
		if i == broken {
			body.WriteString("{\"time\":\"yesterday\"}\n")
			continue
		}
		fmt.Fprintf(&body, `{"id":"e-%d","time":%q,"org_id":"org_acme","key_id":"key_%d","source_ip":"203.0.113.%d","method":"POST","route":"/v1/devices/{id}/telemetry",`+
			`"status":201,"scope":"ingest:write","decision":"allow","deny_reason":"","user_agent":"terraform/1.9 (+https://www.example.com/a-long-user-agent-string)",`+
			`"latency_us":812,"request_bytes":512,"response_bytes":90,"gateway":"edge-1","something":"that we do not know"}`+"\n", i, at, i%50, i%250)
	}
	t.Logf("%d bytes", body.Len())
	res, answer := h.call("POST", "/v1/usage", &body, "Authorization", "Bearer "+secret, "Content-Type", "application/x-ndjson")
	var a accepted
	if err := json.Unmarshal(answer, &a); err != nil || res.StatusCode != 202 {
		t.Fatalf("%s %.500s %v", res.Status, answer, err)
	}
	if a.Accepted != n-1 || len(a.Rejected) != 1 || a.Rejected[0].Index != broken || !strings.Contains(a.Rejected[0].Error, "time") {
		t.Errorf("%.500s", answer)
	}
	seen := map[string]bool{}
	for _, ev := range h.events(n - 1) {
		seen[ev.ID] = true
	}
	if len(seen) != n-1 {
		t.Errorf("%d different ids", len(seen))
	}
}

// TestPostWithoutNATS: 202 is never said of what is not stored.
func TestPostWithoutNATS(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	nc, js := srv.connect()
	h := &house{t: t, nc: nc, js: js}
	h.start(nil)
	rec, secret := newKey(t, "key_pub", "org_acme", "usage:write")
	h.put(rec)
	srv.srv.Shutdown()
	body := fmt.Sprintf(`{"time":%q,"org_id":"org_acme","key_id":"key_1","source_ip":"203.0.113.7","route":"/x"}`, time.Now().UTC().Format(time.RFC3339))
	h.eventually("noticing", func() bool { return !nc.IsConnected() })
	res, _ := h.call("POST", "/v1/usage", strings.NewReader(body), "X-API-Key", secret)
	if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" {
		t.Errorf("%s, Retry-After %q", res.Status, res.Header.Get("Retry-After"))
	}
	srv.start()
	h.eventually("recovery", func() bool {
		res, _ := h.call("POST", "/v1/usage", strings.NewReader(body), "X-API-Key", secret)
		return res.StatusCode == 202
	})
	_, h.js = srv.connect()
	h.events(1)
}

// TestSecretStaysHere runs requests of every kind and looks for the secret in
// all that they leave behind.
func TestSecretStaysHere(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	rec, secret := newKey(t, "key_1", "org_acme", "a:b")
	h.put(rec)
	for _, headers := range [][]string{
		{"Authorization", "Bearer " + secret},
		{"X-API-Key", secret},
		{"Authorization", "Bearer " + secret, "X-Required-Scope", "c:d"},
		{"X-API-Key", secret[:len(secret)-1]},
	} {
		res := h.auth("GET", headers...)
		for name, values := range res.Header {
			if strings.Contains(strings.Join(values, " "), secret[8:30]) {
				t.Errorf("the secret is in %s", name)
			}
		}
	}
	h.eventually("publishing", h.outbox.drained)
	stream, err := h.js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		m, err := stream.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(m.Data, []byte(secret[8:30])) {
			t.Error("the secret is in an event")
		}
	}
	if _, body := h.call("GET", "/metrics", nil); bytes.Contains(body, []byte(secret[8:30])) {
		t.Error("the secret is in the metrics")
	}
}

func TestNewRefusesBadConfiguration(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Config){
		"proxies": func(c *Config) { c.TrustedProxies = []string{"nonsense"} },
		"peppers": func(c *Config) { c.Peppers = []string{"abcd"} },
		"policy":  func(c *Config) { c.Policy = filepath.Join(t.TempDir(), "none.yaml") },
		"queue":   func(c *Config) { c.Queue = 0 },
		"text":    func(c *Config) { c.Policy = "rules:\n" },
	} {
		cfg := testConfig()
		change(&cfg)
		if _, err := New(t.Context(), cfg, run.Deps{Metrics: prometheus.NewRegistry()}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
