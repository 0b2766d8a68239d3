package keys

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/services/internal/api"
)

// newFuzzTarget is the API as a handler, without a network in between.
func newFuzzTarget(f *testing.F) (w *world, handler http.Handler, key, org string) {
	w = newWorld(f)
	mux := http.NewServeMux()
	server := api.New(mux, api.Options{Keys: w.svc.Keyset()})
	w.svc.Register(server.API)
	org = w.org("acme")
	key, _ = w.key(org, "orders:read")
	return w, server.Handler(), key, org
}

// Whatever a body holds, the answer is a clear one.
func FuzzBodies(f *testing.F) {
	w, handler, key, org := newFuzzTarget(f)
	paths := []string{
		"/v1/orgs", "/v1/api-keys", "/v1/api-keys/" + key + "/rotate", "/v1/api-keys/" + key + "/suspend", "/v1/api-keys/" + key + "/resume", "/v1/webhooks",
	}
	for i := range paths {
		for _, body := range []string{
			``, `{}`, `null`, `[]`, `"x"`, `{"name":"x","owner_email":"a@b.c"}`, `{"org_id":"` + org + `","name":"x","scopes":["a:b"],"expires_at":"2030-01-01T00:00:00Z"}`,
			`{"grace":"1h"}`, `{"url":"https://example.com"}`, `{"name":"\ud800","scopes":[null]}`, `{"metadata":{"a":null}}`, `{"rotation_days":1e99}`, "{\"name\":\"\xff\"}",
		} {
			f.Add(uint8(i), body)
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, body string) {
		req := httptest.NewRequestWithContext(t.Context(), "POST", paths[int(which)%len(paths)], strings.NewReader(body))
		req.Header.Set("Authorization", "Bearer "+w.admin)
		req.Header.Set("Content-Type", "application/json")
		rec := httptest.NewRecorder()
		handler.ServeHTTP(rec, req)
		if rec.Code >= 500 || rec.Code >= 400 && rec.Header().Get("Content-Type") != "application/problem+json" {
			t.Fatalf("%d to %q: %s", rec.Code, body, rec.Body)
		}
	})
}

// Whatever the headers hold, only the key opens the API.
func FuzzHeaders(f *testing.F) {
	w, handler, _, _ := newFuzzTarget(f)
	for _, h := range []string{"", "Bearer", "Bearer ", "bearer x", "Basic x", "Bearer lk_live_", "Bearer a, Bearer b", "\x00", "Bearer \xff"} {
		f.Add(h, h, h)
	}
	f.Fuzz(func(t *testing.T, authorization, apiKey, forwarded string) {
		req := httptest.NewRequestWithContext(t.Context(), "GET", "/v1/orgs", nil)
		req.Header["Authorization"], req.Header["X-Api-Key"], req.Header["X-Forwarded-For"] = []string{authorization}, []string{apiKey}, []string{forwarded}
		rec := httptest.NewRecorder()
		handler.ServeHTTP(rec, req)
		knows := strings.Contains(authorization+apiKey, w.admin)
		if rec.Code >= 500 || rec.Code < 400 && !knows {
			t.Fatalf("%d: %s", rec.Code, rec.Body)
		}
		for _, h := range rec.Header()["Www-Authenticate"] {
			if strings.ContainsAny(h, "\r\n") {
				t.Fatalf("header %q", h)
			}
		}
	})
}

func FuzzRevokeReason(f *testing.F) {
	for _, r := range append(revokeReasons, "", "key_compromise", "certificateHold", "leaked", "KEY COMPROMISE", " ", "--") {
		f.Add(r)
	}
	f.Fuzz(func(t *testing.T, text string) {
		reason, comment, err := revokeReason(text)
		if err == nil && (reason == "" || reason == "unspecified" && text != "" && comment == "") {
			t.Fatalf("%q: %q, %q", text, reason, comment)
		}
	})
}
