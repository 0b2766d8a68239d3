package keys

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

func TestLifeOfAKey(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	created := w.must(201, w.admin, "POST", "/v1/api-keys", object{
		"org_id": org, "name": "Billing", "scopes": []string{"telemetry:write", "commands:read"}, "environment": "test",
		"owner": "payments", "tags": []string{"billing"}, "metadata": object{"team": "7"}, "allowed_cidrs": []string{"198.51.100.7", "2001:db8::/32"},
	})
	id, secret := created.text("id"), created.text("key")
	if k, err := apikey.Parse(secret); err != nil || k.Environment() != "test" || created.text("prefix") != k.Masked() {
		t.Fatalf("key %v, %v, shown prefix %q", k, err, created.text("prefix"))
	}
	shown := w.must(200, w.admin, "GET", "/v1/api-keys/"+id, nil)
	if shown.text("status") != "active" || strings.Contains(string(shown.body), secret) || strings.Contains(string(shown.body), `"hash"`) {
		t.Fatalf("shown: %s", shown.body)
	}
	w.must(200, w.admin, "PATCH", "/v1/api-keys/"+id, object{"name": "Billing 2", "scopes": []string{"telemetry:*"}, "tags": []string{}})
	if got := w.must(200, w.admin, "POST", "/v1/api-keys/"+id+"/suspend", object{"reason": "strange traffic"}).text("status"); got != "suspended" {
		t.Fatalf("suspended: %s", got)
	}
	w.must(200, w.admin, "POST", "/v1/api-keys/"+id+"/suspend", nil)
	if got := w.must(200, w.admin, "POST", "/v1/api-keys/"+id+"/resume", nil).text("status"); got != "active" {
		t.Fatalf("resumed: %s", got)
	}
	revoked := w.must(200, w.admin, "POST", "/v1/api-keys/"+id+"/revoke", object{"reason": "key_compromise"})
	if revoked.text("status") != "revoked" || revoked.text("revoke_reason") != "keyCompromise" {
		t.Fatalf("revoked: %s", revoked.body)
	}
	again := w.must(200, w.admin, "POST", "/v1/api-keys/"+id+"/revoke", object{"reason": "superseded"})
	if again.text("revoke_reason") != "keyCompromise" || again.text("revoked_at") != revoked.text("revoked_at") {
		t.Fatalf("revoked again: %s", again.body)
	}
	for _, action := range []string{"rotate", "suspend", "resume", "claim"} {
		w.must(409, w.admin, "POST", "/v1/api-keys/"+id+"/"+action, nil)
	}
	w.must(409, w.admin, "PATCH", "/v1/api-keys/"+id, object{"name": "x"})

	var audit struct{ Events []AuditEvent }
	w.must(200, w.admin, "GET", "/v1/audit?key_id="+id, nil).decode(t, &audit)
	var types []string
	for _, e := range audit.Events {
		types = append(types, e.Type)
		if e.ActorIP != "127.0.0.1" || !strings.HasPrefix(e.Actor, "key_") || e.After == nil || (e.Before == nil) != (e.Type == key.Created) {
			t.Errorf("audit event %+v", e)
		}
	}
	if want := []string{key.RevokedEv, key.ResumedEv, key.SuspendEv, key.Updated, key.Created}; !slices.Equal(types, want) {
		t.Errorf("audit tells %v, not %v", types, want)
	}
}

