package console

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

func TestAnOrganizationSeesOnlyItself(t *testing.T) {
	t.Parallel()
	h := two(t, Config{ClickHouse: store.Config{URL: awayURL}})
	// An event can name any key: its alert must not tell of the stranger's record.
	h.alert(alert.Alert{ID: "alrt_claim", OrgID: "org_alpha", KeyID: "key_beta", Triggers: []string{alert.VolumeSpike}, Summary: "claimed"})

	for path, want := range map[string]int{
		"/": 200, "/keys": 200, "/alerts": 200, "/audit": 200, "/keys/key_alpha": 200, "/alerts/alrt_alpha": 200, "/alerts/alrt_claim": 200,
		"/alerts?key=key_beta": 200, "/keys?q=beta": 200, "/alerts?history=1": 200,
		"/keys/key_beta": 404, "/alerts/alrt_beta": 404, "/keys/key_root": 404,
		"/mailbox": 403, "/mailbox.json": 403, "/mailbox/x/raw": 403,
		"/v1/alerts": 200, "/v1/alerts/alrt_alpha": 200, "/v1/alerts/alrt_beta": 404, "/v1/alerts?org_id=org_beta": 404, "/v1/alerts?key_id=key_beta": 200,
		"/v1/api-keys/key_beta/activity": 404, "/v1/api-keys/key_beta/baseline": 404,
	} {
		res, text := h.get(path, "key_alpha_admin")
		if res.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, res.StatusCode, want)
		}
		for _, leak := range []string{"beta-worker", "Beta Inc", "key_beta was used", h.secrets["key_beta"][:12], "owner@org_beta"} {
			if strings.Contains(text, leak) {
				t.Errorf("%s tells %q to another organization", path, leak)
			}
		}
	}
	res, _ := h.ask(http.MethodPost, "/v1/alerts/alrt_beta/verdict", "key_alpha_admin", strings.NewReader(`{"verdict":"expected"}`), func(r *http.Request) { r.Header.Set("Content-Type", "application/json") })
	if res.StatusCode != 404 {
		t.Errorf("a verdict on another's alert: %d", res.StatusCode)
	}
	res, _ = h.ask(http.MethodPost, "/alerts/alrt_beta/verdict", "key_alpha_admin", strings.NewReader("verdict=expected"), func(r *http.Request) { r.Header.Set("Content-Type", "application/x-www-form-urlencoded") })
	if res.StatusCode != 404 {
		t.Errorf("a verdict on another's alert by form: %d", res.StatusCode)
	}
	if e, _ := h.svc.alerts.get("alrt_beta"); e.Verdict != nil {
		t.Error("the verdict was taken")
	}
	if res, text := h.get("/keys", "key_root"); res.StatusCode != 200 || !strings.Contains(text, "alpha-worker") || !strings.Contains(text, "beta-worker") {
		t.Errorf("the system's key does not see all: %d", res.StatusCode)
	}
	if res, _ := h.get("/mailbox", "key_root"); res.StatusCode != 200 {
		t.Errorf("the system's key does not see the mailbox: %d", res.StatusCode)
	}
}

func TestScopesAreAsked(t *testing.T) {
	t.Parallel()
	h := two(t, Config{ClickHouse: store.Config{URL: awayURL}})
	h.key("org_alpha", "key_reader", "reader", nil, "alerts:read")
	for path, want := range map[string]int{
		"/alerts": 200, "/alerts/alrt_alpha": 200, "/v1/alerts": 200,
		"/": 403, "/keys": 403, "/audit": 403, "/mailbox": 403, "/v1/api-keys/key_alpha/activity": 403,
	} {
		if res, _ := h.get(path, "key_reader"); res.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, res.StatusCode, want)
		}
	}
	if _, text := h.get("/alerts/alrt_alpha", "key_reader"); strings.Contains(text, "Was this you?") {
		t.Error("the page offers a verdict that the key may not give")
	}
	for path, body := range map[string]string{"/v1/alerts/alrt_alpha/verdict": `{"verdict":"expected"}`, "/alerts/alrt_alpha/verdict": "verdict=expected"} {
		res, _ := h.ask(http.MethodPost, path, "key_reader", strings.NewReader(body), nil)
		if res.StatusCode != 403 {
			t.Errorf("POST %s: %d, want 403", path, res.StatusCode)
		}
	}
	res, _ := h.ask(http.MethodGet, "/alerts", "", nil, func(r *http.Request) { r.Header.Set("Authorization", "Bearer lk_live_wrong") })
	if res.StatusCode != 303 && res.StatusCode != 401 {
		t.Errorf("a wrong key: %d", res.StatusCode)
	}
}

