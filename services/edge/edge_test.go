package edge

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	schema "github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// house is an edge over a NATS server of its own.
type house struct {
	*Service
	t    testing.TB
	nc   *nats.Conn
	js   jetstream.JetStream
	stop func()
}

func newHouse(t testing.TB, change func(*Config)) *house {
	t.Helper()
	nc, js := natstest.Bus(t, bus.Config{Partitions: 4})
	h := &house{t: t, nc: nc, js: js}
	h.start(change)
	return h
}

// start runs an edge on the house's NATS until the test ends or stop is called.
func (h *house) start(change func(*Config)) {
	h.t.Helper()
	cfg := testConfig()
	if change != nil {
		change(&cfg)
	}
	s, err := New(h.t.Context(), cfg, run.Deps{NATS: h.nc, Metrics: prometheus.NewRegistry(), Bus: bus.Config{Partitions: 4}})
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	h.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("edge stopped with %v", err)
		}
	}
	h.t.Cleanup(h.stop)
	h.Service = s
	select {
	case <-s.Loaded():
	case <-h.t.Context().Done():
		h.t.Fatal("keys were not loaded")
	}
}

func testConfig() Config {
	cfg := DefaultConfig()
	cfg.Addr, cfg.GRPCAddr, cfg.Name = "127.0.0.1:0", "127.0.0.1:0", "edge-1"
	cfg.FlushInterval, cfg.PolicyCheck = 2*time.Millisecond, 5*time.Millisecond
	return cfg
}

// put publishes a record of a key, and returns once the edge has it.
func (h *house) put(rec key.Record) {
	h.t.Helper()
	seq := publishKey(h.t, h.js, rec)
	h.eventually("key "+rec.ID, func() bool {
		k := h.keys.ByID(rec.ID)
		return k != nil && k.Sequence() >= seq
	})
}

func publishKey(t testing.TB, js jetstream.JetStream, rec key.Record) uint64 {
	t.Helper()
	body, err := json.Marshal(key.Change{ID: "evt_1", Type: key.Updated, Time: time.Now(), Actor: "system", Record: rec})
	if err != nil {
		t.Fatal(err)
	}
	ack, err := js.Publish(t.Context(), bus.KeySubject(rec.ID), body)
	if err != nil {
		t.Fatal(err)
	}
	return ack.Sequence
}

// newKey is an active key of an organization and its secret.
func newKey(t testing.TB, id, org string, scopes ...string) (key.Record, string) {
	t.Helper()
	k, err := apikey.Generate(apikey.Live)
	if err != nil {
		t.Fatal(err)
	}
	return key.Record{
		ID: id, OrgID: org, Name: "Name of " + id, Hash: apikey.Sum(k.Secret()).String(), Prefix: k.Masked(),
		Environment: "live", Scopes: scopes, Status: key.Active, CreatedAt: time.Now(),
	}, k.Secret()
}

func (h *house) eventually(what string, ok func() bool) {
	h.t.Helper()
	eventually(h.t, what, ok)
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("%s did not happen", what)
		}
	}
}

// events reads the n events that USAGE must hold, and fails if there are others.
func (h *house) events(n int) []schema.Event {
	h.t.Helper()
	h.eventually("publishing", h.outbox.drained)
	return readEvents(h.t, h.js, n)
}

