package anomaly

import "testing"

func TestAppendFolded(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"/v1/devices/{id}":                                   "/v1/devices/{id}",
		"/v1/devices/:device":                                "/v1/devices/{id}",
		"/v1/devices/42/readings?limit=5":                    "/v1/devices/{id}/readings",
		"/v2.1/jobs/7f9c2ba4-e88f-4e2b-9d3a-0c8f3a1b2c3d":    "/v2.1/jobs/{id}",
		"/v1/keys/key_01J9ZC3T":                              "/v1/keys/{id}",
		"/reports/2026-03-02":                                "/reports/{id}",
		"/files/export_20260302.csv":                         "/files/{id}",
		"/oauth2/token":                                      "/oauth2/token",
		"/s3/upload":                                         "/s3/upload",
		"/users/ada@example.org":                             "/users/{id}",
		"users/list":                                         "users/list",
		"/commits/da39a3ee5e6b4b0d3255bfef95601890afd80709/": "/commits/{id}",
		"":                        "/",
		"/":                       "/",
		"/a/b/c/d/e/f/g/h/i/j":    "/a/b/c/d/e/f/g/h/…",
		"/items/item-3":           "/items/{id}",
		"/v1beta1/things/x1y2z3w": "/v1beta1/things/{id}",
	} {
		if got := string(appendFolded(nil, path)); got != want {
			t.Errorf("appendFolded(%q) = %q, want %q", path, got, want)
		}
	}
}

func FuzzAppendFolded(f *testing.F) {
	f.Add("/v1/devices/42?x")
	f.Fuzz(func(t *testing.T, path string) {
		if got := appendFolded(nil, path); len(got) > foldLength+foldSegments*5 {
			t.Errorf("%q is %d bytes long", got, len(got))
		}
	})
}
