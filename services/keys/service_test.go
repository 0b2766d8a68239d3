package keys

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// The service by itself: its own listener, health, metrics and stopping.
func TestServiceAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	deps := run.Deps{NATS: w.nc, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(), Bus: bus.Config{Replicas: 1, Partitions: 4}}
	svc, err := New(t.Context(), Config{Addr: "127.0.0.1:0", Prefix: "acme"}, deps)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- svc.Run(ctx) }()
	url := "http://" + svc.Addr()
	fetch := func(path string) (int, string) {
		t.Helper()
		res, err := http.Get(url + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	status, body := fetch("/-/ready")
	var report struct {
		Status string
		Checks map[string]struct{ OK bool }
	}
	if err := json.Unmarshal([]byte(body), &report); err != nil || status != 200 || report.Status != "ready" || !report.Checks["nats"].OK || report.Checks["clickhouse"].OK {
		t.Errorf("ready: %d %s", status, body)
	}
	if status, body := fetch("/metrics"); status != 200 || !strings.Contains(body, "latchkey_keys 1") || !strings.Contains(body, `latchkey_api_denied_total{reason="revoked"} 0`) {
		t.Errorf("metrics: %d %s", status, body)
	}
	if status, _ := fetch("/docs"); status != 200 {
		t.Errorf("docs: %d", status)
	}
	made := w.callAt(url, w.admin, "POST", "/v1/api-keys", object{"org_id": "org_system", "name": "n", "scopes": []string{"orgs:read"}})
	if !strings.HasPrefix(made.text("key"), "acme_live_") {
		t.Errorf("own prefix: %s", made.body)
	}
	// A key of another prefix works beside it.
	if r := w.callAt(url, made.text("key"), "GET", "/v1/orgs", nil); r.status != 200 {
		t.Errorf("own prefix: %s", r.body)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := http.Get(url + "/-/healthy"); err == nil {
		t.Error("it still answers after it stopped")
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]Config{
		"prefix": {Prefix: "L_K"}, "short pepper": {Prefix: "lk", Peppers: []string{"abcd"}}, "no hex": {Prefix: "lk", Peppers: []string{"zz"}},
	} {
		if err := c.Validate(); err == nil {
			t.Errorf("%s taken", name)
		}
	}
	var cfg Config
	if err := run.LoadFrom(&cfg, map[string]string{"LATCHKEY_TRUSTED_PROXIES": "10.0.0.0/8,127.0.0.1/32", "LATCHKEY_KEY_PEPPERS": strings.Repeat("ab", 16)}); err != nil {
		t.Fatal(err)
	}
	if len(cfg.TrustedProxies) != 2 || cfg.Prefix != "lk" || cfg.Addr != "127.0.0.1:8083" || len(cfg.Peppers) != 1 {
		t.Errorf("%+v", cfg)
	}
}
