package edge

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

type tape struct {
	mu     sync.Mutex
	events []usage.Event
}

func (t *tape) Enqueue(e *usage.Event) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events = append(t.events, *e)
	return true
}

// null takes events as a full queue would: at once.
type null struct{}

func (null) Enqueue(*usage.Event) bool { return true }

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func testEdge(t testing.TB, opts Options, records ...key.Record) *Edge {
	t.Helper()
	s := NewKeyset()
	for i, r := range records {
		apply(t, s, r, uint64(i+1))
	}
	s.MarkSynced(now)
	if opts.Clock == nil {
		opts.Clock = func() time.Time { return now }
	}
	return New(s, opts)
}

func TestDecide(t *testing.T) {
	t.Parallel()
	secret := newSecret(t)
	home := netip.MustParseAddr("198.51.100.7")
	past, at, future := now.Add(-time.Second), now, now.Add(time.Second)
	broken := secret[:len(secret)-1] + map[bool]string{true: "A", false: "B"}[secret[len(secret)-1] != 'A']
	for name, c := range map[string]struct {
		change func(*key.Record)
		secret string
		source netip.Addr
		need   Need
		want   string
	}{
		"allowed":             {need: Require("orders:write")},
		"no need":             {},
		"missing":             {secret: "-", want: usage.DenyMissingKey},
		"malformed":           {secret: "hello", want: usage.DenyInvalidKey},
		"checksum":            {secret: broken, want: usage.DenyInvalidKey},
		"unknown":             {secret: newSecret(t), want: usage.DenyInvalidKey},
		"scope":               {need: Require("orders:delete"), want: usage.DenyInsufficientScope},
		"one of two scopes":   {need: Require("orders:write", "orders:delete"), want: usage.DenyInsufficientScope},
		"wildcard":            {change: func(r *key.Record) { r.Scopes = []string{"orders:*"} }, need: Require("orders:delete")},
		"wildcard of another": {change: func(r *key.Record) { r.Scopes = []string{"order:*"} }, need: Require("orders:delete"), want: usage.DenyInsufficientScope},
		"full access":         {change: func(r *key.Record) { r.Scopes = []string{"full_access"} }, need: Require("x:y", "z:z")},
		"unreadable scope":    {change: func(r *key.Record) { r.Scopes = []string{"*:*"} }, need: Require("x:y"), want: usage.DenyInsufficientScope},
		"revoked":             {change: func(r *key.Record) { r.Status = key.Revoked }, want: usage.DenyRevokedKey},
		"suspended":           {change: func(r *key.Record) { r.Status = key.Suspended }, want: usage.DenyRevokedKey},
		"status of tomorrow":  {change: func(r *key.Record) { r.Status = "held" }, want: usage.DenyRevokedKey},
		"expired":             {change: func(r *key.Record) { r.ExpiresAt = &past }, want: usage.DenyExpiredKey},
		"expires now":         {change: func(r *key.Record) { r.ExpiresAt = &at }, want: usage.DenyExpiredKey},
		"expires soon":        {change: func(r *key.Record) { r.ExpiresAt = &future }},
		"address inside":      {change: cidrs("198.51.100.0/24"), source: home},
		"address outside":     {change: cidrs("203.0.113.0/24", "2001:db8::/32"), source: home, want: usage.DenyIPNotAllowed},
		"mapped prefix":       {change: cidrs("::ffff:198.51.100.0/120"), source: home},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rec := testRecord("key_1", secret, "orders:write", "orders:read")
			if c.change != nil {
				c.change(&rec)
			}
			e := testEdge(t, Options{}, rec)
			shown := secret
			if c.secret != "" {
				shown = strings.TrimPrefix(c.secret, "-")
			}
			if v := e.Decide(shown, c.source, c.need); v.Reason != c.want {
				t.Errorf("reason %q, want %q", v.Reason, c.want)
			}
		})
	}
}