func readEvents(t testing.TB, js jetstream.JetStream, n int) []schema.Event {
	t.Helper()
	stream, err := js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	var out []schema.Event
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		m, err := stream.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		err = schema.Decode(m.Header.Get("Content-Type"), m.Data, time.Now(), func(_ int, ev *schema.Event, err error) {
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, *ev)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(out) != n {
		t.Fatalf("%d events, want %d: %+v", len(out), n, out[:min(len(out), 20)])
	}
	return out
}

// auth asks /auth with headers given as pairs.
func (h *house) auth(method string, headers ...string) *http.Response {
	h.t.Helper()
	res, _ := h.call(method, "/auth", nil, headers...)
	return res
}

func (h *house) call(method, path string, body io.Reader, headers ...string) (*http.Response, []byte) {
	h.t.Helper()
	r, err := http.NewRequestWithContext(h.t.Context(), method, "http://"+h.Addr()+path, body)
	if err != nil {
		h.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		h.t.Fatal(err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	return res, answer
}

func TestAuth(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(c *Config) { c.TrustedProxies = []string{"127.0.0.1"} })
	rec, secret := newKey(t, "key_1", "org_acme", "orders:write")
	rec.Name = "Bücher\r\nX-Evil: 1"
	h.put(rec)
	res := h.auth("GET", "Authorization", "Bearer "+secret, "X-Forwarded-Method", "POST", "X-Forwarded-Uri", "/v1/orders/42?x=1",
		"X-Forwarded-For", "1.2.3.4, 203.0.113.7", "X-Required-Scope", "orders:write", "User-Agent", "terraform/1.9")
	if res.StatusCode != 200 {
		t.Fatalf("status %d", res.StatusCode)
	}
	for name, want := range map[string]string{
		headerKeyID: "key_1", headerOrgID: "org_acme", headerKeyName: "B%C3%BCcher%0D%0AX-Evil: 1", headerEnvironment: "live",
		headerScopes: "orders:write", headerRoute: "/v1/orders/{id}", headerClientIP: "203.0.113.7", headerDenyReason: "",
	} {
		if got, ok := res.Header[name]; !ok || got[0] != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	ev := h.events(1)[0]
	if ev.KeyID != "key_1" || ev.OrgID != "org_acme" || ev.Method != "POST" || ev.Route != "/v1/orders/{id}" || ev.Decision != "allow" ||
		ev.SourceIP.String() != "203.0.113.7" || ev.UserAgent != "terraform/1.9" || ev.Scope != "orders:write" || ev.Gateway != "edge-1" || ev.ID == "" {
		t.Errorf("event %+v", ev)
	}
}

func TestAuthDenies(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	good, secret := newKey(t, "key_good", "org_acme", "orders:read")
	revoked, revokedSecret := newKey(t, "key_revoked", "org_acme", "orders:read")
	revoked.Status = key.Revoked
	expired, expiredSecret := newKey(t, "key_expired", "org_acme", "orders:read")
	past := time.Now().Add(-time.Hour)
	expired.ExpiresAt = &past
	for _, r := range []key.Record{good, revoked, expired} {
		h.put(r)
	}
	_, unknown := newKey(t, "", "")
	for i, c := range []struct {
		secret, reason, shown string
		status                int
	}{
		{"", schema.DenyMissingKey, schema.DenyMissingKey, 401},
		{"hello", schema.DenyInvalidKey, schema.DenyInvalidKey, 401},
		{unknown, schema.DenyInvalidKey, schema.DenyInvalidKey, 401},
		{revokedSecret, schema.DenyRevokedKey, schema.DenyInvalidKey, 401},
		{expiredSecret, schema.DenyExpiredKey, schema.DenyInvalidKey, 401},
		{secret, schema.DenyInsufficientScope, schema.DenyInsufficientScope, 403},
	} {
		res := h.auth("GET", "X-API-Key", c.secret, "X-Original-Method", "DELETE", "X-Original-URI", "/v1/orders", "X-Required-Scope", "orders:delete",
			"X-Latchkey-Key-Id", "key_smuggled")
		if res.StatusCode != c.status || res.Header.Get(headerDenyReason) != c.shown {
			t.Errorf("%d: %d %s", i, res.StatusCode, res.Header.Get(headerDenyReason))
		}
		for _, name := range []string{headerKeyID, headerOrgID, headerKeyName, headerScopes, headerEnvironment} {
			if got, ok := res.Header[name]; !ok || got[0] != "" {
				t.Errorf("%d: %s is %q, want it empty", i, name, got)
			}
		}
		ev := h.events(i + 1)
		found := false
		for _, e := range ev {
			found = found || e.DenyReason == c.reason && e.Decision == "deny" && e.Method == "DELETE" && int(e.Status) == c.status
		}
		if !found {
			t.Errorf("%d: no event about %s in %+v", i, c.reason, ev)
		}
	}
}

func TestAuthRefusesContradictingHeaders(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	rec, secret := newKey(t, "key_1", "org_acme")
	h.put(rec)
	for name, headers := range map[string][]string{
		"forwarded smuggled through nginx":  {"X-Original-Method", "DELETE", "X-Original-Uri", "/admin", "X-Forwarded-Method", "GET", "X-Forwarded-Uri", "/public"},
		"original smuggled through Traefik": {"X-Forwarded-Method", "DELETE", "X-Forwarded-Uri", "/admin", "X-Original-Uri", "/public"},
		"method alone":                      {"X-Original-Method", "DELETE", "X-Original-Uri", "/admin", "X-Forwarded-Method", "GET"},
		"two lines":                         {"X-Forwarded-Method", "GET", "X-Forwarded-Uri", "/public", "X-Forwarded-Uri", "/admin"},
		"dot segments":                      {"X-Forwarded-Uri", "/public/../admin"},
		"encoded dots":                      {"X-Forwarded-Uri", "/public/%2e%2e/admin"},
		"encoded slash":                     {"X-Forwarded-Uri", "/public%2fadmin"},
		"dots with parameters":              {"X-Forwarded-Uri", "/public/..;/admin"},
		"backslash":                         {"X-Forwarded-Uri", `/public\admin`},
		"bad escape":                        {"X-Forwarded-Uri", "/public/%zz"},
		"fragment":                          {"X-Forwarded-Uri", "/public/#/../../admin"},
	} {
		res := h.auth("GET", append(headers, "X-API-Key", secret)...)
		if challenge := res.Header.Get("WWW-Authenticate"); res.StatusCode != 403 || challenge != `Bearer realm="latchkey", error="invalid_request"` {
			t.Errorf("%s: %d %s", name, res.StatusCode, challenge)
		}
	}
	h.events(0)
}

func TestPolicyFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "policy.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	write(`
rules:
  - match: GET /v1/devices/{id}
    scope: devices:read
  - match: POST /v1/devices/{id}/telemetry
    scope: telemetry:write
    route: /telemetry
  - match: /v1/any/
  - match: GET /docs/
    public: true
`)
	h := newHouse(t, func(c *Config) { c.Policy = file })
	rec, secret := newKey(t, "key_1", "org_acme", "telemetry:write")
	h.put(rec)
	ask := func(method, uri string, more ...string) *http.Response {
		t.Helper()
		return h.auth("GET", append(more, "X-API-Key", secret, "X-Forwarded-Method", method, "X-Forwarded-Uri", uri)...)
	}
	for _, c := range []struct {
		method, uri, route string
		status             int
	}{
		{"POST", "/v1/devices/d1/telemetry?a=b", "/telemetry", 200},
		{"POST", "//v1/devices//d1/telemetry", "/telemetry", 200},
		{"GET", "/v1/devices/d1", "/v1/devices/{id}", 403},
		{"HEAD", "/v1/devices/d1", "/v1/devices/{id}", 403},
		{"DELETE", "/v1/devices/d1", "/v1/devices/d1", 403},
		{"GET", "/v1/any/thing", "/v1/any/", 200},
		{"GET", "/v1/any", "/v1/any/", 200},
		{"GET", "/elsewhere/42", "/elsewhere/{id}", 403},
		{"GET", "/docs/x", "/docs/", 200},
	} {
		res := ask(c.method, c.uri)
		if res.StatusCode != c.status || res.Header.Get(headerRoute) != c.route {
			t.Errorf("%s %s: %d, route %q", c.method, c.uri, res.StatusCode, res.Header.Get(headerRoute))
		}
	}
	if res := h.auth("GET", "X-Forwarded-Uri", "/docs/x"); res.StatusCode != 200 || res.Header[headerKeyID] == nil {
		t.Errorf("public without a key: %d", res.StatusCode)
	}
	if res := ask("POST", "/v1/devices/d1/telemetry", "X-Required-Scope", "telemetry:write, admin:all"); res.StatusCode != 403 {
		t.Errorf("X-Required-Scope does not add: %d", res.StatusCode)
	}
	if res := ask("PATCH", "/elsewhere"); res.Header.Get("WWW-Authenticate") != `Bearer realm="latchkey", error="insufficient_scope"` {
		t.Errorf("no rule: %q names a scope", res.Header.Get("WWW-Authenticate"))
	}
	if res := ask("GET", "/v1/devices/d1", "X-Required-Scope", "telemetry:write"); res.StatusCode != 403 {
		t.Errorf("X-Required-Scope replaces: %d", res.StatusCode)
	}

	write("rules:\n  - match: GET /v1/devices/{id}\n    scope: telemetry:write\n")
	h.eventually("reload", func() bool { return ask("GET", "/v1/devices/d1").StatusCode == 200 })
	write("rules:\n  - match: GET /v1/{\n  - match: GET /x\n    scope: nonsense\n")
	h.eventually("refusal of the bad file", func() bool { return h.policyError.Load() != nil })
	if err := (*h.policyError.Load()).Error(); !strings.Contains(err, "rule 1") || !strings.Contains(err, "rule 2") {
		t.Errorf("the error does not name both rules: %s", err)
	}
	if res := ask("GET", "/v1/devices/d1"); res.StatusCode != 200 {
		t.Errorf("a bad file took the good one out of force: %d", res.StatusCode)
	}
	if _, body := h.call("GET", "/-/ready", nil); !bytes.Contains(body, []byte("last good one stays in force")) {
		t.Errorf("ready does not tell: %s", body)
	}
	write("rules:\n  - match: GET /v1/other\n")
	h.eventually("recovery", func() bool { return ask("GET", "/v1/other").StatusCode == 200 && h.policyError.Load() == nil })
}

func TestPostUsage(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	rec, secret := newKey(t, "key_pub", "org_acme", "usage:write")
	admin, adminSecret := newKey(t, "key_admin", key.SystemOrg, "full_access")
	other, _ := newKey(t, "key_other", "org_other")
	reader, readerSecret := newKey(t, "key_reader", "org_acme", "usage:read")
	for _, r := range []key.Record{rec, admin, other, reader} {
		h.put(r)
	}
	line := func(org, keyID string) string {
		return fmt.Sprintf(`{"time":%q,"org_id":%q,"key_id":%q,"source_ip":"203.0.113.7","route":"/x"}`, time.Now().UTC().Format(time.RFC3339Nano), org, keyID)
	}
	mine := line("org_acme", "key_1")
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	_, _ = zw.Write([]byte(mine + "\n" + mine))
	_ = zw.Close()
	total := 0
	for name, c := range map[string]struct {
		secret   string
		body     string
		headers  []string
		status   int
		accepted int
		rejected string // indices
	}{
		"object":           {secret, mine, nil, 202, 1, "[]"},
		"array":            {secret, "[" + mine + "," + mine + "]", []string{"Content-Type", "application/json"}, 202, 2, "[]"},
		"ndjson":           {secret, mine + "\nbroken\n" + mine + "\n", []string{"Content-Type", "application/x-ndjson"}, 202, 2, "[1]"},
		"gzip":             {secret, zipped.String(), []string{"Content-Type", "application/x-ndjson", "Content-Encoding", "gzip"}, 202, 2, "[]"},
		"another org":      {secret, "[" + line("org_other", "key_x") + "," + mine + "]", nil, 202, 1, "[0]"},
		"a key of another": {secret, line("org_acme", "key_other"), nil, 202, 0, "[0]"},
		"admin":            {adminSecret, line("org_anything", "key_anything"), nil, 202, 1, "[]"},
		"scope":            {readerSecret, mine, nil, 403, 0, ""},
		"history":          {secret, mine, []string{schema.HeaderMode, "history"}, 403, 0, ""},
		"admin's history":  {adminSecret, mine, []string{schema.HeaderMode, "history"}, 202, 1, "[]"},
		"mode":             {secret, mine, []string{schema.HeaderMode, "x"}, 400, 0, ""},
		"type":             {secret, mine, []string{"Content-Type", "text/csv"}, 415, 0, ""},
		"encoding":         {secret, mine, []string{"Content-Encoding", "br"}, 415, 0, ""},
		"not gzip":         {secret, mine, []string{"Content-Encoding", "gzip"}, 400, 0, ""},
		"empty":            {secret, "", nil, 400, 0, ""},
	} {
		res, body := h.call("POST", "/v1/usage", strings.NewReader(c.body), append(c.headers, "Authorization", "Bearer "+c.secret)...)
		if res.StatusCode != c.status {
			t.Errorf("%s: %d %s", name, res.StatusCode, body)
			continue
		}
		if c.status != 202 {
			if !strings.HasPrefix(res.Header.Get("Content-Type"), "application/problem+json") {
				t.Errorf("%s: %s", name, body)
			}
			continue
		}
		var a accepted
		if err := json.Unmarshal(body, &a); err != nil {
			t.Fatal(err)
		}
		indices := []int{}
		for _, r := range a.Rejected {
			indices = append(indices, r.Index)
		}
		if a.Accepted != c.accepted || fmt.Sprint(indices) != c.rejected {
			t.Errorf("%s: %s", name, body)
		}
		total += c.accepted
	}
	h.events(total + 2) // and two denials
}

func TestPostUsageLimits(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(c *Config) { c.MaxBody = 1000 })
	rec, secret := newKey(t, "key_pub", "org_acme", "usage:write")
	h.put(rec)
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	_, _ = zw.Write(make([]byte, 100_000))
	_ = zw.Close()
	for name, c := range map[string]struct {
		body    io.Reader
		headers []string
	}{
		"length":  {bytes.NewReader(make([]byte, 1001)), nil},
		"chunked": {io.MultiReader(bytes.NewReader(make([]byte, 5000))), nil},
		"gzip":    {bytes.NewReader(zipped.Bytes()), []string{"Content-Encoding", "gzip"}},
	} {
		if res, body := h.call("POST", "/v1/usage", c.body, append(c.headers, "X-API-Key", secret)...); res.StatusCode != 413 {
			t.Errorf("%s: %d %s", name, res.StatusCode, body)
		}
	}
}

func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	rec, secret := newKey(t, "key_pub", "org_acme", "usage:write")
	h.put(rec)
	body := `{"time":"2026-01-01T00:00:00Z","org_id":"org_acme","key_id":"key_1","source_ip":"203.0.113.7","route":"/x"}`
	for range 2 {
		h.call("POST", "/v1/usage", strings.NewReader(body), "X-API-Key", secret, "Idempotency-Key", "abc")
	}
	if ev := h.events(2); ev[0].ID != ev[1].ID || ev[0].ID == "" {
		t.Errorf("ids %q and %q", ev[0].ID, ev[1].ID)
	}
}

func TestReadyAndMetrics(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	if res, body := h.call("GET", "/-/ready", nil); res.StatusCode != 200 {
		t.Errorf("%d %s", res.StatusCode, body)
	}
	if res, _ := h.call("GET", "/-/healthy", nil); res.StatusCode != 200 {
		t.Error(res.StatusCode)
	}
	h.auth("GET")
	if _, body := h.call("GET", "/metrics", nil); !bytes.Contains(body, []byte(`latchkey_edge_decisions_total{reason="missing_key"} 1`)) {
		t.Errorf("%s", body)
	}
	if res, _ := h.call("GET", "/v1/usage", nil); res.StatusCode != 405 || res.Header.Get("Allow") != "POST" {
		t.Error(res.StatusCode)
	}
	if res, _ := h.call("GET", "/nothing", nil); res.StatusCode != 404 {
		t.Error(res.StatusCode)
	}
}
