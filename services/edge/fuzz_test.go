package edge

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/schemas/key"
	schema "github.com/latchkey-dev/latchkey/schemas/usage"
)

// bareService is an edge without NATS that knows one key, with the scope a:b.
func bareService(t testing.TB) *Service {
	t.Helper()
	s := &Service{keys: edge.NewKeyset(), metrics: newMetrics(), now: time.Now}
	s.log = discard
	s.keys.MarkSynced(time.Now())
	s.edge = edge.New(s.keys, edge.Options{Recorder: readers{t}})
	s.policy.Store(openPolicy())
	return s
}

// readers demands of every event that those who read the stream can read it.
type readers struct{ t testing.TB }

func (r readers) Enqueue(ev *schema.Event) bool {
	batch := schema.AppendBatch(nil, []schema.Event{*ev})
	err := schema.Decode(schema.ContentTypeProtobuf, batch, time.Now(), func(_ int, _ *schema.Event, err error) {
		if err != nil {
			r.t.Errorf("event %+v cannot be read: %v", *ev, err)
		}
	})
	if err != nil {
		r.t.Error(err)
	}
	return true
}

func (s *Service) addKey(t testing.TB, scopes ...string) string {
	t.Helper()
	k, err := apikey.Generate(apikey.Live)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.keys.Apply(&key.Record{ID: "key_1", OrgID: "org_1", Hash: apikey.Sum(k.Secret()).String(), Scopes: scopes, Status: key.Active}, 1); err != nil {
		t.Fatal(err)
	}
	return k.Secret()
}

func FuzzPolicy(f *testing.F) {
	f.Add("rules:\n  - match: GET /v1/{id}\n    scope: a:b\n", "GET", "/v1/x")
	f.Add("default: allow\nrules:\n  - match: /\n    public: true\n", "POST", "/v1//x")
	f.Add("rules: [{match: 'GET h/a/{b...}', scopes: [a:b, c:d]}]", "GET", "/a/b/c")
	f.Fuzz(func(t *testing.T, text, method, target string) {
		p, err := parsePolicy([]byte(text))
		if (p == nil) == (err == nil) {
			t.Fatalf("policy %v and error %v", p, err)
		}
		if err != nil {
			return
		}
		if cleaned, err := cleanPath(target); err == nil {
			p.match(method, "example.com", cleaned)
		}
	})
}

func FuzzCleanPath(f *testing.F) {
	for _, s := range []string{"/a/b", "/a/../b", "/%2e%2e/", "//a", "http://h/a", "*", "/a;x/b?c#d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		cleaned, err := cleanPath(target)
		if err != nil {
			return
		}
		if !strings.HasPrefix(cleaned, "/") || strings.Contains(cleaned, "//") || strings.Contains(cleaned, "\\") {
			t.Fatalf("%q is cleaned to %q", target, cleaned)
		}
		for _, segment := range strings.Split(cleaned, "/") {
			if isDots(segment) {
				t.Fatalf("%q is cleaned to %q", target, cleaned)
			}
		}
	})
}

// FuzzAuth: whatever the headers, without the key nobody passes, every identity
// header is there, and the status is one that nginx understands.
func FuzzAuth(f *testing.F) {
	f.Add("GET", "/x", "POST", "/y", "Bearer lk_live_x", "a:b c:d", "1.2.3.4")
	f.Add("G\xffT", "/\xfe", "", "", "Bearer lk_live_x", "\xff", "1.2.3.4")
	f.Add("", "", "GET", "/%ff%fe", "", strings.Repeat("ä", 200), "1.2.3.4")
	s := bareService(f)
	f.Fuzz(func(t *testing.T, om, ou, fm, fu, authorization, scope, xff string) {
		r := httptest.NewRequest(http.MethodGet, "/auth", nil)
		r.Header = http.Header{
			headerOriginalMethod: {om}, headerOriginalURI: {ou}, headerForwardedMethod: {fm}, headerForwardedURI: {fu},
			"Authorization": {authorization}, headerRequiredScope: {scope}, "X-Forwarded-For": {xff}, "User-Agent": {authorization + xff},
		}
		w := httptest.NewRecorder()
		s.serveAuth(w, r)
		if w.Code != 401 && w.Code != 403 {
			t.Fatalf("status %d", w.Code)
		}
		for _, f := range identify(edge.Verdict{}, &judged{}) {
			if w.Header()[f.name] == nil {
				t.Fatalf("%s is missing", f.name)
			}
		}
	})
}

func FuzzSpoolRecord(f *testing.F) {
	f.Add(encodeRecord(frame{ID: "a", Subject: "b", ContentType: "c", Events: 3, Data: []byte("d")}))
	f.Fuzz(func(_ *testing.T, data []byte) {
		if body, ok := record(data); ok {
			_, _ = decodeFrame(body)
		}
		_, _ = decodeFrame(data)
	})
}

func FuzzUsageBody(f *testing.F) {
	f.Add("application/json", "", []byte(`{"time":"2026-01-01T00:00:00Z","org_id":"org_1","key_id":"k","source_ip":"::1","route":"/"}`))
	f.Add("application/x-ndjson", "gzip", []byte("{}\n[]\n"))
	s := bareService(f)
	s.addKey(f, "usage:write")
	k := s.keys.ByID("key_1")
	f.Fuzz(func(t *testing.T, contentType, encoding string, body []byte) {
		data, err := readAll(strings.NewReader(string(body)), encoding, int64(len(body)), 1<<16)
		if err != nil {
			return
		}
		r := httptest.NewRequest(http.MethodPost, "/v1/usage", nil)
		r.Header.Set("Content-Type", contentType)
		events, answer, err := s.decodeEvents(r, data, k)
		if err != nil {
			return
		}
		if answer.Accepted != len(events) {
			t.Fatalf("accepted %d, have %d", answer.Accepted, len(events))
		}
		for i := range events {
			if events[i].OrgID != "org_1" {
				t.Fatalf("an event of %q passes the wall", events[i].OrgID)
			}
		}
	})
}

var discard = slog.New(slog.DiscardHandler)