func cidrs(list ...string) func(*key.Record) {
	return func(r *key.Record) {
		for _, s := range list {
			r.AllowedCIDRs = append(r.AllowedCIDRs, netip.MustParsePrefix(s))
		}
	}
}

func TestDecideBeforeTheKeysAreThere(t *testing.T) {
	t.Parallel()
	e := New(NewKeyset(), Options{})
	if v := e.Decide(newSecret(t), netip.Addr{}, Need{}); v.Reason != Unavailable {
		t.Errorf("reason %q", v.Reason)
	}
	if v := e.Decide("nonsense", netip.Addr{}, Need{}); v.Reason != usage.DenyInvalidKey {
		t.Errorf("reason %q for what no key set is needed", v.Reason)
	}
}

func TestFailClosed(t *testing.T) {
	t.Parallel()
	secret := newSecret(t)
	clock := now
	e := testEdge(t, Options{FailClosedAfter: time.Minute, Clock: func() time.Time { return clock }}, testRecord("key_1", secret))
	clock = now.Add(time.Minute)
	if v := e.Decide(secret, netip.Addr{}, Need{}); !v.Allowed() {
		t.Errorf("refused while fresh enough: %s", v.Reason)
	}
	clock = now.Add(time.Minute + 1)
	if v := e.Decide(secret, netip.Addr{}, Need{}); v.Reason != Unavailable {
		t.Errorf("reason %q", v.Reason)
	}
}

func TestPeppers(t *testing.T) {
	t.Parallel()
	old, fresh := []byte("0123456789abcdef-old"), []byte("0123456789abcdef-new")
	was, err := apikey.NewHasher([][]byte{old}, false)
	if err != nil {
		t.Fatal(err)
	}
	is, err := apikey.NewHasher([][]byte{fresh, old}, true)
	if err != nil {
		t.Fatal(err)
	}
	a, b, c := newSecret(t), newSecret(t), newSecret(t)
	ra, rb, rc := testRecord("key_a", a), testRecord("key_b", b), testRecord("key_c", c)
	ra.Hash, rb.Hash, rc.Hash = was.Sum(a).String(), is.Sum(b).String(), apikey.Sum(c).String()
	e := testEdge(t, Options{Hasher: is}, ra, rb, rc)
	for id, secret := range map[string]string{"key_a": a, "key_b": b, "key_c": c} {
		if v := e.Decide(secret, netip.Addr{}, Need{}); v.Key == nil || v.Key.ID() != id {
			t.Errorf("%s: %+v", id, v)
		}
	}
}

