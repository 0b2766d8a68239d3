package notifier

import (
	"flag"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
)

var update = flag.Bool("update", false, "write the golden files")

func testRenderer(t testing.TB) *renderer {
	t.Helper()
	m, err := newMailer(Config{SMTPURL: "smtp://127.0.0.1:25", MailFrom: "Latchkey <alerts@latchkey.example>"})
	if err != nil {
		t.Fatal(err)
	}
	zone, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	return &renderer{consoleURL: "https://latchkey.acme.example", zone: zone, mailer: m}
}

var (
	testTime    = time.Date(2026, 11, 21, 17, 41, 2, 0, time.UTC)
	testCreated = testTime.Add(3 * time.Second)
	testOrg     = &key.Org{ID: "org_acme", Name: "Acme GmbH", OwnerEmail: "ada@acme.example"}
)

func testRecord() *key.Record {
	return &key.Record{
		ID: "key_01JD9Z3N5W", OrgID: "org_acme", Name: "billing-sync", Prefix: "lk_live_ab12", Scopes: []string{"invoices:read", "invoices:write"},
		Status: key.Active, CreatedAt: testTime.AddDate(0, -2, 0),
	}
}

func testAlert() *alert.Alert {
	return &alert.Alert{
		ID: "alrt_7f3a9c21", Time: testTime, DetectedAt: testTime.Add(time.Second), OrgID: "org_acme", KeyID: "key_01JD9Z3N5W",
		Triggers: []string{alert.NewIPRange, alert.EndpointMix}, Severity: alert.High, Score: 9.1, Revision: 1,
		Summary:  "The key was used from KPN in the Netherlands, a country that it never used in 41 201 requests over 62 days, and called endpoints that it hardly ever calls.",
		SourceIP: netip.MustParseAddr("203.0.113.7"), Country: "NL", ASN: 1136, ASName: "KPN B.V.", UserAgent: "python-requests/2.32.3",
		Method: "GET", Route: "/v1/customers/{id}", EventID: "evt_1",
		Evidence: []alert.Evidence{
			{Trigger: alert.NewIPRange, Observed: "203.0.113.0/24, NL, AS1136", Usual: "198.51.100.0/24, DE, AS3320 (99.8 % of 41 201 requests)", PValue: 1.2e-6},
			{Trigger: alert.EndpointMix, Observed: "GET /v1/customers/{id}: 12 of 14 requests", Usual: "POST /v1/invoices (97 %), GET /v1/invoices/{id} (3 %)", PValue: 0.0003},
		},
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs from the golden file; look at it, then run go test ./notifier -update", name)
	}
}

func TestGoldenMails(t *testing.T) {
	t.Parallel()
	r := testRenderer(t)
	revoked := testRecord()
	revoked.Status = key.Revoked
	revokedAt := testTime.Add(-time.Hour)
	revoked.RevokedAt = &revokedAt
	unmanaged := testAlert()
	unmanaged.OrgID, unmanaged.KeyID, unmanaged.Triggers = "123456789012", "AKIAIOSFODNN7EXAMPLE", []string{alert.DormantKey}
	unmanaged.Evidence = []alert.Evidence{{Trigger: alert.DormantKey, Observed: "first request after 143 days", Usual: "a request every 2 hours, never more than 3 days apart", PValue: 1e-12}}
	expires := testTime.AddDate(0, 0, 14)
	tests := []struct {
		name   string
		letter func() (*letter, error)
	}{
		{"alert", func() (*letter, error) {
			return r.alertLetter(testAlert(), testOrg, testRecord(), "ada@acme.example", testCreated)
		}},
		{"alert-revoked", func() (*letter, error) {
			return r.alertLetter(testAlert(), testOrg, revoked, "ada@acme.example", testCreated)
		}},
		{"alert-unmanaged", func() (*letter, error) {
			return r.alertLetter(unmanaged, nil, nil, "security@acme.example", testCreated)
		}},
		{"notice-expiring", func() (*letter, error) {
			n := &key.Notice{ID: "ntc_1", Type: key.Expiring, Time: testTime, OrgID: "org_acme", KeyID: "key_01JD9Z3N5W", Data: key.Data{Name: "billing-sync", Prefix: "lk_live_ab12", Status: key.Active, ExpiresAt: &expires}}
			rec := testRecord()
			rec.ExpiresAt = &expires
			return r.noticeLetter(n, testOrg, rec, "ada@acme.example", testCreated)
		}},
		{"digest", func() (*letter, error) {
			return r.digestLetter(&digest{ID: "digest_x_1", Sent: 100, More: 3, Lines: []heldLine{
				{"alrt_1", testTime, "High: billing-sync (lk_live_ab12…), used from a new network"},
				{"alrt_2", testTime.Add(time.Minute), "Medium: crm (lk_live_cd34…), far more requests than usual"},
			}}, "ada@acme.example", testCreated)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l, err := tt.letter()
			if err != nil {
				t.Fatal(err)
			}
			golden(t, tt.name+".txt", "Subject: "+l.Subject+"\n\n"+l.Text)
			golden(t, tt.name+".html", l.HTML)
			for line := range strings.Lines(l.Text) {
				if n := len([]rune(strings.TrimRight(line, "\n"))); n > 78 && !strings.Contains(line, "http") {
					t.Errorf("a line of %d characters: %q", n, line)
				}
			}
			if strings.Contains(l.HTML, "<img") || strings.Contains(l.HTML, "url(") || strings.Contains(l.HTML, "@import") {
				t.Error("the HTML loads something")
			}
			if len(l.HTML) > 90<<10 {
				t.Errorf("%d bytes of HTML; Gmail cuts at 102 kB", len(l.HTML))
			}
		})
	}
}