func TestWhoSitsAtTheMachine(t *testing.T) {
	t.Parallel()
	h := two(t, Config{ClickHouse: store.Config{URL: awayURL}})
	tests := []struct {
		name string
		edit func(*http.Request)
		open bool
	}{
		{"loopback", nil, true},
		{"localhost", func(r *http.Request) { r.Host = "localhost:8080" }, true},
		{"IPv6 loopback", func(r *http.Request) { r.Host = "[::1]:8080" }, true},
		{"another name for loopback, as DNS rebinding makes it", func(r *http.Request) { r.Host = "evil.example" }, false},
		{"a name that begins like it", func(r *http.Request) { r.Host = "localhost.evil.example" }, false},
		{"an address of the network", func(r *http.Request) { r.Host = "192.168.1.2" }, false},
		{"through a proxy", func(r *http.Request) { r.Header.Set("X-Forwarded-For", "127.0.0.1") }, false},
		{"through a proxy that says Forwarded", func(r *http.Request) { r.Header.Set("Forwarded", "for=127.0.0.1") }, false},
		{"through a proxy that says nothing in the header", func(r *http.Request) { r.Header.Set("X-Forwarded-Host", "") }, false},
		{"with a bad key", func(r *http.Request) { r.Header.Set("Authorization", "Bearer lk_live_wrong") }, false},
	}
	for _, tt := range tests {
		res, _ := h.ask(http.MethodGet, "/keys", "", nil, tt.edit)
		if open := res.StatusCode == 200; open != tt.open {
			t.Errorf("%s: %d, open should be %v", tt.name, res.StatusCode, tt.open)
		}
	}
	if res, _ := h.ask(http.MethodGet, "/v1/alerts", "", nil, nil); res.StatusCode != 401 {
		t.Errorf("the API without a key: %d", res.StatusCode)
	}
	always := newHouse(t, Config{Login: "always", ClickHouse: store.Config{URL: awayURL}})
	if res, _ := always.get("/keys", ""); res.StatusCode != 303 || !strings.HasPrefix(res.Header.Get("Location"), "/login?next=%2Fkeys") {
		t.Errorf("login always: %d to %q", res.StatusCode, res.Header.Get("Location"))
	}
	if res, _ := always.ask(http.MethodGet, "/mailbox.json", "", nil, func(r *http.Request) { r.Header.Set("Accept", "application/json") }); res.StatusCode != 401 {
		t.Errorf("a program without a key: %d", res.StatusCode)
	}
}

