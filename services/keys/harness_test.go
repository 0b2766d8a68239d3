package keys

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// world is a keys service over a real NATS server, with a clock that the test sets.
type world struct {
	t     testing.TB
	dir   string
	nats  *natsd.Server
	nc    *nats.Conn
	svc   *Service
	url   string
	admin string
	log   *lockedBuffer

	mu    sync.Mutex
	clock time.Time
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.clock.IsZero() {
		return time.Now()
	}
	return w.clock
}

// freeze stops the clock at a time.
func (w *world) freeze(at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock = at
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), log: &lockedBuffer{}}
	server, err := natsd.Start(t.Context(), natsd.Options{DataDir: filepath.Join(w.dir, "nats"), Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	w.nats = server
	t.Cleanup(server.Shutdown)
	w.nc, err = server.Connect("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.nc.Close)
	w.svc, w.url = w.start()
	secret, err := os.ReadFile(filepath.Join(w.dir, "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	w.admin = strings.TrimSpace(string(secret))
	return w
}

// start is one more replica of the service.
func (w *world) start() (*Service, string) {
	w.t.Helper()
	cfg := Config{Prefix: "lk", AdminKeyPath: filepath.Join(w.dir, "admin.key")}
	deps := run.Deps{NATS: w.nc, Log: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})), Metrics: prometheus.NewRegistry(), Bus: bus.Config{Replicas: 1, Partitions: 4}}
	svc, err := newService(w.t.Context(), cfg, deps, w.now)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(svc.close)
	mux := http.NewServeMux()
	server := api.New(mux, api.Options{Keys: svc.Keyset(), Log: deps.Log, Now: w.now})
	svc.Register(server.API)
	front := httptest.NewServer(server.Handler())
	w.t.Cleanup(front.Close)
	return svc, front.URL
}

// run runs the service's consumers until the test ends.
func (w *world) run(svc *Service) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- svc.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("run: %v", err)
		}
	})
}

type reply struct {
	status int
	header http.Header
	body   []byte
}

func (r reply) decode(t *testing.T, v any) {
	t.Helper()
	if err := json.Unmarshal(r.body, v); err != nil {
		t.Fatalf("%v in %s", err, r.body)
	}
}

func (r reply) text(field string) string {
	var m map[string]any
	_ = json.Unmarshal(r.body, &m)
	s, _ := m[field].(string)
	return s
}

func (w *world) call(key, method, path string, body any) reply {
	w.t.Helper()
	return w.callAt(w.url, key, method, path, body)
}

func (w *world) callAt(url, key, method, path string, body any) reply {
	w.t.Helper()
	var reader io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(b)
	default:
		encoded, err := json.Marshal(b)
		if err != nil {
			w.t.Fatal(err)
		}
		reader = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(w.t.Context(), method, url+path, reader)
	if err != nil {
		w.t.Fatal(err)
	}
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	if reader != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	content, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return reply{res.StatusCode, res.Header, content}
}

// must calls and fails the test unless the status is the wanted one.
func (w *world) must(want int, key, method, path string, body any) reply {
	w.t.Helper()
	r := w.call(key, method, path, body)
	if r.status != want {
		w.t.Fatalf("%s %s: %d, not %d: %s", method, path, r.status, want, r.body)
	}
	return r
}

type object = map[string]any

func (w *world) org(name string) string {
	w.t.Helper()
	return w.must(201, w.admin, "POST", "/v1/orgs", object{"name": name, "owner_email": name + "@example.com"}).text("id")
}

// key creates a key and returns its id and secret.
func (w *world) key(org string, scopes ...string) (id, secret string) {
	w.t.Helper()
	r := w.must(201, w.admin, "POST", "/v1/api-keys", object{"org_id": org, "name": "a key", "scopes": scopes})
	return r.text("id"), r.text("key")
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
