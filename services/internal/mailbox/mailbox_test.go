package mailbox

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/smtp"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/latchkey-dev/latchkey/services/internal/run"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs a mailbox and returns it with a function that stops it and waits.
func start(t *testing.T, cfg Config) (*Mailbox, func()) {
	t.Helper()
	m, err := New(t.Context(), cfg, run.Deps{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return m, stop
}

func send(t *testing.T, m *Mailbox, to, raw string) error {
	t.Helper()
	return smtp.SendMail(m.Addr().String(), nil, "alerts@example.com", []string{to}, []byte(strings.ReplaceAll(raw, "\n", "\r\n")))
}

func alternative(id, subject, text, html string) string {
	return fmt.Sprintf(`From: Latchkey <alerts@example.com>
To: Ada <ada@example.com>
Subject: %s
Date: Sat, 21 Nov 2026 17:41:02 +0000
Message-ID: <%s@latchkey>
MIME-Version: 1.0
Content-Type: multipart/alternative; boundary=xx

--xx
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: quoted-printable

%s
--xx
Content-Type: text/html; charset=utf-8

%s
--xx--
`, subject, id, text, html)
}

func getJSON(t *testing.T, h http.Handler, path string) (total int, mails []Mail) {
	t.Helper()
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
	var out struct {
		Total int
		Mails []Mail
	}
	if err := json.Unmarshal(rec.Body.Bytes(), &out); err != nil {
		t.Fatalf("%s: %v in %s", path, err, rec.Body)
	}
	return out.Total, out.Mails
}

func TestMailIsStoredAndSurvivesARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	m, stop := start(t, Config{Dir: dir})
	if err := send(t, m, "ada@example.com", alternative("one", "=?utf-8?q?K=C3=A9y_stolen?=", "Gr=C3=BC=C3=9Fe, it=\n continues", "<html><head></head><p>Hello</p>")); err != nil {
		t.Fatal(err)
	}
	stop()

	// A half-written mail was never accepted.
	if err := os.WriteFile(filepath.Join(dir, "tmp", "half.eml"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	m, _ = start(t, Config{Dir: dir})
	total, mails := getJSON(t, m.Handler(nil), "/mailbox.json")
	if total != 1 {
		t.Fatalf("%d mails after the restart, want 1", total)
	}
	got := mails[0]
	if got.Subject != "Kéy stolen" || got.Text != "Grüße, it continues" || !strings.Contains(got.HTML, "<p>Hello</p>") {
		t.Errorf("mail = %+v", got)
	}
	if got.From != "Latchkey <alerts@example.com>" || got.To[0] != "Ada <ada@example.com>" {
		t.Errorf("from %q to %q", got.From, got.To)
	}
	if got.Date != time.Date(2026, 11, 21, 17, 41, 2, 0, time.UTC) {
		t.Errorf("date = %v", got.Date)
	}
	if got.Headers["Message-Id"][0] != "<one@latchkey>" || got.Headers["Delivered-To"][0] != "ada@example.com" {
		t.Errorf("headers = %v", got.Headers)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "tmp", "*")); len(left) != 0 {
		t.Errorf("left in tmp: %v", left)
	}
}

func TestACopyIsShownOnceAlsoAfterARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	m, stop := start(t, Config{Dir: dir})
	for range 2 {
		if err := send(t, m, "ada@example.com", alternative("same", "s", "t", "h")); err != nil {
			t.Fatal(err)
		}
	}
	if err := send(t, m, "bob@example.com", alternative("same", "s", "t", "h")); err != nil {
		t.Fatal(err)
	}
	list := m.List()
	if len(list) != 2 || list[1].Copies != 2 {
		t.Fatalf("list = %+v, want two mails, the first with two copies", list)
	}
	stop()
	m, _ = start(t, Config{Dir: dir})
	if err := send(t, m, "ada@example.com", alternative("same", "s", "t", "h")); err != nil {
		t.Fatal(err)
	}
	if n := len(m.List()); n != 2 {
		t.Fatalf("%d mails, want 2", n)
	}
}

func TestBounds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	m, _ := start(t, Config{Dir: dir, MaxMails: 3, MaxMessageBytes: 2000})
	for i := range 5 {
		if err := send(t, m, "a@example.com", alternative(fmt.Sprint(i), fmt.Sprint("mail ", i), "t", "h")); err != nil {
			t.Fatal(err)
		}
	}
	list := m.List()
	if len(list) != 3 || list[0].Subject != "mail 4" || list[2].Subject != "mail 2" {
		t.Fatalf("list = %+v, want the newest three", list)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "new", "*"))
	if len(files) != 3 {
		t.Errorf("%d files, want 3", len(files))
	}
	if err := send(t, m, "a@example.com", alternative("big", "big", strings.Repeat("x", 4000), "h")); err == nil || !strings.Contains(err.Error(), "552") {
		t.Errorf("a mail over the limit: %v, want 552", err)
	}
}

