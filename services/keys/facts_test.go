package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

func TestMain(m *testing.M) { enginetest.Main(m) }

// withClickHouse gives the world a real ClickHouse with the real schema.
func (w *world) withClickHouse() *store.Store {
	w.t.Helper()
	e := enginetest.Start(w.t)
	name := enginetest.Database(w.t, e)
	url := "clickhouse://" + e.NativeAddr() + "/" + name
	db, err := store.Open(w.t.Context(), url)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = db.Close() })
	if _, err := db.Migrate(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	w.svc.facts.close()
	if w.svc.facts, err = openFacts(w.t.Context(), url); err != nil {
		w.t.Fatal(err)
	}
	return db
}

func TestHygieneAndLastUse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	db := w.withClickHouse()
	start := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	w.freeze(start)
	org := w.org("acme")
	made := map[string]string{}
	for name, scopes := range map[string][]string{
		"fresh": {"a:b"}, "forgotten": {"a:b"}, "never": {"a:b"}, "wide": {"orders:*", "bills:read", "users:write"}, "god": {"full_access"}, "shared": {"a:b"}, "roaming": {"a:b"}, "person": {"full_access"},
	} {
		made[name] = w.must(201, w.admin, "POST", "/v1/api-keys", object{"org_id": org, "name": name, "scopes": scopes, "rotation_days": 365}).text("id")
	}
	made["due"] = w.must(201, w.admin, "POST", "/v1/api-keys", object{"org_id": org, "name": "due", "scopes": []string{"a:b"}, "rotation_days": 10}).text("id")
	now := start.Add(100 * day)
	w.freeze(now)
	use := func(name string, at time.Time, ip, scope, agent string) {
		t.Helper()
		query := fmt.Sprintf("INSERT INTO usage_events (id, time, org_id, key_id, source_ip, scope, user_agent, decision) VALUES ('e', toDateTime64('%s', 9, 'UTC'), '%s', '%s', '%s', '%s', '%s', 'allow')",
			at.Format("2006-01-02 15:04:05"), org, made[name], ip, scope, agent)
		if err := db.Conn.Exec(t.Context(), query); err != nil {
			t.Fatal(err)
		}
	}
	recently := now.Add(-2 * day)
	for _, name := range []string{"fresh", "due"} {
		use(name, recently, "::ffff:203.0.113.9", "a:b", "curl/8.1")
	}
	use("forgotten", start.Add(day), "::ffff:203.0.113.9", "a:b", "curl/8.1")
	use("wide", recently, "::ffff:203.0.113.9", "orders:read", "curl/8.1")
	use("god", recently, "::ffff:203.0.113.9", "orders:read", "terraform/1.9")
	use("person", recently, "::ffff:203.0.113.9", "orders:read", "Mozilla/5.0 (X11)")
	use("shared", recently, "::ffff:203.0.113.9", "a:b", "curl/8.1")
	use("shared", recently.Add(time.Minute), "::ffff:203.0.113.9", "a:b", "python-requests/2.3")
	for i := range 5 {
		use("roaming", recently, fmt.Sprintf("::ffff:198.51.%d.9", i), "a:b", "curl/8.1")
	}

	var report struct {
		Usage    string
		Keys     int
		Findings []Finding
		Counts   map[string]int
	}
	w.must(200, w.admin, "GET", "/v1/hygiene?org_id="+org, nil).decode(t, &report)
	if report.Usage != "known" || report.Keys != len(made) {
		t.Fatalf("use %s, %d keys; log: %s", report.Usage, report.Keys, w.log)
	}
	found := map[string][]string{}
	for _, f := range report.Findings {
		found[f.Name] = append(found[f.Name], f.Kind)
		if f.Kind == findUnusedScopes && (!strings.Contains(f.Detail, "bills:read, users:write") || !slices.Equal(f.Scopes, []string{"orders:read"})) {
			t.Errorf("%+v", f)
		}
	}
	for name, want := range map[string][]string{
		"fresh": nil, "forgotten": {findUnused}, "never": {findNeverUsed}, "wide": {findUnusedScopes}, "god": {findFullAccess},
		"shared": {findShared}, "roaming": {findShared}, "due": {findOverdue}, "person": nil,
	} {
		if !slices.Equal(found[name], want) {
			t.Errorf("%s: %v, not %v", name, found[name], want)
		}
	}
	if report.Counts[findShared] != 2 || report.Counts[findExpiring] != 0 {
		t.Errorf("counts %v", report.Counts)
	}
	for query, want := range map[string]int{
		"unused=true": 2, "unused=false": 7, "unused_for=50d": 2, "used_since=" + recently.Add(-time.Hour).Format(time.RFC3339): 7,
	} {
		var page struct {
			Keys    []Key
			LastUse string `json:"last_use"`
		}
		w.must(200, w.admin, "GET", "/v1/api-keys?org_id="+org+"&"+query, nil).decode(t, &page)
		if len(page.Keys) != want || page.LastUse != "known" {
			t.Errorf("%s: %d keys, not %d; last use %s", query, len(page.Keys), want, page.LastUse)
		}
	}
	if got := w.must(200, w.admin, "GET", "/v1/api-keys/"+made["fresh"], nil).text("last_used_at"); got != recently.Format(time.RFC3339) {
		t.Errorf("last used at %q", got)
	}
	// The owner of an unused key is told.
	if err := w.svc.evaluate(t.Context(), made["forgotten"]); err != nil {
		t.Fatal(err)
	}
	if got := types(w.notices(made["forgotten"])); !slices.Equal(got, []string{"api_key.unused"}) {
		t.Errorf("told %v", got)
	}
}

