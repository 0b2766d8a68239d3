package edge

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/schemas/key"
	schema "github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// The addresses in the configurations of deploy/gateways, which the tests
// replace by free ones.
const (
	sampleListen   = "127.0.0.1:8000"
	sampleEdge     = "127.0.0.1:8081"
	sampleUpstream = "127.0.0.1:9090"
)

// clientAddr is the client's, so that it is told from the gateway's 127.0.0.1.
const clientAddr = "127.0.0.2"

// gateway is a server in front of an upstream.
type gateway struct {
	name string
	bin  []string // where its program may lie
	// files of deploy/gateways that it reads.
	files []string
	// prepare writes what else it needs into dir, and says how to start it.
	prepare func(t *testing.T, bin, dir string) *exec.Cmd
}

var gateways = []gateway{
	{
		name: "nginx", bin: []string{"nginx", "/usr/sbin/nginx"}, files: []string{"nginx/latchkey.conf"},
		prepare: func(t *testing.T, bin, dir string) *exec.Cmd {
			var main strings.Builder
			fmt.Fprintf(&main, "daemon off;\nmaster_process off;\npid %s/nginx.pid;\nerror_log stderr warn;\nevents {}\nhttp {\n  access_log off;\n", dir)
			for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
				fmt.Fprintf(&main, "  %s_temp_path %s/%s;\n", kind, dir, kind)
			}
			writeFile(t, filepath.Join(dir, "nginx.conf"), main.String()+"  include "+dir+"/latchkey.conf;\n}\n")
			return exec.Command(bin, "-p", dir, "-c", filepath.Join(dir, "nginx.conf"))
		},
	},
	{
		name: "caddy", bin: []string{"caddy"}, files: []string{"caddy/Caddyfile"},
		prepare: func(t *testing.T, bin, dir string) *exec.Cmd {
			writeFile(t, filepath.Join(dir, "main.caddyfile"), "{\n\tadmin off\n}\nimport "+dir+"/Caddyfile\n")
			return exec.Command(bin, "run", "--adapter", "caddyfile", "--config", filepath.Join(dir, "main.caddyfile"))
		},
	},
	{
		name: "haproxy", bin: []string{"haproxy", "/usr/sbin/haproxy"}, files: []string{"haproxy/haproxy.cfg", "haproxy/latchkey.lua"},
		prepare: func(_ *testing.T, bin, dir string) *exec.Cmd {
			return exec.Command(bin, "-db", "-f", filepath.Join(dir, "haproxy.cfg"))
		},
	},
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// find is the gateway's program; the test is skipped without it.
func (g gateway) find(t *testing.T) string {
	t.Helper()
	for _, name := range g.bin {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skipf("%s is not installed: scripts/install-test-servers installs it as root on Debian", g.name)
	return ""
}

// start runs the gateway with its published configuration until the test ends.
func (g gateway) start(t *testing.T, edgeAddr, upstream string) (addr string) {
	t.Helper()
	bin := g.find(t)
	addr = freeAddr(t)
	dir := t.TempDir()
	for _, f := range g.files {
		text, err := os.ReadFile(filepath.Join("..", "..", "deploy", "gateways", f))
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, filepath.Base(f)), strings.NewReplacer(
			sampleListen, addr, sampleEdge, edgeAddr, sampleUpstream, upstream).Replace(string(text)))
	}
	cmd := g.prepare(t, bin, dir)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	var out lockedBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s said:\n%s", g.name, out.String())
		}
	})
	eventually(t, g.name+" listening", func() bool {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	return addr
}

// freeAddr is an address that was free a moment ago: these servers cannot be
// told to choose one and say which. It lies below the range from which the
// operating system gives ports away, so that nobody gets it meanwhile.
func freeAddr(t *testing.T) string {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", 20000+rand.IntN(12000)))
		if err != nil {
			continue
		}
		defer l.Close()
		return l.Addr().String()
	}
	t.Fatal("no port is free")
	return ""
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// upstream answers with what it was asked.
type echoed struct {
	Method, Target string
	Header         http.Header
	Body           string
}

func newUpstream(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_ = json.NewEncoder(w).Encode(echoed{r.Method, r.RequestURI, r.Header, string(body)})
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

const gatewayPolicy = `
rules:
  - match: GET /v1/orders/{id}
    scope: orders:read
  - match: POST /v1/orders/{id}
    scope: orders:read
  - match: DELETE /v1/orders/{id}
    scope: orders:delete
`

// scene is a gateway, an edge, a NATS server and keys.
type scene struct {
	*house
	srv     *server
	addr    string
	client  *http.Client
	secrets map[string]string
}

func newScene(t *testing.T, g gateway) *scene {
	t.Helper()
	g.find(t)
	srv := newServer(t)
	nc, js := srv.connect()
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	writeFile(t, policy, gatewayPolicy)
	cfg := testConfig()
	cfg.Policy, cfg.Spool, cfg.TrustedProxies = policy, filepath.Join(t.TempDir(), "spool"), []string{"127.0.0.1"}
	svc, err := New(t.Context(), cfg, run.Deps{NATS: nc, Metrics: prometheus.NewRegistry(), Bus: bus.Config{Partitions: 4}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- svc.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("edge stopped with %v", err)
		}
	})
	<-svc.Loaded()
	s := &scene{house: &house{Service: svc, t: t, nc: nc, js: js}, srv: srv, secrets: map[string]string{}}
	past := time.Now().Add(-time.Minute)
	for id, change := range map[string]func(*key.Record){
		"key_good":    func(r *key.Record) { r.Environment = "" },
		"key_revoked": func(r *key.Record) { r.Status = key.Revoked },
		"key_expired": func(r *key.Record) { r.ExpiresAt = &past },
	} {
		rec, secret := newKey(t, id, "org_acme", "orders:read")
		change(&rec)
		s.put(rec)
		s.secrets[id] = secret
	}
	s.addr = g.start(t, svc.Addr(), newUpstream(t))
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(clientAddr)}}
	transport := &http.Transport{DialContext: dialer.DialContext}
	t.Cleanup(transport.CloseIdleConnections)
	s.client = &http.Client{Transport: transport}
	return s
}