func TestVerdictByForm(t *testing.T) {
	t.Parallel()
	h := two(t, Config{ClickHouse: store.Config{URL: awayURL}})
	const page, action = "/alerts/alrt_alpha", "/alerts/alrt_alpha/verdict"
	form := func() url.Values { return url.Values{"verdict": {"planned"}} }

	// Whatever another site makes a browser send is refused.
	res, _ := h.ask(http.MethodPost, action, "", strings.NewReader("verdict=planned"), func(r *http.Request) { r.Header.Set("Content-Type", "application/x-www-form-urlencoded") })
	if res.StatusCode != 403 {
		t.Errorf("without a token: %d", res.StatusCode)
	}
	for name, edit := range map[string]func(*http.Request){
		"another origin":  func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") },
		"a cross site":    func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") },
		"no form cookie":  func(r *http.Request) { r.Header.Del("Cookie") },
		"through a proxy": func(r *http.Request) { r.Header.Set("X-Forwarded-For", "10.0.0.1") },
	} {
		client := h.browser()
		if name == "no form cookie" {
			client.Jar = nil
		}
		if res, _ := h.submit(client, page, action, form(), edit); res.StatusCode != 403 && res.StatusCode != 401 {
			t.Errorf("%s: %d", name, res.StatusCode)
		}
	}
	if e, _ := h.svc.alerts.get("alrt_alpha"); e.Verdict != nil {
		t.Fatal("a verdict came from elsewhere")
	}

	client := h.browser()
	res, _ = h.submit(client, page, action, form(), nil)
	if res.StatusCode != 303 || res.Header.Get("Location") != page+"?said=planned" {
		t.Fatalf("verdict: %d to %q", res.StatusCode, res.Header.Get("Location"))
	}
	kv, err := h.js.KeyValue(t.Context(), bus.Verdicts)
	if err != nil {
		t.Fatal(err)
	}
	entry, err := kv.Get(t.Context(), "alrt_alpha")
	if err != nil {
		t.Fatal(err)
	}
	v := decode[verdict](t, string(entry.Value()))
	if v.Verdict != "planned" || v.Actor != "console" || v.ExpiresAt == nil || v.ExpiresAt.Sub(v.Time) != 7*24*time.Hour {
		t.Errorf("verdict = %+v", v)
	}
	h.wait("the audit", func() bool {
		return len(h.svc.records.latest(10, func(l auditLine) bool { return l.Type == "alert.verdict" && l.Subject == "alrt_alpha" })) == 1
	})
	if _, text := h.get(page+"?said=planned", ""); !strings.Contains(text, "Noted: planned") || !strings.Contains(text, "holds until") {
		t.Error("the page does not show the verdict")
	}
	if res, _ := h.submit(client, page, action, url.Values{"verdict": {"<b>"}}, nil); res.StatusCode != 422 {
		t.Errorf("a verdict that is none: %d", res.StatusCode)
	}
}

func TestVerdictByAPI(t *testing.T) {
	t.Parallel()
	h := two(t, Config{ClickHouse: store.Config{URL: awayURL}})
	post := func(id, word string) (*http.Response, string) {
		return h.ask(http.MethodPost, "/v1/alerts/"+id+"/verdict", "key_alpha_admin", strings.NewReader(fmt.Sprintf(`{"verdict":%q}`, word)),
			func(r *http.Request) { r.Header.Set("Content-Type", "application/json") })
	}
	res, text := post("alrt_alpha", "compromised")
	v := decode[Verdict](t, text)
	if res.StatusCode != 200 || v.AlertID != "alrt_alpha" || v.Verdict != "compromised" || v.Actor != "key_alpha_admin" || v.ExpiresAt != nil {
		t.Fatalf("%d %s", res.StatusCode, text)
	}
	_, text = h.get("/v1/alerts/alrt_alpha", "key_alpha_admin")
	if a := decode[Alert](t, text); a.Verdict == nil || a.Verdict.Verdict != "compromised" || len(a.Evidence) != 1 || a.SourceIP != "203.0.113.7" {
		t.Errorf("alert = %s", text)
	}
	for word, want := range map[string]int{"": 422, "yes": 422} {
		if res, text := post("alrt_alpha", word); res.StatusCode != want || !strings.HasPrefix(res.Header.Get("Content-Type"), "application/problem+json") {
			t.Errorf("verdict %q: %d %s", word, res.StatusCode, text)
		}
	}
	if res, _ := post("alrt_none", "expected"); res.StatusCode != 404 {
		t.Errorf("no such alert: %d", res.StatusCode)
	}
}