// stubFacts knows what a test tells it.
type stubFacts struct {
	noFacts
	used map[string]time.Time
}

func (f stubFacts) lastUsed(context.Context, string, []string) (map[string]time.Time, error) {
	return f.used, nil
}

func TestGraceFromFirstUse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	w.freeze(start)
	id, secret := w.key(w.org("acme"), "orgs:read")
	w.must(503, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", object{"grace_from": "first_use"})
	used := map[string]time.Time{}
	w.svc.facts = stubFacts{used: used}
	w.must(422, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", object{"grace_from": "whenever"})
	next := w.must(201, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", object{"grace_from": "first_use", "grace": "1h"}).text("id")
	evaluate := func(at time.Duration) string {
		t.Helper()
		w.freeze(start.Add(at))
		if err := w.svc.evaluate(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		return w.must(200, w.admin, "GET", "/v1/api-keys/"+id, nil).text("expires_at")
	}
	if got, want := evaluate(20*day), start.Add(maxGrace).Format(time.RFC3339); got != want {
		t.Errorf("before the first use it ends at %s, not %s", got, want)
	}
	w.must(200, secret, "GET", "/v1/orgs", nil)
	used[next] = start.Add(21 * day)
	for _, later := range []time.Duration{21 * day, 22 * day} {
		if got, want := evaluate(later), start.Add(21*day+time.Hour).Format(time.RFC3339); got != want {
			t.Errorf("after the first use it ends at %s, not %s", got, want)
		}
	}
	w.must(401, secret, "GET", "/v1/orgs", nil)
}

// A ClickHouse that is away takes nothing along.
func TestClickHouseAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var err error
	if w.svc.facts, err = openFacts(t.Context(), "clickhouse://127.0.0.1:1/latchkey"); err != nil {
		t.Fatal(err)
	}
	id, _ := w.key(w.org("acme"), "a:b")
	var page struct {
		Keys    []Key
		LastUse string `json:"last_use"`
	}
	w.must(200, w.admin, "GET", "/v1/api-keys", nil).decode(t, &page)
	if len(page.Keys) != 2 || page.LastUse != "unknown" {
		t.Errorf("%d keys, last use %s", len(page.Keys), page.LastUse)
	}
	w.must(200, w.admin, "GET", "/v1/api-keys/"+id, nil)
	if r := w.must(200, w.admin, "GET", "/v1/hygiene", nil); r.text("usage") != "unknown" {
		t.Errorf("%s", r.body)
	}
	w.must(503, w.admin, "GET", "/v1/api-keys?unused=true", nil)
	if err := w.svc.evaluate(t.Context(), id); err != nil {
		t.Error(err)
	}
	// It is not asked again at once.
	asked := 0
	c := w.svc.facts.(*clickhouse)
	if err := c.ask(t.Context(), time.Second, func(context.Context) error { asked++; return nil }); err == nil || asked != 0 {
		t.Errorf("asked %d times, %v", asked, err)
	}
	if errors.Is(err, errNoClickHouse) {
		t.Error("away is not absent")
	}
}