// ask sends a request through the gateway; the upstream's view is nil if it was
// not asked.
func (s *scene) ask(method, target, body string, headers ...string) (*http.Response, *echoed) {
	s.t.Helper()
	r, err := http.NewRequestWithContext(s.t.Context(), method, "http://"+s.addr+target, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	res, err := s.client.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	if res.StatusCode != http.StatusOK {
		return res, nil
	}
	var seen echoed
	if err := json.Unmarshal(text, &seen); err != nil {
		s.t.Fatalf("%s: %v", text, err)
	}
	return res, &seen
}

func TestGateways(t *testing.T) {
	t.Parallel()
	for _, g := range gateways {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, g)
			t.Run("allowed", s.testAllowed)
			t.Run("denied", s.testDenied)
			t.Run("long", s.testLong)
			t.Run("spoofed", s.testSpoofed)
			t.Run("revoked while in use", s.testRevocation)
			t.Run("without NATS", s.testOutage)
		})
	}
}

func (s *scene) last(t *testing.T, what string, match func(schema.Event) bool) schema.Event {
	t.Helper()
	s.eventually("publishing", s.outbox.drained)
	stream, err := s.js.Stream(t.Context(), bus.Usage)
	if err != nil {
		t.Fatal(err)
	}
	for seq := stream.CachedInfo().State.LastSeq; seq > 0; seq-- {
		m, err := stream.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		var found *schema.Event
		_ = schema.Decode(m.Header.Get("Content-Type"), m.Data, time.Now(), func(_ int, ev *schema.Event, err error) {
			if err == nil && match(*ev) {
				e := *ev
				found = &e
			}
		})
		if found != nil {
			return *found
		}
	}
	t.Fatalf("no event about %s", what)
	return schema.Event{}
}