func TestLogin(t *testing.T) {
	t.Parallel()
	h := two(t, Config{Login: "always", ClickHouse: store.Config{URL: awayURL}})
	browser := h.browser()
	res, text := h.submit(browser, "/login", "/login", url.Values{"key": {"lk_live_wrong"}}, nil)
	if res.StatusCode != 401 || !strings.Contains(text, "malformed, unknown") {
		t.Errorf("a wrong key: %d", res.StatusCode)
	}
	res, _ = h.submit(browser, "/login", "/login", url.Values{"key": {h.secrets["key_alpha_admin"]}, "next": {"//evil.example/x"}}, nil)
	if res.StatusCode != 303 || res.Header.Get("Location") != "/" {
		t.Fatalf("login: %d to %q", res.StatusCode, res.Header.Get("Location"))
	}
	c := res.Cookies()[0]
	if c.Name != sessionCookie || !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || strings.Contains(c.Value, "lk_") {
		t.Errorf("cookie = %v", c)
	}
	page := func() (int, string) {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, h.server.URL+"/keys", nil)
		req.Header.Set("Accept", "text/html")
		res, text := h.do(browser, req)
		return res.StatusCode, text
	}
	status, text := page()
	if status != 200 || !strings.Contains(text, "alpha-worker") || strings.Contains(text, "beta-worker") || !strings.Contains(text, "Alpha Inc") {
		t.Errorf("logged in: %d", status)
	}
	if res, _ := h.submit(browser, "/alerts/alrt_alpha", "/alerts/alrt_alpha/verdict", url.Values{"verdict": {"expected"}}, nil); res.StatusCode != 303 {
		t.Errorf("verdict in a session: %d", res.StatusCode)
	}
	// A key that is revoked ends its sessions.
	rec, _ := h.svc.keys.Get("key_alpha_admin")
	rec.Status = key.Revoked
	h.record(rec, key.RevokedEv)
	if status, _ := page(); status != 303 {
		t.Errorf("the session of a revoked key: %d", status)
	}
	rec.Status = key.Active
	h.record(rec, key.ResumedEv)
	if res, _ := h.submit(browser, "/keys", "/logout", url.Values{}, nil); res.StatusCode != 303 {
		t.Errorf("logout: %d", res.StatusCode)
	}
	if status, _ := page(); status != 303 {
		t.Errorf("after logout: %d", status)
	}
}

func TestHostileTextIsShownAsText(t *testing.T) {
	t.Parallel()
	h := two(t, Config{ClickHouse: store.Config{URL: awayURL}})
	const bad = `"><script>alert(1)</script><img src=x onerror=alert(1)>`
	h.org("org_bad", bad)
	h.key("org_bad", "key_bad", bad, func(r *key.Record) {
		r.Description, r.Owner, r.Tags, r.Metadata = bad, bad, []string{bad}, map[string]string{bad: bad}
	}, "orders:read")
	h.alert(alert.Alert{
		ID: "alrt_bad", OrgID: "org_bad", KeyID: "key_bad", Triggers: []string{bad}, Summary: bad + "\u202e\x1b[31m", UserAgent: bad, Route: bad, Method: bad,
		ASName: bad, ASN: 1, Country: bad, Severity: bad, Evidence: []alert.Evidence{{Trigger: bad, Observed: bad, Usual: bad}},
	})
	for _, path := range []string{"/", "/keys", "/keys/key_bad", "/alerts", "/alerts/alrt_bad", "/alerts/alrt_bad?said=" + url.QueryEscape(bad), "/audit", "/keys?q=" + url.QueryEscape(bad), "/audit?q=" + url.QueryEscape(bad), "/login?next=" + url.QueryEscape(bad), "/nowhere/" + url.PathEscape(bad)} {
		res, text := h.get(path, "")
		if strings.Contains(text, "<script>alert") || strings.Contains(text, "<img src=x") || strings.ContainsAny(text, "\u202e\x1b") {
			t.Errorf("%s holds the hostile text as it came", path)
		}
		if csp := res.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") || strings.Contains(csp, "unsafe") {
			t.Errorf("%s: policy %q", path, csp)
		}
		if strings.Contains(text, " style=") || strings.Contains(text, "<style") || strings.Contains(text, "http://") && strings.Contains(text, "src=\"http") {
			t.Errorf("%s has what its policy forbids", path)
		}
	}
}