func TestRotate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	start := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	w.freeze(start)
	id, secret := w.key(org, "orgs:read")
	rotated := w.must(201, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", object{"grace": "24h"})
	var out NewKey
	rotated.decode(t, &out)
	if out.ParentKeyID != id || out.ID == id || out.Secret == secret || !slices.Equal(out.Scopes, []string{"orgs:read"}) || out.Previous.ID != id ||
		!out.Previous.ValidUntil.Equal(start.Add(24*time.Hour)) || out.Previous.LimitedByExpiry {
		t.Fatalf("rotated: %s", rotated.body)
	}
	if got := w.must(200, w.admin, "GET", "/v1/api-keys/"+id, nil); got.text("successor_key_id") != out.ID || got.text("status") != "active" {
		t.Fatalf("old key: %s", got.body)
	}
	w.must(409, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", nil)
	w.must(422, w.admin, "PATCH", "/v1/api-keys/"+id, object{"never_expires": true})

	// The grace period ends to the nanosecond.
	for at, want := range map[time.Duration]int{0: 200, 24*time.Hour - 1: 200, 24 * time.Hour: 401, 24*time.Hour + 1: 401} {
		w.freeze(start.Add(at))
		w.must(want, secret, "GET", "/v1/orgs", nil)
		w.must(200, out.Secret, "GET", "/v1/orgs", nil)
	}
	w.freeze(start.Add(25 * time.Hour))
	if got := w.must(200, w.admin, "GET", "/v1/api-keys/"+id, nil).text("status"); got != "expired" {
		t.Fatalf("after the grace period: %s", got)
	}
}

func TestRotateAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id, secret := w.key(w.org("acme"), "orgs:read")
	for _, grace := range []string{"0", "0s"} {
		var out NewKey
		w.must(201, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", object{"grace": grace}).decode(t, &out)
		w.must(401, secret, "GET", "/v1/orgs", nil)
		w.must(200, out.Secret, "GET", "/v1/orgs", nil)
		if old := w.must(200, w.admin, "GET", "/v1/api-keys/"+id, nil); old.text("status") != "revoked" || old.text("revoke_reason") != "superseded" {
			t.Fatalf("old key: %s", old.body)
		}
		id, secret = out.ID, out.Secret
	}
}

func TestRotateNeverOutlivesTheOldExpiry(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	start := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	w.freeze(start)
	expires := start.Add(2 * time.Hour)
	created := w.must(201, w.admin, "POST", "/v1/api-keys", object{"org_id": org, "name": "short", "scopes": []string{"a:b"}, "expires_at": expires})
	w.freeze(start.Add(time.Hour))
	var out NewKey
	w.must(201, w.admin, "POST", "/v1/api-keys/"+created.text("id")+"/rotate", object{"grace": "24h"}).decode(t, &out)
	if !out.Previous.ValidUntil.Equal(expires) || !out.Previous.LimitedByExpiry {
		t.Errorf("old key valid until %s", out.Previous.ValidUntil)
	}
	if !out.ExpiresAt.Equal(start.Add(3 * time.Hour)) {
		t.Errorf("new key expires at %s", out.ExpiresAt)
	}
	var audit struct{ Events []AuditEvent }
	w.must(200, w.admin, "GET", "/v1/audit?type=api_key.rotated&key_id="+created.text("id"), nil).decode(t, &audit)
	if len(audit.Events) != 1 || !strings.Contains(audit.Events[0].Reason, "expiry cuts the grace period of 24h0m0s short") {
		t.Errorf("the lineage does not say that expiry came first: %+v", audit.Events)
	}
	// An expired key can be replaced, and stays expired.
	w.freeze(start.Add(4 * time.Hour))
	old := out.ID
	w.must(201, w.admin, "POST", "/v1/api-keys/"+old+"/rotate", nil).decode(t, &out)
	if out.Previous.Status != "expired" || out.ParentKeyID != old {
		t.Errorf("rotated an expired key: %+v", out.Previous)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	create := func(change object) object {
		body := object{"org_id": org, "name": "k", "scopes": []string{"a:b"}}
		for k, v := range change {
			body[k] = v
		}
		return body
	}
	for name, c := range map[string]struct {
		body any
		want int
	}{
		"no name":              {create(object{"name": " "}), 422},
		"long name":            {create(object{"name": strings.Repeat("x", 201)}), 422},
		"line break in name":   {create(object{"name": "a\nb"}), 422},
		"alert budget":         {create(object{"alert_budget": -1}), 422},
		"no scopes":            {create(object{"scopes": []string{}}), 422},
		"null scopes":          {create(object{"scopes": nil}), 422},
		"bad scope":            {create(object{"scopes": []string{"a:b", "everything"}}), 422},
		"star scope":           {create(object{"scopes": []string{"*:*"}}), 422},
		"many scopes":          {create(object{"scopes": make([]string, 1000)}), 422},
		"past expiry":          {create(object{"expires_at": "2020-01-01T00:00:00Z"}), 422},
		"absurd expiry":        {create(object{"expires_at": "9999-12-31T23:59:59Z"}), 422},
		"no time":              {create(object{"expires_at": "tomorrow"}), 422},
		"unknown field":        {create(object{"expiry": "2030-01-01T00:00:00Z"}), 422},
		"wrong type":           {create(object{"name": 7}), 422},
		"bad cidr":             {create(object{"allowed_cidrs": []string{"10.0.0.0/99"}}), 422},
		"bad environment":      {create(object{"environment": "Live!"}), 422},
		"bad reaction":         {create(object{"on_compromise": object{"action": "explode", "severity": "high"}}), 422},
		"unknown organization": {create(object{"org_id": "org_none"}), 404},
		"broken json":          {`{"name":`, 400},
		"no body":              {nil, 400},
		"huge body":            {`{"name":"` + strings.Repeat("x", 1<<20) + `"}`, 413},
	} {
		r := w.call(w.admin, "POST", "/v1/api-keys", c.body)
		if r.status != c.want || r.header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: %d %s: %.300s", name, r.status, r.header.Get("Content-Type"), r.body)
		}
	}
	if res, err := http.Post(w.url+"/v1/orgs", "application/x-www-form-urlencoded", strings.NewReader(`{}`)); err != nil || res.StatusCode != 401 {
		t.Errorf("a form without a key: %v", err)
	}
	id, _ := w.key(org, "a:b")
	for _, grace := range []string{"-1h", "soon", "1000d", "99999999h"} {
		w.must(422, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", object{"grace": grace})
	}
	w.must(422, w.admin, "POST", "/v1/api-keys/"+id+"/revoke", object{"reason": "certificateHold"})
	w.must(422, w.admin, "GET", "/v1/api-keys?status=gone", nil)
	w.must(422, w.admin, "GET", "/v1/api-keys?cursor=!!", nil)
	w.must(422, w.admin, "GET", "/v1/api-keys?staus=active", nil)
	w.must(404, w.admin, "GET", "/v1/api-keys/key_none", nil)
	w.must(404, w.admin, "GET", "/v1/api-keys/%3E", nil)
	w.must(404, w.admin, "GET", "/v1/nothing", nil)
	if r := w.must(405, w.admin, "DELETE", "/v1/orgs", nil); r.header.Get("Allow") != "GET, POST" {
		t.Errorf("Allow: %q", r.header.Get("Allow"))
	}
	for _, email := range []string{"", "x", "a@b\r\nBcc: c@d", "A <a@b.c>", "a@b.c, d@e.f"} {
		w.must(422, w.admin, "POST", "/v1/orgs", object{"name": "o", "owner_email": email})
	}
	for _, url := range []string{"ftp://example.com", "http://example.com/x", "https://u:p@example.com", "nonsense", "https://example.com/#a"} {
		w.must(422, w.admin, "POST", "/v1/webhooks", object{"org_id": org, "url": url})
	}
}

// Whoever asks for more than it holds is refused, by whatever call.
func TestAKeyGrantsNoMoreThanItHolds(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	_, limited := w.key(org, "keys:*", "orders:*")
	wide, _ := w.key(org, "orders:read", "billing:write")
	for _, scopes := range [][]string{{"full_access"}, {"orders:read", "billing:read"}, {"orgs:read"}} {
		r := w.must(403, limited, "POST", "/v1/api-keys", object{"name": "k", "scopes": scopes})
		if !strings.HasSuffix(r.text("type"), "/beyond-own-scopes") {
			t.Errorf("%v: %s", scopes, r.body)
		}
	}
	w.must(201, limited, "POST", "/v1/api-keys", object{"name": "k", "scopes": []string{"orders:read", "keys:read", "orders:*"}})
	w.must(403, limited, "POST", "/v1/api-keys/"+wide+"/rotate", nil)
	w.must(403, limited, "PATCH", "/v1/api-keys/"+wide, object{"scopes": []string{"orders:read", "billing:*"}})
	// It may take away, and may leave what was there before.
	w.must(200, limited, "PATCH", "/v1/api-keys/"+wide, object{"scopes": []string{"billing:write"}})
	w.must(200, limited, "POST", "/v1/api-keys/"+wide+"/revoke", nil)
}

// Every writer wins or learns that it lost; a revocation is never undone.
func TestRaces(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, second := w.start()
	org := w.org("acme")
	for round := range 10 {
		id, _ := w.key(org, "a:b")
		var wg sync.WaitGroup
		statuses := make([]int, 12)
		for i := range statuses {
			wg.Go(func() {
				url := w.url
				if i%2 == 0 {
					url = second
				}
				switch i % 4 {
				case 0, 1:
					statuses[i] = w.callAt(url, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", nil).status
				case 2:
					statuses[i] = w.callAt(url, w.admin, "PATCH", "/v1/api-keys/"+id, object{"name": fmt.Sprint(i)}).status
				case 3:
					statuses[i] = w.callAt(url, w.admin, "POST", "/v1/api-keys/"+id+"/revoke", nil).status
				}
			})
		}
		wg.Wait()
		rotations := 0
		for i, status := range statuses {
			if i%4 < 2 && status == 201 {
				rotations++
			}
			if i%4 == 3 && status != 200 || status >= 500 {
				t.Errorf("round %d, call %d: %d", round, i, status)
			}
		}
		if rotations > 1 {
			t.Errorf("round %d: rotated %d times", round, rotations)
		}
		final, err := w.svc.store.read(t.Context(), id)
		if err != nil || final.Status != key.Revoked {
			t.Errorf("round %d: in the end %s, %v", round, final.Status, err)
		}
		if (final.SuccessorID != "") != (rotations == 1) {
			t.Errorf("round %d: %d rotations, successor %q", round, rotations, final.SuccessorID)
		}
	}
}

func TestListAndSearch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org, other := w.org("acme"), w.org("globex")
	var made []string
	for i := range 25 {
		r := w.must(201, w.admin, "POST", "/v1/api-keys", object{
			"org_id": org, "name": fmt.Sprintf("Key %02d", i), "scopes": []string{[]string{"orders:read", "orders:*", "bills:read"}[i%3]},
			"owner": []string{"ann", "bob"}[i%2], "tags": []string{fmt.Sprint("t", i%5)},
		})
		made = append(made, r.text("id"))
	}
	w.key(other, "orders:read")
	slices.Reverse(made)
	var listed []string
	for cursor := ""; ; {
		var page struct {
			Keys       []Key
			NextCursor string `json:"next_cursor"`
		}
		w.must(200, w.admin, "GET", "/v1/api-keys?limit=7&org_id="+org+"&cursor="+cursor, nil).decode(t, &page)
		for _, k := range page.Keys {
			listed = append(listed, k.ID)
		}
		if cursor = page.NextCursor; cursor == "" {
			break
		}
	}
	if !slices.Equal(listed, made) {
		t.Fatalf("listed %d keys, or in another order than newest first: %v", len(listed), listed)
	}
	w.must(200, w.admin, "POST", "/v1/api-keys/"+made[0]+"/revoke", nil)
	w.must(200, w.admin, "POST", "/v1/api-keys/"+made[1]+"/suspend", nil)
	for query, want := range map[string]int{
		"status=active": 23, "status=revoked": 1, "status=suspended": 1, "status=expired": 0,
		"q=key%2007": 1, "q=" + strings.ToLower(made[3]): 1, "owner=Ann": 13, "tag=t2": 5, "scope=orders:read": 17, "scope=orders:delete": 8,
		"overdue=true": 0, "overdue=false": 25, "older_than=1d": 0, "older_than=0s": 25, "environment=live": 25, "environment=test": 0,
		"created_after=2020-01-01T00:00:00Z": 25, "created_before=2020-01-01T00:00:00Z": 0, "owner=ann&tag=t0&status=active": 3,
	} {
		var page struct{ Keys []Key }
		w.must(200, w.admin, "GET", "/v1/api-keys?org_id="+org+"&"+query, nil).decode(t, &page)
		if len(page.Keys) != want {
			t.Errorf("%s: %d keys, not %d", query, len(page.Keys), want)
		}
	}
	// What asks for use is refused without ClickHouse rather than answered wrongly.
	w.must(503, w.admin, "GET", "/v1/api-keys?unused=true", nil)
	w.freeze(time.Now().Add(91 * day))
	var page struct{ Keys []Key }
	w.must(200, w.admin, "GET", "/v1/api-keys?overdue=true&org_id="+org, nil).decode(t, &page)
	if len(page.Keys) != 24 || !page.Keys[0].Overdue {
		t.Errorf("%d keys overdue after 91 days", len(page.Keys))
	}
}

func TestRestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	id, secret := w.key(org, "orgs:read")
	revoked, revokedSecret := w.key(org, "orgs:read")
	w.must(200, w.admin, "POST", "/v1/api-keys/"+revoked+"/revoke", nil)
	file, err := os.Stat(filepath.Join(w.dir, "admin.key"))
	if err != nil || file.Mode().Perm() != 0o600 {
		t.Fatalf("admin key: %v, %v", file.Mode(), err)
	}
	_, url := w.start()
	for key, want := range map[string]int{w.admin: 200, secret: 200, revokedSecret: 401} {
		if r := w.callAt(url, key, "GET", "/v1/orgs", nil); r.status != want {
			t.Errorf("after the restart: %d, not %d", r.status, want)
		}
	}
	if r := w.callAt(url, w.admin, "GET", "/v1/api-keys/"+id, nil); r.text("org_id") != org {
		t.Errorf("after the restart: %s", r.body)
	}
	again, err := os.ReadFile(filepath.Join(w.dir, "admin.key"))
	if err != nil || strings.TrimSpace(string(again)) != w.admin {
		t.Error("the restart made another admin key")
	}
	// The other replica hears of changes made here.
	w.must(200, w.admin, "POST", "/v1/api-keys/"+id+"/revoke", nil)
	eventually(t, func() bool { return w.callAt(url, secret, "GET", "/v1/orgs", nil).status == 401 })
}

// With NATS away keys are still told apart, and changes are refused at once
// and not made later.
func TestNATSAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	id, secret := w.key(org, "orgs:read", "keys:read")
	w.nats.Shutdown()
	eventually(t, func() bool { return !w.nc.IsConnected() })
	w.must(200, secret, "GET", "/v1/orgs", nil)
	w.must(200, secret, "GET", "/v1/api-keys", nil)
	w.must(401, secret+"0", "GET", "/v1/orgs", nil)
	for path, body := range map[string]any{
		"/v1/api-keys": object{"org_id": org, "name": "k", "scopes": []string{"a:b"}}, "/v1/api-keys/" + id + "/rotate": object{},
		"/v1/api-keys/" + id + "/revoke": object{}, "/v1/orgs": object{"name": "o", "owner_email": "a@b.c"},
	} {
		if r := w.must(503, w.admin, "POST", path, body); r.header.Get("Retry-After") == "" || !strings.HasSuffix(r.text("type"), "/unavailable") {
			t.Errorf("%s: %s", path, r.body)
		}
	}
}

