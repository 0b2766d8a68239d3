package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
)

func openBus(t *testing.T) jetstream.JetStream {
	t.Helper()
	server, err := natsd.Start(t.Context(), natsd.Options{DataDir: filepath.Join(t.TempDir(), "nats"), Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Shutdown)
	nc, err := server.Connect("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if err := bus.Ensure(t.Context(), js, bus.Config{Replicas: 1, Partitions: 4}); err != nil {
		t.Fatal(err)
	}
	return js
}

func openSet(t *testing.T, js jetstream.JetStream, hasher apikey.Hasher) *api.Keyset {
	t.Helper()
	set, err := api.OpenKeyset(t.Context(), js, hasher, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(set.Close)
	return set
}

func newKey(t *testing.T, hasher apikey.Hasher, id string, edit func(*key.Record)) (key.Record, string) {
	t.Helper()
	k, err := apikey.Generate(apikey.Live)
	if err != nil {
		t.Fatal(err)
	}
	r := key.Record{ID: id, OrgID: "org_a", Status: key.Active, Scopes: []string{"things:read"}, Hash: hasher.Sum(k.Secret()).String(), CreatedAt: time.Now()}
	if edit != nil {
		edit(&r)
	}
	return r, k.Secret()
}

// A record never goes back, in whatever order watch and writer tell it.
func TestKeysetNeverGoesBack(t *testing.T) {
	t.Parallel()
	js := openBus(t)
	set := openSet(t, js, apikey.Hasher{})
	r, secret := newKey(t, apikey.Hasher{}, "key_1", nil)
	revoked := r
	revoked.Status = key.Revoked
	set.Apply(7, revoked)
	set.Apply(3, r)
	set.Apply(7, r)
	if _, _, refused := set.Lookup(secret, time.Now()); refused != "revoked" {
		t.Errorf("refused as %q", refused)
	}
	// A new secret makes the old one unknown.
	other, secret2 := newKey(t, apikey.Hasher{}, "key_1", nil)
	set.Apply(9, other)
	if _, _, refused := set.Lookup(secret, time.Now()); refused != "invalid" {
		t.Errorf("the old secret is %q", refused)
	}
	if _, _, refused := set.Lookup(secret2, time.Now()); refused != "" {
		t.Errorf("the new secret is %q", refused)
	}
	if set.Len() != 1 {
		t.Errorf("%d keys", set.Len())
	}
}

// Keys of an old pepper, and of none, go on working beside those of the new one.
func TestKeysetRotatesPeppers(t *testing.T) {
	t.Parallel()
	js := openBus(t)
	first, second := []byte("the first pepper, of enough bytes"), []byte("the second pepper, of enough bytes")
	before, err := apikey.NewHasher([][]byte{first}, false)
	if err != nil {
		t.Fatal(err)
	}
	after, err := apikey.NewHasher([][]byte{second, first}, true)
	if err != nil {
		t.Fatal(err)
	}
	var secrets []string
	for i, h := range []apikey.Hasher{{}, before, after} {
		r, secret := newKey(t, h, string(rune('a'+i)), nil)
		body, err := json.Marshal(key.Change{Record: r})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := js.Publish(t.Context(), bus.KeySubject(r.ID), body); err != nil {
			t.Fatal(err)
		}
		secrets = append(secrets, secret)
	}
	set := openSet(t, js, after)
	for i, secret := range secrets {
		if _, _, refused := set.Lookup(secret, time.Now()); refused != "" {
			t.Errorf("key %d is %q", i, refused)
		}
	}
	gone, err := apikey.NewHasher([][]byte{second}, false)
	if err != nil {
		t.Fatal(err)
	}
	set = openSet(t, js, gone)
	for i, want := range []string{"invalid", "invalid", ""} {
		if _, _, refused := set.Lookup(secrets[i], time.Now()); refused != want {
			t.Errorf("without the old pepper key %d is %q", i, refused)
		}
	}
}

type thing struct {
	Body struct {
		By string `json:"by"`
		IP string `json:"ip"`
	}
}

// newServer is an API with one operation of each kind that the tests need.
func newServer(t *testing.T, opts api.Options) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux()
	s := api.New(mux, opts)
	show := func(ctx context.Context, _ *struct{}) (*thing, error) {
		p := api.From(ctx)
		out := &thing{}
		out.Body.By, out.Body.IP = p.KeyID, p.IP.String()
		return out, nil
	}
	huma.Register(s.API, huma.Operation{OperationID: "read", Method: "GET", Path: "/v1/things", Security: api.Requires("things:read")}, show)
	huma.Register(s.API, huma.Operation{OperationID: "forgotten", Method: "GET", Path: "/v1/forgotten"}, show)
	huma.Register(s.API, huma.Operation{OperationID: "broken", Method: "GET", Path: "/v1/broken", Security: api.Requires("things:read")},
		func(context.Context, *struct{}) (*thing, error) {
			return nil, errors.New("the database password is hunter2")
		})
	huma.Register(s.API, huma.Operation{OperationID: "away", Method: "GET", Path: "/v1/away", Security: api.Requires("things:read")},
		func(context.Context, *struct{}) (*thing, error) { return nil, nats.ErrTimeout })
	huma.Register(s.API, huma.Operation{OperationID: "panics", Method: "GET", Path: "/v1/panics", Security: api.Requires("things:read")},
		func(context.Context, *struct{}) (*thing, error) { panic("oh") })
	front := httptest.NewServer(s.Handler())
	t.Cleanup(front.Close)
	return front
}

func get(t *testing.T, url string, header http.Header) (int, http.Header, map[string]any) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	content, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	body := map[string]any{}
	if err := json.Unmarshal(content, &body); err != nil {
		t.Fatalf("%v in %s", err, content)
	}
	return res.StatusCode, res.Header, body
}