func TestHostileFieldsAreHarmless(t *testing.T) {
	t.Parallel()
	r := testRenderer(t)
	a := testAlert()
	a.UserAgent = "<script>alert(1)</script>\r\nBcc: evil@evil.example\x1b[31m \u202Egnp.exe https://evil.example/login www.evil.com"
	a.Route = "/v1/\"><img src=x onerror=alert(1)>\r\n\r\n."
	a.Summary = "see http://evil.example/\x00"
	a.Evidence[0].Observed = "{{.Key}} <a href='https://evil.example'>verify</a>"
	rec := testRecord()
	rec.Name = "name\r\nBcc: evil@evil.example"
	l, err := r.alertLetter(a, testOrg, rec, "ada@acme.example", testCreated)
	if err != nil {
		t.Fatal(err)
	}
	checkHarmless(t, r, l)
	for _, bad := range []string{"<script>", "<img", "<a href='https://evil", "href=\"https://evil", "https://evil", "evil.example", "evil@evil"} {
		if strings.Contains(l.HTML, bad) || strings.Contains(l.Text, "https://evil") {
			t.Errorf("the mail holds %q", bad)
		}
	}
}

// checkHarmless holds for every mail, whatever came with the event.
func checkHarmless(t *testing.T, r *renderer, l *letter) {
	t.Helper()
	for _, s := range []string{l.Text, l.HTML, l.Subject} {
		for _, c := range s {
			if c != '\n' && (unicode.IsControl(c) || c == '\u202E' || c == '\u2066') {
				t.Fatalf("control character %U", c)
			}
		}
	}
	if strings.ContainsAny(l.Subject, "\r\n") {
		t.Fatalf("subject %q", l.Subject)
	}
	msg, err := r.mailer.message(l)
	if err != nil {
		t.Fatal(err)
	}
	var raw strings.Builder
	if _, err := msg.WriteTo(&raw); err != nil {
		t.Fatal(err)
	}
	head, _, ok := strings.Cut(raw.String(), "\r\n\r\n")
	if !ok {
		t.Fatal("no header")
	}
	for line := range strings.SplitSeq(head, "\r\n") {
		if strings.ContainsAny(line, "\r\n\x00") {
			t.Fatalf("header line %q", line)
		}
		name, _, found := strings.Cut(line, ":")
		if strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t") {
			continue
		}
		if !found || strings.EqualFold(name, "bcc") || strings.EqualFold(name, "cc") {
			t.Fatalf("header line %q", line)
		}
	}
}

func TestARepeatedAttemptIsTheSameMail(t *testing.T) {
	t.Parallel()
	r := testRenderer(t)
	var first string
	for range 3 {
		l, err := r.alertLetter(testAlert(), testOrg, testRecord(), "ada@acme.example", testCreated)
		if err != nil {
			t.Fatal(err)
		}
		msg, err := r.mailer.message(l)
		if err != nil {
			t.Fatal(err)
		}
		var raw strings.Builder
		if _, err := msg.WriteTo(&raw); err != nil {
			t.Fatal(err)
		}
		if first == "" {
			first = raw.String()
		} else if raw.String() != first {
			t.Fatal("two attempts differ")
		}
	}
	if !strings.Contains(first, "Message-ID: <alrt_7f3a9c21@latchkey.example>") {
		t.Error("the Message-ID does not follow from the alert")
	}
}

func FuzzAlertLetter(f *testing.F) {
	f.Add("python-requests/2.32", "GET", "/v1/x", "summary", "name", "observed", "alrt_1", "NL", 0.5)
	f.Add("\r\nBcc: a@b.c", "\x00", "{{.}}", "<b>", "\u202e", "https://a.bc", "a\r\nb", "\xff\xfe", math.Inf(1))
	r := testRenderer(f)
	f.Fuzz(func(t *testing.T, agent, method, route, summary, name, observed, id, country string, p float64) {
		a := testAlert()
		a.UserAgent, a.Method, a.Route, a.Summary, a.ID, a.Country, a.ASName = agent, method, route, summary, id, country, name
		a.Evidence = []alert.Evidence{{Trigger: method, Observed: observed, Usual: agent, PValue: p}}
		a.Triggers, a.Severity = []string{method}, route
		rec := testRecord()
		rec.Name, rec.Prefix = name, id
		l, err := r.alertLetter(a, testOrg, rec, "ada@acme.example", testCreated)
		if err != nil {
			t.Fatal(err)
		}
		checkHarmless(t, r, l)
	})
}