func TestWithoutClickHouse(t *testing.T) {
	t.Parallel()
	h := two(t, Config{ClickHouse: store.Config{URL: awayURL}})
	for _, path := range []string{"/", "/keys", "/keys/key_alpha", "/alerts/alrt_alpha"} {
		res, text := h.get(path, "")
		if res.StatusCode != 200 || !strings.Contains(text, "ClickHouse does not answer") {
			t.Errorf("%s: %d, says so: %v", path, res.StatusCode, strings.Contains(text, "ClickHouse does not answer"))
		}
	}
	for _, path := range []string{"/v1/api-keys/key_alpha/activity", "/v1/api-keys/key_alpha/baseline"} {
		if res, text := h.get(path, "key_root"); res.StatusCode != 503 || !strings.HasPrefix(res.Header.Get("Content-Type"), "application/problem+json") {
			t.Errorf("%s: %d %s", path, res.StatusCode, text)
		}
	}
	if res, _ := h.get("/v1/alerts", "key_root"); res.StatusCode != 200 {
		t.Errorf("alerts need ClickHouse: %d", res.StatusCode)
	}
}

func TestAlertsArePagedAndFiltered(t *testing.T) {
	t.Parallel()
	h := two(t, Config{ClickHouse: store.Config{URL: awayURL}})
	start := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for i := range 25 {
		trigger := alert.VolumeSpike
		if i%5 == 0 {
			trigger = alert.DormantKey
		}
		h.alert(alert.Alert{ID: fmt.Sprintf("alrt_%02d", i), OrgID: "org_alpha", KeyID: "key_alpha", Triggers: []string{trigger}, Time: start.Add(time.Duration(i/2) * time.Hour), Historical: i == 3})
	}
	seen := map[string]bool{}
	cursor, pages := "", 0
	for {
		_, text := h.get("/v1/alerts?key_id=key_alpha&limit=7&cursor="+cursor, "key_root")
		page := decode[struct {
			Alerts     []Alert
			NextCursor string `json:"next_cursor"`
		}](t, text)
		for _, a := range page.Alerts {
			if seen[a.ID] {
				t.Fatalf("%s came twice", a.ID)
			}
			seen[a.ID] = true
		}
		pages++
		if cursor = page.NextCursor; cursor == "" {
			break
		}
	}
	if len(seen) != 26 || pages != 4 {
		t.Errorf("%d alerts on %d pages, want 26 on 4", len(seen), pages)
	}
	count := func(query string) int {
		_, text := h.get("/v1/alerts?"+query, "key_root")
		return len(decode[struct{ Alerts []Alert }](t, text).Alerts)
	}
	if n := count("trigger=dormant_key"); n != 5 {
		t.Errorf("trigger: %d", n)
	}
	if n := count("key_id=key_alpha&since=" + start.Add(11*time.Hour).Format(time.RFC3339)); n != 4 {
		t.Errorf("since: %d", n)
	}
	if res, _ := h.get("/v1/alerts?cursor=nonsense", "key_root"); res.StatusCode != 422 {
		t.Errorf("a bad cursor: %d", res.StatusCode)
	}
	grown := alert.Alert{ID: "alrt_07", OrgID: "org_alpha", KeyID: "key_alpha", Triggers: []string{alert.VolumeSpike, alert.NewIPRange}, Time: start.Add(90 * time.Hour), Revision: 2, Severity: alert.Critical}
	h.alert(grown)
	e, _ := h.svc.alerts.get("alrt_07")
	if len(e.Revisions) != 2 || e.Severity != alert.Critical || !e.Time.Equal(start.Add(3*time.Hour)) {
		t.Errorf("episode = %+v", e)
	}
	if _, text := h.get("/alerts/alrt_07", ""); !strings.Contains(text, "Grew to") || !strings.Contains(text, "Raised as") {
		t.Error("the page does not tell how it unfolded")
	}
}