func TestAuthentication(t *testing.T) {
	t.Parallel()
	set := openSet(t, openBus(t), apikey.Hasher{})
	var secrets []string
	past := time.Now().Add(-time.Minute)
	for i, edit := range []func(*key.Record){
		nil,
		func(r *key.Record) { r.Status = key.Suspended },
		func(r *key.Record) { r.ExpiresAt = &past },
		func(r *key.Record) { r.AllowedCIDRs = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")} },
		func(r *key.Record) { r.Scopes = []string{"things:*"} },
		func(r *key.Record) { r.Scopes = []string{"things:write"} },
		func(r *key.Record) { r.Scopes = []string{"things:read", "nonsense"} },
	} {
		r, secret := newKey(t, apikey.Hasher{}, "key_"+string(rune('0'+i)), edit)
		set.Apply(uint64(i+1), r)
		secrets = append(secrets, secret)
	}
	good, suspended, expired, elsewhere, wild, writer, garbled := secrets[0], secrets[1], secrets[2], secrets[3], secrets[4], secrets[5], secrets[6]
	events := make(chan usage.Event, 100)
	front := newServer(t, api.Options{
		Keys: set, Observe: func(ev usage.Event) { events <- ev }, Metrics: prometheus.NewRegistry(),
		TrustedProxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8")},
	})
	bearer := func(s string) http.Header { return http.Header{"Authorization": {"Bearer " + s}} }
	for name, c := range map[string]struct {
		header    http.Header
		status    int
		challenge string
	}{
		"bearer":             {bearer(good), 200, ""},
		"bearer in any case": {http.Header{"Authorization": {"bEaReR  " + good}}, 200, ""},
		"header":             {http.Header{"X-Api-Key": {good}}, 200, ""},
		"the same twice":     {http.Header{"X-Api-Key": {good}, "Authorization": {"Bearer " + good}}, 200, ""},
		"wildcard":           {bearer(wild), 200, ""},
		"two keys":           {http.Header{"X-Api-Key": {good}, "Authorization": {"Bearer " + wild}}, 400, "invalid_request"},
		"empty bearer":       {http.Header{"Authorization": {"Bearer "}}, 400, "invalid_request"},
		"empty header":       {http.Header{"X-Api-Key": {""}}, 400, "invalid_request"},
		"nothing":            {http.Header{}, 401, "Bearer realm"},
		"basic":              {http.Header{"Authorization": {"Basic dTpw"}}, 401, "Bearer realm"},
		"nonsense":           {bearer("x"), 401, "invalid_token"},
		"quotes":             {bearer(`"><script>`), 401, "invalid_token"},
		"suspended":          {bearer(suspended), 401, "invalid_token"},
		"expired":            {bearer(expired), 401, "invalid_token"},
		"from elsewhere":     {bearer(elsewhere), 403, "invalid_token"},
		"from its place":     {http.Header{"Authorization": {"Bearer " + elsewhere}, "X-Forwarded-For": {"198.51.100.9, 10.1.1.1"}}, 200, ""},
		"spoofed place":      {http.Header{"Authorization": {"Bearer " + elsewhere}, "X-Forwarded-For": {"198.51.100.9, 203.0.113.1, 10.1.1.1"}}, 403, "invalid_token"},
		"wrong scope":        {bearer(writer), 403, "insufficient_scope"},
		"unreadable scopes":  {bearer(garbled), 403, "insufficient_scope"},
	} {
		status, header, body := get(t, front.URL+"/v1/things", c.header)
		if challenge := header.Get("WWW-Authenticate"); status != c.status || !strings.Contains(challenge, c.challenge) || (c.challenge == "") != (challenge == "") {
			t.Errorf("%s: %d, %s, %v", name, status, challenge, body)
		}
		if header.Get("X-Request-Id") == "" || header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: headers %v", name, header)
		}
	}
	if _, _, body := get(t, front.URL+"/v1/things", http.Header{"Authorization": {"Bearer " + good}, "X-Forwarded-For": {"1.1.1.1, 2001:db8::1, 10.0.0.1"}}); body["ip"] != "2001:db8::1" {
		t.Errorf("the caller is %v", body["ip"])
	}
	reasons := map[string]int{}
	for range len(events) {
		ev := <-events
		if err := ev.Validate(time.Now()); err != nil {
			t.Errorf("%v in %+v", err, ev)
		}
		reasons[ev.DenyReason]++
	}
	for _, want := range []string{"", usage.DenyRevokedKey, usage.DenyExpiredKey, usage.DenyIPNotAllowed, usage.DenyInsufficientScope} {
		if reasons[want] == 0 {
			t.Errorf("no event with reason %q: %v", want, reasons)
		}
	}
}

