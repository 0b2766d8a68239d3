package keys

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
)

// body is what a call of an operation needs to be well-formed.
func body(method, path, org string) any {
	switch {
	case method == "GET" || method == "DELETE":
		return nil
	case path == "/v1/orgs":
		return object{"name": "x", "owner_email": "x@example.com"}
	case path == "/v1/api-keys":
		return object{"org_id": org, "name": "x", "scopes": []string{"orders:read"}}
	case path == "/v1/webhooks":
		return object{"org_id": org, "url": "https://example.com/hook"}
	}
	return object{}
}

// every calls visit for every operation of the API, as its own document lists them.
func every(t *testing.T, w *world, visit func(method, path, scope string)) {
	t.Helper()
	var spec struct {
		OpenAPI string
		Paths   map[string]map[string]struct {
			OperationID string
			Security    []map[string][]string
		}
	}
	w.must(200, "", "GET", "/openapi.json", nil).decode(t, &spec)
	n := 0
	for path, methods := range spec.Paths {
		for method, op := range methods {
			if len(op.Security) != 2 || len(op.Security[0]["bearer"]) != 1 {
				t.Errorf("%s %s does not say which scope it needs", method, path)
				continue
			}
			n++
			visit(strings.ToUpper(method), path, op.Security[0]["bearer"][0])
		}
	}
	if n < 20 {
		t.Errorf("only %d operations", n)
	}
}

func TestEveryCallNeedsItsScope(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	id, secret := w.key(org, "orders:*")
	revoked, revokedSecret := w.key(org, "full_access")
	w.must(200, w.admin, "POST", "/v1/api-keys/"+revoked+"/revoke", nil)
	every(t, w, func(method, path, scope string) {
		full := strings.Replace(path, "{id}", id, 1)
		for name, c := range map[string]struct {
			key, challenge string
			status         int
		}{
			"no key":      {"", `Bearer realm="latchkey"`, 401},
			"revoked key": {revokedSecret, `error="invalid_token"`, 401},
			"unknown key": {"lk_live_000000000000000000000000000000000000", `error="invalid_token"`, 401},
			"no scope":    {secret, `error="insufficient_scope"`, 403},
		} {
			r := w.call(c.key, method, full, body(method, path, org))
			challenge := r.header.Get("WWW-Authenticate")
			if r.status != c.status || !strings.Contains(challenge, c.challenge) || r.header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("%s %s with %s: %d, %s, %s", method, path, name, r.status, challenge, r.body)
			}
			if name == "no key" && strings.Contains(challenge, "error=") {
				t.Errorf("%s %s without a key names an error: %s", method, path, challenge)
			}
			if name == "no scope" && !strings.Contains(challenge, `scope="`+scope+`"`) {
				t.Errorf("%s %s does not name the scope %s: %s", method, path, scope, challenge)
			}
		}
	})
	shown := w.must(200, w.admin, "GET", "/v1/api-keys/"+id, nil)
	if shown.text("status") != "active" {
		t.Errorf("a refused call had an effect: %s", shown.body)
	}
}