func TestLastAdminStays(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var page struct{ Keys []Key }
	w.must(200, w.admin, "GET", "/v1/api-keys?org_id="+key.SystemOrg, nil).decode(t, &page)
	admin := page.Keys[0].ID
	w.must(409, w.admin, "POST", "/v1/api-keys/"+admin+"/revoke", nil)
	w.must(409, w.admin, "POST", "/v1/api-keys/"+admin+"/suspend", nil)
	w.must(409, w.admin, "PATCH", "/v1/api-keys/"+admin, object{"scopes": []string{"keys:*"}})
	w.must(200, w.admin, "PATCH", "/v1/api-keys/"+admin, object{"scopes": []string{"full_access", "keys:*"}})
	w.key(key.SystemOrg, "full_access")
	w.must(200, w.admin, "POST", "/v1/api-keys/"+admin+"/revoke", nil)
	w.must(401, w.admin, "GET", "/v1/orgs", nil)
}

// The secret is in the answer that shows it and nowhere else.
func TestSecretIsSeenOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(w.svc)
	org := w.org("acme")
	id, secret := w.key(org, "orgs:read")
	next := w.must(201, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", nil).text("key")
	hook := w.must(201, w.admin, "POST", "/v1/webhooks", object{"org_id": org, "url": "https://example.com/hook"})
	w.must(401, secret+"x", "GET", "/v1/orgs", nil)
	w.must(200, secret, "GET", "/v1/orgs", nil)
	secrets := []string{secret, next, w.admin}
	seen := func(where, text string) {
		for _, s := range secrets {
			// The random part alone would do for a thief.
			if strings.Contains(text, s[len("lk_live_")+apikey.ShownLen:]) {
				t.Errorf("a secret in %s", where)
			}
		}
	}
	for _, path := range []string{"/v1/api-keys", "/v1/api-keys/" + id, "/v1/audit", "/v1/hygiene", "/v1/webhooks", "/v1/webhooks/" + hook.text("id")} {
		body := string(w.must(200, w.admin, "GET", path, nil).body)
		seen(path, body)
		if strings.Contains(body, hook.text("secret")) {
			t.Errorf("a webhook's secret in %s", path)
		}
	}
	js, err := jetstream.New(w.nc)
	if err != nil {
		t.Fatal(err)
	}
	notices := 0
	for _, name := range []string{bus.Keys, bus.Audit, bus.Notices, bus.Timers} {
		eventually(t, func() bool {
			msgs := drain(t, js, name)
			notices = len(msgs)
			return notices >= 1
		})
		for _, m := range drain(t, js, name) {
			seen(name, m)
			if strings.Contains(m, hook.text("secret")) {
				t.Errorf("a webhook's secret on %s", name)
			}
		}
	}
	seen("the log", w.log.String())
}