func TestProblems(t *testing.T) {
	t.Parallel()
	set := openSet(t, openBus(t), apikey.Hasher{})
	r, secret := newKey(t, apikey.Hasher{}, "key_1", nil)
	set.Apply(1, r)
	var log strings.Builder
	front := newServer(t, api.Options{Keys: set, Log: slog.New(slog.NewTextHandler(&log, nil))})
	header := http.Header{"Authorization": {"Bearer " + secret}, "X-Request-Id": {"mine-1"}}
	for path, want := range map[string]struct {
		status int
		kind   string
	}{
		"/v1/broken": {500, "internal"}, "/v1/away": {503, "unavailable"}, "/v1/panics": {500, "internal"},
		"/v1/forgotten": {403, "insufficient-scope"}, "/v1/none": {404, "not-found"}, "/v1/things?x=1": {422, "invalid-parameters"},
	} {
		status, h, body := get(t, front.URL+path, header)
		if status != want.status || body["type"] != "/problems/"+want.kind || body["request_id"] != "mine-1" || body["instance"] != strings.SplitN(path, "?", 2)[0] ||
			h.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: %d %v", path, status, body)
		}
		if text, _ := json.Marshal(body); strings.Contains(string(text), "hunter2") {
			t.Errorf("%s tells what only the log may know: %s", path, text)
		}
	}
	if !strings.Contains(log.String(), "hunter2") || !strings.Contains(log.String(), "mine-1") {
		t.Errorf("the log does not say what went wrong: %s", log.String())
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	var h api.Health
	var broken error
	h.Add("nats", func(context.Context) error { return nil })
	h.Add("disk", func(context.Context) error { return broken })
	h.AddOptional("clickhouse", func(context.Context) error { return errors.New("away") })
	mux := http.NewServeMux()
	api.Operate(mux, &h, prometheus.NewRegistry())
	front := httptest.NewServer(mux)
	t.Cleanup(front.Close)
	ready := func() (int, string) {
		status, _, body := get(t, front.URL+"/-/ready", http.Header{})
		return status, body["status"].(string)
	}
	if status, text := ready(); status != 200 || text != "ready" {
		t.Errorf("%d %s", status, text)
	}
	broken = errors.New("full")
	if status, text := ready(); status != 503 || text != "not ready" {
		t.Errorf("%d %s", status, text)
	}
	broken = nil
	h.Drain()
	if status, text := ready(); status != 503 || text != "draining" {
		t.Errorf("%d %s", status, text)
	}
	if status, _, body := get(t, front.URL+"/-/healthy", http.Header{}); status != 200 || body["status"] != "healthy" {
		t.Errorf("%d %v", status, body)
	}
}
