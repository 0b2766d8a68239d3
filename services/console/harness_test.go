package console

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/mailbox"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

func TestMain(m *testing.M) { enginetest.Main(m) }

// house is a console with everything that it reads.
type house struct {
	t      *testing.T
	nc     *nats.Conn
	js     jetstream.JetStream
	svc    *Service
	server *httptest.Server
	// client has no cookies; browser keeps them.
	client  *http.Client
	secrets map[string]string // by key id
}

// awayURL is a ClickHouse that nobody serves.
const awayURL = "clickhouse://127.0.0.1:1/latchkey"

func newHouse(t *testing.T, cfg Config) *house {
	t.Helper()
	nc, js := natstest.Bus(t, bus.Config{Replicas: 1, Partitions: 2})
	h := &house{t: t, nc: nc, js: js, secrets: map[string]string{}, client: &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	cfg.Addr, cfg.PlainHashes = "", true
	log := slog.New(slog.DiscardHandler)
	svc, err := New(t.Context(), cfg, run.Deps{NATS: nc, Log: log, Bus: bus.Config{Replicas: 1, Partitions: 2}})
	if err != nil {
		t.Fatal(err)
	}
	h.svc = svc
	box, err := mailbox.New(t.Context(), mailbox.Config{Dir: t.TempDir()}, run.Deps{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	server := api.New(mux, api.Options{Keys: svc.keys, Log: log})
	svc.Register(server.API)
	svc.Mount(mux, server, box)
	h.server = httptest.NewServer(server.Handler())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- svc.Run(ctx) }()
	t.Cleanup(func() {
		h.server.Close()
		box.Close()
		cancel()
		<-done
	})
	return h
}

// withClickHouse is a house with a database of its own in the real engine.
func withClickHouse(t *testing.T) (*house, *store.Store) {
	t.Helper()
	e := enginetest.Start(t)
	url := e.URL(enginetest.Database(t, e))
	db, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	if _, err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return newHouse(t, Config{ClickHouse: store.Config{URL: url}}), db
}

func (h *house) org(id, name string) {
	h.t.Helper()
	kv, err := h.js.KeyValue(h.t.Context(), bus.Orgs)
	if err != nil {
		h.t.Fatal(err)
	}
	data, _ := json.Marshal(key.Org{ID: id, Name: name, OwnerEmail: "owner@" + id + ".example", CreatedAt: time.Now()})
	if _, err := kv.Put(h.t.Context(), id, data); err != nil {
		h.t.Fatal(err)
	}
	h.wait("the organization", func() bool { _, ok := h.svc.records.org(id); return ok })
}

// key stores a key and remembers its secret.
func (h *house) key(org, id, name string, change func(*key.Record), scopes ...string) {
	h.t.Helper()
	secret, err := apikey.Generate("live")
	if err != nil {
		h.t.Fatal(err)
	}
	h.secrets[id] = secret.Secret()
	rec := key.Record{
		ID: id, OrgID: org, Name: name, Hash: apikey.Sum(secret.Secret()).String(), Prefix: secret.Secret()[:12], Scopes: scopes,
		Status: key.Active, CreatedAt: time.Now().AddDate(0, 0, -20),
	}
	if change != nil {
		change(&rec)
	}
	h.record(rec, key.Created)
}

func (h *house) record(rec key.Record, kind string) {
	h.t.Helper()
	data, _ := json.Marshal(key.Change{ID: "evt_" + rec.ID + kind, Type: kind, Time: time.Now(), Actor: "system", Record: rec})
	if _, err := h.js.Publish(h.t.Context(), bus.KeySubject(rec.ID), data); err != nil {
		h.t.Fatal(err)
	}
	h.wait("the key", func() bool {
		got, ok := h.svc.keys.Get(rec.ID)
		return ok && got.Status == rec.Status
	})
}

func (h *house) alert(a alert.Alert) {
	h.t.Helper()
	if a.Time.IsZero() {
		a.Time = time.Now()
	}
	if a.Revision == 0 {
		a.Revision = 1
	}
	if a.Severity == "" {
		a.Severity = alert.High
	}
	if !a.SourceIP.IsValid() {
		a.SourceIP = netip.MustParseAddr("203.0.113.7")
	}
	data, _ := json.Marshal(a)
	if _, err := h.js.Publish(h.t.Context(), bus.AlertSubject(a.OrgID, a.KeyID), data); err != nil {
		h.t.Fatal(err)
	}
	h.wait("the alert", func() bool { e, ok := h.svc.alerts.get(a.ID); return ok && e.Revision >= a.Revision })
}

// wait asks until it is so: what is awaited comes over a subscription.
func (h *house) wait(what string, so func() bool) {
	h.t.Helper()
	late := time.After(30 * time.Second)
	for !so() {
		select {
		case <-late:
			h.t.Fatalf("%s did not come", what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// ask makes a request and returns its status and body. The key may be empty.
func (h *house) ask(method, path, keyID string, body io.Reader, edit func(*http.Request)) (*http.Response, string) {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), method, h.server.URL+path, body)
	if err != nil {
		h.t.Fatal(err)
	}
	req.Header.Set("Accept", "text/html")
	if keyID != "" {
		req.Header.Set("Authorization", "Bearer "+h.secrets[keyID])
	}
	if edit != nil {
		edit(req)
	}
	return h.do(h.client, req)
}

func (h *house) do(client *http.Client, req *http.Request) (*http.Response, string) {
	h.t.Helper()
	res, err := client.Do(req)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	return res, string(text)
}

func (h *house) get(path, keyID string) (*http.Response, string) {
	h.t.Helper()
	return h.ask(http.MethodGet, path, keyID, nil, nil)
}

// browser is a client with cookies.
func (h *house) browser() *http.Client {
	jar, err := cookiejar.New(nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return &http.Client{Jar: jar, CheckRedirect: h.client.CheckRedirect}
}

var tokenField = regexp.MustCompile(`name="token" value="([^"]+)"`)

// submit loads a page, takes its form's token and posts the form.
func (h *house) submit(client *http.Client, page, action string, form url.Values, edit func(*http.Request)) (*http.Response, string) {
	h.t.Helper()
	req, _ := http.NewRequestWithContext(h.t.Context(), http.MethodGet, h.server.URL+page, nil)
	_, text := h.do(client, req)
	if m := tokenField.FindStringSubmatch(text); m != nil {
		form.Set("token", m[1])
	}
	req, _ = http.NewRequestWithContext(h.t.Context(), http.MethodPost, h.server.URL+action, strings.NewReader(form.Encode()))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Origin", h.server.URL)
	if edit != nil {
		edit(req)
	}
	return h.do(client, req)
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

// two is a house of two organizations that must not see one another.
func two(t *testing.T, cfg Config) *house {
	t.Helper()
	h := newHouse(t, cfg)
	for _, o := range []string{"alpha", "beta"} {
		h.org("org_"+o, strings.ToUpper(o[:1])+o[1:]+" Inc")
		h.key("org_"+o, "key_"+o, o+"-worker", nil, "orders:read")
		h.key("org_"+o, "key_"+o+"_admin", o+"-admin", nil, "full_access")
		h.alert(alert.Alert{
			ID: "alrt_" + o, OrgID: "org_" + o, KeyID: "key_" + o, Triggers: []string{alert.NewIPRange}, Country: "NL",
			Summary:  fmt.Sprintf("Key key_%s was used from elsewhere.", o),
			Evidence: []alert.Evidence{{Trigger: alert.NewIPRange, Observed: "203.0.113.0/24", Usual: "198.51.100.0/24", PValue: 1e-6}},
		})
	}
	h.org(key.SystemOrg, "Latchkey")
	h.key(key.SystemOrg, "key_root", "root", nil, "full_access")
	return h
}