// drain is everything on a stream.
func drain(t testing.TB, js jetstream.JetStream, name string) []string {
	t.Helper()
	stream, err := js.Stream(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	info := stream.CachedInfo()
	var out []string
	for seq := info.State.FirstSeq; seq <= info.State.LastSeq && seq > 0; seq++ {
		if m, err := stream.GetMsg(t.Context(), seq); err == nil {
			out = append(out, m.Subject+" "+string(m.Data))
		}
	}
	return out
}

// eventually waits for what another goroutine brings about.
func eventually(t testing.TB, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatal("it did not come about within 30 s")
		case <-tick.C:
		}
	}
}

func TestIDsAreInOrder(t *testing.T) {
	t.Parallel()
	var g ids
	now := time.UnixMilli(1_800_000_000_000)
	last := ""
	for i := range 5000 {
		id := g.next("key", now.Add(time.Duration(i/1000)*time.Millisecond))
		if id <= last || len(id) != len("key_")+26 {
			t.Fatalf("%s after %s", id, last)
		}
		last = id
	}
	if !strings.HasPrefix(last, "key_01") {
		t.Error(last)
	}
}

func TestWebhooks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	made := w.must(201, w.admin, "POST", "/v1/webhooks", object{"org_id": org, "url": "https://example.com/hook", "events": []string{"api_key.revoked"}})
	path := "/v1/webhooks/" + made.text("id")
	if s := made.text("secret"); !strings.HasPrefix(s, "whsec_") || len(s) < len("whsec_")+32 {
		t.Fatalf("secret %q", s)
	}
	w.must(422, w.admin, "PATCH", path, object{"events": []string{"api_key.exploded"}})
	if r := w.must(200, w.admin, "PATCH", path, object{"disabled": true}); !strings.Contains(string(r.body), `"disabled":true`) {
		t.Fatalf("%s", r.body)
	}
	rotated := w.must(201, w.admin, "POST", path+"/rotate-secret", nil)
	entry, err := w.svc.webhooks.Get(t.Context(), made.text("id"))
	if err != nil {
		t.Fatal(err)
	}
	var stored key.Webhook
	if err := json.Unmarshal(entry.Value(), &stored); err != nil || stored.Secret != rotated.text("secret") || stored.PreviousSecret != made.text("secret") || stored.OrgID != org {
		t.Fatalf("stored %+v, %v", stored, err)
	}
	w.must(204, w.admin, "DELETE", path, nil)
	w.must(404, w.admin, "GET", path, nil)
	w.must(200, w.admin, "GET", "/v1/webhooks", nil)
}