func TestRequireScope(t *testing.T) {
	t.Parallel()
	good, revoked := newSecret(t), newSecret(t)
	gone := testRecord("key_2", revoked, "orders:write")
	gone.Status = key.Revoked
	elsewhere := newSecret(t)
	bound := testRecord("key_3", elsewhere, "orders:write")
	bound.AllowedCIDRs = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
	for name, c := range map[string]struct {
		header, value string
		scope         string
		status        int
		challenge     string
		reason        string
	}{
		"bearer":    {"Authorization", "Bearer " + good, "orders:write", 201, "", ""},
		"lower":     {"Authorization", "bearer  " + good, "orders:write", 201, "", ""},
		"x-api-key": {"X-API-Key", good, "orders:write", 201, "", ""},
		"own":       {"X-Acme-Key", good, "orders:write", 201, "", ""},
		"basic":     {"Authorization", "Basic " + good, "orders:write", 401, `Bearer realm="acme"`, usage.DenyMissingKey},
		"none":      {"Accept", "*/*", "orders:write", 401, `Bearer realm="acme"`, usage.DenyMissingKey},
		"scope":     {"X-API-Key", good, "orders:delete", 403, `Bearer realm="acme", error="insufficient_scope", scope="orders:delete"`, usage.DenyInsufficientScope},
		"revoked":   {"X-API-Key", revoked, "orders:write", 401, `Bearer realm="acme", error="invalid_token", error_description="the key is not valid"`, usage.DenyRevokedKey},
		"address":   {"X-API-Key", elsewhere, "orders:write", 403, `Bearer realm="acme", error="invalid_token", error_description="the key may not be used from this address"`, usage.DenyIPNotAllowed},
		"made up":   {"X-API-Key", "lk_live_x", "orders:write", 401, `Bearer realm="acme", error="invalid_token", error_description="the key is not valid"`, usage.DenyInvalidKey},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var rec tape
			e := testEdge(t, Options{Recorder: &rec, Header: "X-Acme-Key", Realm: "acme", Gateway: "edge-1"},
				testRecord("key_1", good, "orders:write"), gone, bound)
			mux := http.NewServeMux()
			mux.Handle("POST /v1/orders/{id}", e.RequireScope(c.scope)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if k := KeyFrom(r.Context()); k == nil || k.ID() != "key_1" {
					t.Errorf("key in the context: %v", k)
				}
				w.WriteHeader(http.StatusCreated)
				_, _ = w.Write([]byte("hello"))
			})))
			r := httptest.NewRequest("POST", "/v1/orders/77?secret=1", strings.NewReader("body"))
			r.Header.Set(c.header, c.value)
			r.RemoteAddr = "[::ffff:203.0.113.7]:999"
			w := httptest.NewRecorder()
			mux.ServeHTTP(w, r)
			if w.Code != c.status || w.Header().Get("WWW-Authenticate") != c.challenge {
				t.Errorf("answer %d %q", w.Code, w.Header().Get("WWW-Authenticate"))
			}
			if c.status >= 400 {
				var p Problem
				if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || p.Status != c.status || p.Title == "" ||
					w.Header().Get("Content-Type") != "application/problem+json" {
					t.Errorf("body %s: %v", w.Body, err)
				}
			}
			if len(rec.events) != 1 {
				t.Fatalf("%d events", len(rec.events))
			}
			ev := rec.events[0]
			ev.Normalize()
			if err := ev.Validate(now); err != nil {
				t.Error(err)
			}
			if ev.DenyReason != c.reason || ev.Route != "/v1/orders/{id}" || ev.Status != uint16(c.status) ||
				ev.SourceIP != netip.MustParseAddr("203.0.113.7") || ev.Scope != c.scope || ev.Gateway != "edge-1" || ev.RequestBytes != 4 {
				t.Errorf("event %+v", ev)
			}
		})
	}
}

// TestKeyOfSeveralLines has a request carry two keys in one header: neither counts,
// or the edge and what stands behind it could see two clients.
func TestKeyOfSeveralLines(t *testing.T) {
	t.Parallel()
	first, second := newSecret(t), newSecret(t)
	e := testEdge(t, Options{Header: "x-acme-key"}, testRecord("key_1", first), testRecord("key_2", second))
	for _, name := range []string{"Authorization", "X-Api-Key", "X-Acme-Key"} {
		lines := []string{"Bearer " + first, "Bearer " + second}
		if name == "X-Api-Key" {
			lines = []string{first, second}
		}
		if v := e.Decide(e.Secret(http.Header{name: lines[:1]}), netip.Addr{}, Need{}); !v.Allowed() {
			t.Errorf("%s: one line is denied as %s", name, v.Reason)
		}
		if v := e.Decide(e.Secret(http.Header{name: lines}), netip.Addr{}, Need{}); v.Reason != usage.DenyInvalidKey {
			t.Errorf("%s: two lines give %q for %v", name, v.Reason, v.Key)
		}
	}
}

// TestRequireOfMany: a client that writes a header full of scopes must not keep a
// processor busy; comparing each with each takes seconds.
func TestRequireOfMany(t *testing.T) {
	t.Parallel()
	const many = 100_000
	scopes := make([]string, 0, 2*many+1)
	for i := range many {
		scopes = append(scopes, strconv.Itoa(i), strconv.Itoa(i/2))
	}
	n := Require("a:b").And(append(scopes, "")...)
	if got := n.Scopes(); len(got) != many+1 || got[0] != "a:b" || got[1] != "0" || got[many] != strconv.Itoa(many-1) {
		t.Errorf("%d scopes", len(got))
	}
}