func TestWhatBecameOfTheMail(t *testing.T) {
	t.Parallel()
	h := two(t, Config{ClickHouse: store.Config{URL: awayURL}})
	kv, err := h.js.KeyValue(t.Context(), bus.Deliveries)
	if err != nil {
		t.Fatal(err)
	}
	data, _ := json.Marshal(delivery.Delivery{ID: "alrt_alpha", Kind: delivery.Alert, To: "ada@acme.example", State: delivery.Refused, Answer: "550 nobody <b>", CreatedAt: time.Now()})
	if _, err := kv.Put(t.Context(), delivery.Key(delivery.Alert, "alrt_alpha"), data); err != nil {
		t.Fatal(err)
	}
	if _, text := h.get("/alerts/alrt_alpha", ""); !strings.Contains(text, "refused") || !strings.Contains(text, "550 nobody &lt;b&gt;") {
		t.Error("the page does not say that the mail server refused")
	}
}

func TestUseFromClickHouse(t *testing.T) {
	t.Parallel()
	h, db := withClickHouse(t)
	h.org("org_alpha", "Alpha Inc")
	h.key("org_alpha", "key_alpha", "alpha-worker", nil, "orders:read")
	h.key("org_alpha", "key_idle", "alpha-idle", func(r *key.Record) { r.CreatedAt = time.Now().AddDate(-1, 0, 0) }, "orders:read")
	h.key("org_alpha", "key_old", "alpha-old", func(r *key.Record) { r.CreatedAt = time.Now().AddDate(-1, 0, 0) }, "orders:read")
	h.key(key.SystemOrg, "key_root", "root", nil, "full_access")
	now := time.Now().UTC()
	insert := func(org, id string, at time.Time, n int, decision string) {
		err := db.Conn.Exec(t.Context(), fmt.Sprintf(`INSERT INTO usage_events (id, time, org_id, key_id, source_ip, method, route, status, decision, deny_reason, user_agent)
			SELECT concat('%s-', toString(number), '-%d'), toDateTime64('%s', 9, 'UTC'), '%s', '%s', toIPv6('203.0.113.7'), 'GET', '/v1/orders', 200, '%s', '', 'curl/8' FROM numbers(%d)`,
			id, at.UnixNano(), at.Format("2006-01-02 15:04:05.000"), org, id, decision, n))
		if err != nil {
			t.Fatal(err)
		}
	}
	insert("org_alpha", "key_alpha", now.Add(-5*time.Second), 40, "allow")
	insert("org_alpha", "key_alpha", now.Add(-5*time.Second), 2, "deny")
	insert("org_alpha", "key_alpha", now.AddDate(0, 0, -3), 10, "allow")
	insert("org_alpha", "key_old", now.AddDate(0, 0, -80), 3, "allow")
	insert("aws:1", "AKIA.1", now.Add(-time.Hour), 7, "allow")
	err := db.Conn.Exec(t.Context(), `INSERT INTO key_baselines_data (key_id, org_id, updated_at, first_seen, last_seen, events, maturity, networks, asns, countries, routes, hour_of_week, events_per_hour, gap_seconds_median, gap_seconds_max, version)
		SELECT 'key_alpha', 'org_alpha', now(), now() - 86400, now(), 52, 0.9, [('203.0.113.0/24', 0.99)], [('AS64500 Example', 1)], [('NL', 1)], [('GET /v1/orders', 1)], range(168), 2.5, 60, 3600, 1`)
	if err != nil {
		t.Fatal(err)
	}

	_, text := h.get("/keys", "")
	for _, want := range []string{"alpha-worker", "dormant", "never used", "rotation overdue", "AKIA.1", "not managed here", "<svg class=\"spark\""} {
		if !strings.Contains(text, want) {
			t.Errorf("/keys does not show %q", want)
		}
	}
	for state, want := range map[string]string{"dormant": "alpha-old", "unused": "alpha-idle", "unmanaged": "AKIA.1"} {
		if _, text := h.get("/keys?state="+state, ""); !strings.Contains(text, want) || strings.Contains(text, "alpha-worker") {
			t.Errorf("filter %s does not work", state)
		}
	}
	_, text = h.get("/keys/key_alpha", "")
	for _, want := range []string{"52 in all", "203.0.113.0/24", "AS64500 Example", "class=\"chart heat\"", "90 % settled", "curl/8"} {
		if !strings.Contains(text, want) {
			t.Errorf("/keys/key_alpha does not show %q", want)
		}
	}
	if res, text := h.get("/keys/AKIA.1", ""); res.StatusCode != 200 || !strings.Contains(text, "aws:1") {
		t.Errorf("a key that is managed elsewhere: %d", res.StatusCode)
	}
	if res, text := h.get("/", ""); res.StatusCode != 200 || strings.Contains(text, "does not answer") || !strings.Contains(text, "0.7<") {
		t.Errorf("overview: %d", res.StatusCode)
	}

	_, text = h.get("/v1/api-keys/key_alpha/activity", "key_root")
	activity := decode[struct{ Activity []Activity }](t, text).Activity
	var events, denied uint64
	for _, a := range activity {
		events, denied = events+a.Events, denied+a.Denied
	}
	if len(activity) != 31 || events != 52 || denied != 2 {
		t.Errorf("activity: %d days, %d events, %d denied", len(activity), events, denied)
	}
	_, text = h.get("/v1/api-keys/key_alpha/activity?interval=hour&from="+now.Add(-3*time.Hour).Format(time.RFC3339), "key_root")
	if hours := decode[struct{ Activity []Activity }](t, text).Activity; len(hours) != 4 || hours[3].Events+hours[2].Events != 42 {
		t.Errorf("hours: %+v", hours)
	}
	if res, _ := h.get("/v1/api-keys/key_alpha/activity?from=2020-01-01T00:00:00Z&interval=hour", "key_root"); res.StatusCode != 422 {
		t.Errorf("too long an interval: %d", res.StatusCode)
	}
	_, text = h.get("/v1/api-keys/key_alpha/baseline", "key_root")
	if !strings.Contains(text, `"value":"203.0.113.0/24"`) {
		t.Errorf("baseline = %s", text)
	}
	for path, want := range map[string]int{"/v1/api-keys/key_idle/baseline": 404, "/v1/api-keys/AKIA.1/activity": 200, "/v1/api-keys/none/activity": 404} {
		if res, _ := h.get(path, "key_root"); res.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, res.StatusCode, want)
		}
	}
}