func TestTenantsAreWalls(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	acme, globex := w.org("acme"), w.org("globex")
	_, insider := w.key(acme, "full_access")
	keyID, _ := w.key(globex, "orders:read")
	hook := w.must(201, w.admin, "POST", "/v1/webhooks", object{"org_id": globex, "url": "https://example.com/globex"}).text("id")
	changes := func() (n int) {
		for _, name := range []string{"KEYS", "AUDIT"} {
			stream, err := w.svc.js.Stream(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			n += int(stream.CachedInfo().State.LastSeq)
		}
		return n
	}
	before := changes()
	every(t, w, func(method, path, _ string) {
		if strings.Contains(path, "{id}") {
			for _, id := range []string{keyID, globex, hook} {
				r := w.call(insider, method, strings.Replace(path, "{id}", id, 1), body(method, path, globex))
				none := w.call(insider, method, strings.Replace(path, "{id}", "none", 1), body(method, path, globex))
				if r.status != http.StatusNotFound || r.text("detail") != none.text("detail") {
					t.Errorf("%s %s of another tenant: %d %s; of nobody: %s", method, path, r.status, r.body, none.body)
				}
			}
			return
		}
		if method == "GET" {
			r := w.must(200, insider, method, path, nil)
			for _, foreign := range []string{globex, keyID, hook} {
				if strings.Contains(string(r.body), foreign) {
					t.Errorf("%s %s shows another tenant's %s", method, path, foreign)
				}
			}
			if path == "/v1/orgs" {
				return
			}
			if r := w.call(insider, method, path+"?org_id="+globex, nil); r.status != 404 {
				t.Errorf("%s %s?org_id=…: %d", method, path, r.status)
			}
			return
		}
		if r := w.call(insider, method, path, body(method, path, globex)); r.status != 404 && (path != "/v1/orgs" || r.status != 403) {
			t.Errorf("%s %s for another tenant: %d %s", method, path, r.status, r.body)
		}
	})
	var audit struct{ Events []AuditEvent }
	w.must(200, insider, "GET", "/v1/audit?key_id="+keyID, nil).decode(t, &audit)
	if len(audit.Events) != 0 {
		t.Errorf("the audit of another tenant's key: %v", audit.Events)
	}
	if after := changes(); after != before {
		t.Errorf("%d changes were made beyond the wall", after-before)
	}
	// Inside its walls it can do everything.
	var orgs struct{ Orgs []Org }
	w.must(200, insider, "GET", "/v1/orgs", nil).decode(t, &orgs)
	if len(orgs.Orgs) != 1 || orgs.Orgs[0].ID != acme {
		t.Errorf("it sees %v", orgs.Orgs)
	}
	made := w.must(201, insider, "POST", "/v1/api-keys", object{"name": "own", "scopes": []string{"full_access"}})
	if made.text("org_id") != acme {
		t.Errorf("made in %s", made.text("org_id"))
	}
	w.must(200, insider, "PATCH", "/v1/orgs/"+acme, object{"rotation_days": 30})
}

// The document must be one that generators of clients take.
func TestOpenAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.must(200, "", "GET", "/openapi.json", nil)
	var spec struct {
		OpenAPI    string
		Info       struct{ Title, Version string }
		Components struct {
			Schemas         map[string]any
			SecuritySchemes map[string]any
		}
		Paths map[string]map[string]struct {
			OperationID string
			Parameters  []struct{ Name, In string }
			Responses   map[string]any
		}
	}
	r.decode(t, &spec)
	if !strings.HasPrefix(spec.OpenAPI, "3.1") || spec.Info.Version == "" || len(spec.Components.SecuritySchemes) != 2 {
		t.Errorf("openapi %q, info %+v", spec.OpenAPI, spec.Info)
	}
	ids := map[string]bool{}
	for path, methods := range spec.Paths {
		for method, op := range methods {
			if op.OperationID == "" || ids[op.OperationID] {
				t.Errorf("%s %s: operation id %q", method, path, op.OperationID)
			}
			ids[op.OperationID] = true
			if strings.Contains(path, "{id}") != (len(op.Parameters) > 0 && op.Parameters[0].In == "path") {
				t.Errorf("%s %s: parameters %v", method, path, op.Parameters)
			}
			if op.Responses["401"] == nil || op.Responses["403"] == nil {
				t.Errorf("%s %s does not tell of refusals", method, path)
			}
		}
	}
	// Every reference leads somewhere.
	var check func(v any)
	check = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if ref, ok := v["$ref"].(string); ok && spec.Components.Schemas[strings.TrimPrefix(ref, "#/components/schemas/")] == nil {
				t.Errorf("%s leads nowhere", ref)
			}
			for _, x := range v {
				check(x)
			}
		case []any:
			for _, x := range v {
				check(x)
			}
		}
	}
	var whole any
	if err := json.Unmarshal(r.body, &whole); err != nil {
		t.Fatal(err)
	}
	check(whole)
	docs := string(w.must(200, "", "GET", "/docs", nil).body)
	if strings.Contains(docs, "<script") || strings.Contains(docs, "http://") || !strings.Contains(docs, "/v1/api-keys/{id}/rotate") {
		t.Error("the pages load something from elsewhere, or lack operations")
	}
	problem := w.must(401, "", "GET", "/v1/orgs", nil).text("type")
	if page := string(w.must(200, "", "GET", problem, nil).body); !strings.Contains(page, "Authorization: Bearer") {
		t.Errorf("page of %s: %s", problem, page)
	}
}