func TestDenialsAreLimitedPerSource(t *testing.T) {
	t.Parallel()
	var rec tape
	clock := now
	e := testEdge(t, Options{Recorder: &rec, Clock: func() time.Time { return clock }, Denials: DenialLimit{PerSecond: 2, Burst: 10, Total: 1000}})
	guess := func(n int, from string) {
		for range n {
			e.Record(Verdict{Reason: usage.DenyInvalidKey}, Need{}, &usage.Event{Time: clock, SourceIP: netip.MustParseAddr(from), Route: "/"})
		}
	}
	guess(500, "203.0.113.7")
	if len(rec.events) != 10 || e.Suppressed() != 490 {
		t.Fatalf("%d recorded, %d suppressed", len(rec.events), e.Suppressed())
	}
	guess(5, "203.0.113.8")
	guess(500, "2001:db8::1")
	guess(500, "2001:db8::2") // the same /64
	if len(rec.events) != 25 {
		t.Fatalf("%d recorded with three sources", len(rec.events))
	}
	clock = clock.Add(2 * time.Second)
	guess(500, "203.0.113.7")
	if len(rec.events) != 29 {
		t.Fatalf("%d recorded after two seconds", len(rec.events))
	}
}

func TestClientIP(t *testing.T) {
	t.Parallel()
	trusted, err := ParseProxies([]string{"127.0.0.1", "10.0.0.0/8", "::1", "2001:db8:1::/48"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		peer string
		xff  []string
		want string
	}{
		{"203.0.113.7", nil, "203.0.113.7"},
		{"203.0.113.7", []string{"1.2.3.4"}, "203.0.113.7"},
		{"127.0.0.1", nil, "127.0.0.1"},
		{"127.0.0.1", []string{"203.0.113.7"}, "203.0.113.7"},
		{"127.0.0.1", []string{"1.2.3.4, 203.0.113.7"}, "203.0.113.7"},
		{"127.0.0.1", []string{"1.2.3.4, 203.0.113.7, 10.1.1.1"}, "203.0.113.7"},
		{"127.0.0.1", []string{"1.2.3.4", "203.0.113.7", "10.1.1.1"}, "203.0.113.7"},
		{"127.0.0.1", []string{"10.2.2.2, 10.1.1.1"}, "10.2.2.2"},
		{"127.0.0.1", []string{"nonsense, 10.1.1.1"}, "10.1.1.1"},
		{"127.0.0.1", []string{"203.0.113.7, unknown"}, "127.0.0.1"},
		{"127.0.0.1", []string{"203.0.113.7, "}, "127.0.0.1"},
		{"127.0.0.1", []string{""}, "127.0.0.1"},
		{"::ffff:127.0.0.1", []string{"::ffff:203.0.113.7"}, "203.0.113.7"},
		{"::1", []string{"[2001:db8::7]:443"}, "2001:db8::7"},
		{"::1", []string{"[2001:db8::7]"}, "2001:db8::7"},
		{"::1", []string{"2001:db8::7"}, "2001:db8::7"},
		{"::1", []string{"203.0.113.7:443"}, "203.0.113.7"},
		{"2001:db8:1::5", []string{"fe80::1%eth0"}, "fe80::1"},
	} {
		if got := ClientIP(netip.MustParseAddr(c.peer), c.xff, trusted); got != netip.MustParseAddr(c.want) {
			t.Errorf("peer %s, X-Forwarded-For %q: %s, want %s", c.peer, c.xff, got, c.want)
		}
	}
}

func TestFoldPath(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"":                          "/",
		"/":                         "/",
		"/v1/devices":               "/v1/devices",
		"/v1/devices/42":            "/v1/devices/{id}",
		"/v1/devices/42/":           "/v1/devices/{id}/",
		"/v1/devices?id=42":         "/v1/devices",
		"/v2/users/ann@example.com": "/v2/users/{id}",
		"/o/550e8400-e29b-41d4-a716-446655440000/x": "/o/{id}/x",
		"/o/550e8400e29b41d4a716446655440000":       "/o/{id}",
		"/keys/key_01J8ZK3M4N5P6Q7R8S9T0V1W2X":      "/keys/key_{id}",
		"/customers/cus-8f2k3j4h":                   "/customers/cus-{id}",
		"/01ARZ3NDEKTSV4RRFFQ69G5FAV":               "/{id}",
		"/api/v1/user-profiles/me":                  "/api/v1/user-profiles/me",
		"/static/app.js":                            "/static/app.js",
		"/internationalization":                     "/internationalization",
		"/s3/oauth2/callback":                       "/s3/oauth2/callback",
		"/r/{id}":                                   "/r/{id}",
	} {
		if got := FoldPath(path); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	secret := newSecret(t)
	e := testEdge(t, Options{Recorder: null{}}, testRecord("key_1", secret, "orders:write"))
	need := Require("orders:write")
	ip := netip.MustParseAddr("203.0.113.7")
	if n := testing.AllocsPerRun(100, func() {
		v := e.Decide(secret, ip, need)
		e.Record(v, need, &usage.Event{Time: now, SourceIP: ip, Method: "GET", Route: "/v1/orders"})
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { FoldPath("/v1/orders/all") }); n != 0 {
		t.Errorf("FoldPath: %v allocations", n)
	}
}

func BenchmarkDecide(b *testing.B) {
	secret := newSecret(b)
	e := testEdge(b, Options{Recorder: null{}, Clock: time.Now}, testRecord("key_1", secret, "orders:write"))
	need := Require("orders:write")
	ip := netip.MustParseAddr("203.0.113.7")
	b.Run("sha256", func(b *testing.B) {
		for b.Loop() {
			_ = apikey.Sum(secret)
		}
	})
	b.Run("decide", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if !e.Decide(secret, ip, need).Allowed() {
				b.Fatal("refused")
			}
		}
	})
}