func (s *scene) testAllowed(t *testing.T) {
	for _, header := range []string{"Authorization", "X-API-Key"} {
		value := s.secrets["key_good"]
		if header == "Authorization" {
			value = "Bearer " + value
		}
		res, seen := s.ask("POST", "/v1/orders/42?q=1", "the body", header, value, "User-Agent", "terraform/1.9")
		if seen == nil {
			t.Fatalf("%s: %s", header, res.Status)
		}
		if seen.Method != "POST" || seen.Target != "/v1/orders/42?q=1" || seen.Body != "the body" {
			t.Errorf("upstream was asked %s %s with %q", seen.Method, seen.Target, seen.Body)
		}
		if seen.Header.Get("X-Latchkey-Key-Id") != "key_good" || seen.Header.Get("X-Latchkey-Org-Id") != "org_acme" ||
			seen.Header.Get("X-Latchkey-Scopes") != "orders:read" || seen.Header.Get("X-Latchkey-Client-Ip") != clientAddr {
			t.Errorf("identity %v", seen.Header)
		}
		for name, values := range seen.Header {
			if strings.Contains(strings.Join(values, " "), s.secrets["key_good"]) {
				t.Errorf("the secret goes upstream in %s", name)
			}
		}
	}
	ev := s.last(t, "an allowed request", func(e schema.Event) bool { return e.Decision == schema.Allow })
	if ev.KeyID != "key_good" || ev.SourceIP.String() != clientAddr || ev.Method != "POST" || ev.Route != "/v1/orders/{id}" || ev.UserAgent != "terraform/1.9" {
		t.Errorf("event %+v", ev)
	}
}

func (s *scene) testDenied(t *testing.T) {
	for name, c := range map[string]struct {
		method, secret, reason string
		status                 int
	}{
		"no key":      {"GET", "", schema.DenyMissingKey, 401},
		"made up":     {"GET", "lk_live_nothing", schema.DenyInvalidKey, 401},
		"revoked":     {"GET", s.secrets["key_revoked"], schema.DenyRevokedKey, 401},
		"expired":     {"GET", s.secrets["key_expired"], schema.DenyExpiredKey, 401},
		"wrong scope": {"DELETE", s.secrets["key_good"], schema.DenyInsufficientScope, 403},
		"no rule":     {"PATCH", s.secrets["key_good"], schema.DenyInsufficientScope, 403},
	} {
		headers := []string{}
		if c.secret != "" {
			headers = append(headers, "Authorization", "Bearer "+c.secret)
		}
		res, _ := s.ask(c.method, "/v1/orders/42", "", headers...)
		if res.StatusCode != c.status {
			t.Errorf("%s: %s", name, res.Status)
			continue
		}
		if challenges := res.Header.Values("Www-Authenticate"); len(challenges) != 1 || !strings.HasPrefix(challenges[0], "Bearer realm=") {
			t.Errorf("%s: WWW-Authenticate %q", name, challenges)
		}
		if !strings.HasPrefix(res.Header.Get("Content-Type"), "application/problem+json") {
			t.Errorf("%s: Content-Type %q", name, res.Header.Get("Content-Type"))
		}
		ev := s.last(t, name, func(e schema.Event) bool { return e.DenyReason == c.reason })
		if ev.SourceIP.String() != clientAddr || ev.Method != c.method && c.reason != schema.DenyInsufficientScope {
			t.Errorf("%s: event %+v", name, ev)
		}
	}
}

// testLong has headers of the edge's answer grow as long as a client and a key
// can make them.
func (s *scene) testLong(t *testing.T) {
	path := "/v1" + strings.Repeat("/word", 1400)
	if res, _ := s.ask("GET", path, "", "X-API-Key", s.secrets["key_good"]); res.StatusCode != 403 {
		t.Errorf("a long path: %s", res.Status)
	}
	scopes := []string{"orders:read"}
	for i := range 99 {
		scopes = append(scopes, fmt.Sprintf("%s%02d:%s", strings.Repeat("r", 60), i, strings.Repeat("a", 60)))
	}
	rec, secret := newKey(t, "key_scopes", "org_acme", scopes...)
	s.put(rec)
	if res, seen := s.ask("GET", "/v1/orders/1", "", "X-API-Key", secret); seen == nil || seen.Header.Get("X-Latchkey-Scopes") != strings.Join(scopes, " ") {
		t.Errorf("many scopes: %s", res.Status)
	}
}