func TestSafeNext(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"": "/", "/keys": "/keys", "/keys?q=a%20b": "/keys?q=a%20b", "https://evil.example": "/", "//evil.example": "/", "/\\evil.example": "/", "javascript:alert(1)": "/", "keys": "/", "///evil": "/",
	} {
		if got := safeNext(in); got != want {
			t.Errorf("safeNext(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestPassOn(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]bool{
		"/v1/orgs": true, "/v1/api-keys": true, "/v1/api-keys/key_1": true, "/v1/api-keys/key_1/rotate": true, "/v1/webhooks/wh_1": true, "/v1/audit": true,
		"/v1/api-keys/key_1/activity": false, "/v1/api-keys/key_1/baseline": false, "/v1/alerts": false, "/keys": false, "/": false, "/v1/orgsx": false,
	} {
		if got := passOn(path); got != want {
			t.Errorf("passOn(%q) = %v", path, got)
		}
	}
}

func FuzzCharts(f *testing.F) {
	f.Add(uint64(1), uint64(0), "label", int64(0))
	f.Fuzz(func(t *testing.T, events, denied uint64, label string, at int64) {
		bins := []bin{{time.Unix(0, 0), events, denied}, {time.Unix(3600, 0), denied, events}}
		for _, svg := range []string{
			string(sparkline(bins, label)), string(columns(bins, time.Hour, []mark{{time.Unix(at, 0), label, label}}, label)),
			string(weekHeat(make([]float64, 168), label)), string(stacks([]stackBin{{High: int(events % 1000)}}, label)),
		} {
			if strings.Contains(svg, "NaN") || strings.Contains(svg, "Inf") || strings.Count(svg, "<svg") > 1 {
				t.Fatalf("chart %q", svg)
			}
		}
	})
}

func FuzzCursor(f *testing.F) {
	f.Add("MjAyNi0xMS0yMVQxNzo0MTowMloK")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := readCursor(s)
		if err == nil && s != "" && p.ID == "" {
			t.Fatal("a cursor without an id")
		}
		_ = safeNext(s)
		_ = shown(s)
	})
}