func FuzzClientIP(f *testing.F) {
	f.Add("1.2.3.4, [::1]:5, x", "127.0.0.1")
	trusted, _ := ParseProxies([]string{"0.0.0.0/0", "::/0"})
	f.Fuzz(func(t *testing.T, xff, peer string) {
		p, err := netip.ParseAddr(peer)
		if err != nil {
			return // no address: nothing that a socket could name
		}
		if ip := ClientIP(p, []string{xff}, trusted); !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" {
			t.Fatalf("%q gives %s", xff, ip)
		}
		if ip := ClientIP(p, []string{xff}, nil); ip != fold(p) {
			t.Fatalf("an untrusted peer is believed: %s", ip)
		}
	})
}

func FuzzFoldPath(f *testing.F) {
	f.Add("/v1/devices/42?x=1")
	f.Fuzz(func(t *testing.T, path string) {
		once := FoldPath(path)
		if FoldPath(once) != once {
			t.Fatalf("%q folds to %q and then to %q", path, once, FoldPath(once))
		}
		if strings.ContainsAny(once, "?#") {
			t.Fatalf("%q has a query", once)
		}
	})
}

func FuzzSecret(f *testing.F) {
	f.Add("Bearer lk_live_x", "lk_live_y")
	e := New(NewKeyset(), Options{})
	f.Fuzz(func(t *testing.T, authorization, apiKey string) {
		h := http.Header{"Authorization": {authorization}, "X-Api-Key": {apiKey}}
		s := e.Secret(h)
		if v := e.Decide(s, netip.Addr{}, Need{}); v.Allowed() || v.Key != nil {
			t.Fatalf("%q is allowed without any key", s)
		}
	})
}