// testSpoofed has a client lie about its address, about who it is, and about
// what it asks.
func (s *scene) testSpoofed(t *testing.T) {
	secret := s.secrets["key_good"]
	smuggled := []string{
		"X-API-Key", secret,
		"X-Forwarded-For", "6.6.6.6", "X-Real-IP", "6.6.6.6", "Forwarded", "for=6.6.6.6",
		"X-Latchkey-Key-Id", "key_smuggled", "X-Latchkey-Org-Id", "org_smuggled", "X-Latchkey-Scopes", "full_access",
		"X-Latchkey-Environment", "smuggled", "X-Latchkey-Key-Name", "smuggled", "X-Latchkey-Deny-Reason", "smuggled",
		// As CGI and WSGI read them, these are the same headers.
		"X_Latchkey_Key_Id", "key_smuggled", "X-Latchkey_Scopes", "smuggled", "x_latchkey-org_id", "smuggled",
	}
	_, seen := s.ask("GET", "/v1/orders/spoofed", "", smuggled...)
	if seen == nil {
		t.Fatal("refused")
	}
	for name, values := range seen.Header {
		if strings.Contains(strings.Join(values, " "), "smuggled") || name == "X-Latchkey-Scopes" && values[0] != "orders:read" {
			t.Errorf("%s: %q came from the client", name, values)
		}
	}
	ev := s.last(t, "a spoofed request", func(e schema.Event) bool { return e.Decision == schema.Allow })
	if ev.SourceIP.String() != clientAddr {
		t.Errorf("the client is taken for %s", ev.SourceIP)
	}
	for _, lie := range [][]string{
		{"X-Original-Method", "GET", "X-Original-URI", "/v1/orders/42"},
		{"X-Forwarded-Method", "GET", "X-Forwarded-Uri", "/v1/orders/42"},
		{"X-Original-Method", "GET", "X-Original-URI", "/v1/orders/42", "X-Forwarded-Method", "GET", "X-Forwarded-Uri", "/v1/orders/42"},
	} {
		if res, seen := s.ask("DELETE", "/v1/orders/42", "", append(lie, "X-API-Key", secret)...); seen != nil || res.StatusCode != 403 {
			t.Errorf("%q gets a request through that was not checked: %s", lie, res.Status)
		}
	}
}

func (s *scene) testRevocation(t *testing.T) {
	rec, secret := newKey(t, "key_short", "org_acme", "orders:read")
	s.put(rec)
	if res, seen := s.ask("GET", "/v1/orders/1", "", "X-API-Key", secret); seen == nil {
		t.Fatal(res.Status)
	}
	rec.Status = key.Revoked
	s.put(rec)
	if res, seen := s.ask("GET", "/v1/orders/1", "", "X-API-Key", secret); seen != nil || res.StatusCode != 401 {
		t.Errorf("a revoked key: %s", res.Status)
	}
}

// testOutage takes NATS away: requests are decided as before, and their events
// arrive afterwards.
func (s *scene) testOutage(t *testing.T) {
	s.srv.srv.Shutdown()
	s.eventually("noticing", func() bool { return !s.nc.IsConnected() })
	for range 5 {
		if res, seen := s.ask("GET", "/v1/orders/outage", "", "X-API-Key", s.secrets["key_good"]); seen == nil {
			t.Fatal(res.Status)
		}
	}
	if res, _ := s.ask("GET", "/v1/orders/outage", "", "X-API-Key", s.secrets["key_revoked"]); res.StatusCode != 401 {
		t.Errorf("revoked: %s", res.Status)
	}
	if res, body := s.call("GET", "/-/ready", nil); res.StatusCode != 200 || !bytes.Contains(body, []byte("NATS is away")) {
		t.Errorf("ready: %s %s", res.Status, body)
	}
	if res, _ := s.call("POST", "/v1/usage", strings.NewReader("{}"), "X-API-Key", s.secrets["key_good"]); res.StatusCode != 403 {
		t.Errorf("usage: %s", res.Status)
	}
	s.srv.start()
	s.eventually("replay", s.outbox.drained)
	_, s.js = s.srv.connect()
	s.last(t, "the outage", func(e schema.Event) bool { return e.Decision == schema.Allow })
}