func TestPagesContainAHostileMail(t *testing.T) {
	t.Parallel()
	m, _ := start(t, Config{Dir: t.TempDir()})
	const script = "<script>alert(1)</script>"
	if err := send(t, m, "a@example.com", alternative("x", script, script, script)); err != nil {
		t.Fatal(err)
	}
	id := m.List()[0].ID
	h := m.Handler(nil)
	for _, path := range []string{"/mailbox", "/mailbox/" + id, "/mailbox/" + id + "?view=text", "/mailbox/" + id + "?view=headers"} {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		if rec.Code != 200 || strings.Contains(rec.Body.String(), script) {
			t.Errorf("%s: %d, holds the script: %v", path, rec.Code, strings.Contains(rec.Body.String(), script))
		}
		if !strings.Contains(rec.Header().Get("Content-Security-Policy"), "default-src 'none'") {
			t.Errorf("%s has no policy", path)
		}
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/mailbox/"+id+"/html", nil))
	if csp := rec.Header().Get("Content-Security-Policy"); !strings.Contains(csp, "sandbox") || strings.Contains(csp, "allow-scripts") {
		t.Errorf("the mail's own HTML is not contained: %q", csp)
	}
	for _, path := range []string{"/mailbox/../../etc/passwd", "/mailbox/%2e%2e%2fx/raw", "/mailbox/0000000000000000-000000000000"} {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		if rec.Code == 200 {
			t.Errorf("%s: %d", path, rec.Code)
		}
	}
}

func TestEnvelopeCannotInjectHeaders(t *testing.T) {
	t.Parallel()
	m, _ := start(t, Config{Dir: t.TempDir()})
	conn, err := net.Dial("tcp", m.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "EHLO evil\tBcc:x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n")
	fmt.Fprintf(conn, "Subject: x\r\n\r\nbody\r\n.\r\nQUIT\r\n")
	if _, err := io.ReadAll(conn); err != nil {
		t.Fatal(err)
	}
	list := m.List()
	if len(list) != 1 {
		t.Fatalf("%d mails are stored, want the one that was sent", len(list))
	}
	mail, err := m.Get(list[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := mail.Headers["Bcc"]; ok {
		t.Errorf("headers = %v", mail.Headers)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(alternative("a", "s", "t", "<p>h")))
	f.Add([]byte("Content-Type: text/plain; charset=nonsense\r\n\r\nx"))
	f.Add([]byte("\x00\xff"))
	f.Add([]byte("Content-Type: multipart/mixed; boundary=a\r\n\r\n--a\r\n\r\n--a"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		id := newID(time.Now())
		m := parse(id, raw)
		if m.ID != id || m.Size != int64(len(raw)) {
			t.Fatalf("mail = %+v", m.Summary)
		}
		if _, err := json.Marshal(m); err != nil {
			t.Fatal(err)
		}
	})
}
