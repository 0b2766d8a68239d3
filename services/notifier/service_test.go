package notifier

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-smtp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
	"github.com/latchkey-dev/latchkey/services/internal/mailbox"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// smtpServer is a real SMTP server that a test can make fail.
type testSMTP struct {
	addr string
	// data decides about the n-th mail (from 1): nil accepts it.
	data func(n int, conn *smtp.Conn) error
	rcpt func(to string) error

	mu    sync.Mutex
	tried int
	mails []string // accepted, or taken and not answered
}

func (s *testSMTP) taken() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.mails)
}

func startSMTP(t *testing.T, s *testSMTP) *testSMTP {
	t.Helper()
	server := smtp.NewServer(smtp.BackendFunc(func(c *smtp.Conn) (smtp.Session, error) { return &testSession{s, c}, nil }))
	server.Domain = "mx.test"
	server.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	s.addr = listener.Addr().String()
	return s
}

type testSession struct {
	server *testSMTP
	conn   *smtp.Conn
}

func (s *testSession) Reset()                               {}
func (s *testSession) Logout() error                        { return nil }
func (s *testSession) Mail(string, *smtp.MailOptions) error { return nil }
func (s *testSession) Rcpt(to string, _ *smtp.RcptOptions) error {
	if s.server.rcpt != nil {
		return s.server.rcpt(to)
	}
	return nil
}

func (s *testSession) Data(r io.Reader) error {
	raw, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	s.server.mu.Lock()
	s.server.tried++
	n := s.server.tried
	s.server.mu.Unlock()
	var failure error
	if s.server.data != nil {
		failure = s.server.data(n, s.conn)
	}
	var smtpErr *smtp.SMTPError
	if !errors.As(failure, &smtpErr) {
		s.server.mu.Lock()
		s.server.mails = append(s.server.mails, string(raw))
		s.server.mu.Unlock()
	}
	return failure
}

// house is a bus with an organization and a key.
type house struct {
	t  *testing.T
	nc *nats.Conn
	js jetstream.JetStream
}

func newHouse(t *testing.T) *house {
	t.Helper()
	nc, js := natstest.Bus(t, bus.Config{Replicas: 1, Partitions: 4})
	h := &house{t, nc, js}
	h.put(bus.Orgs, "org_acme", testOrg)
	rec := testRecord()
	h.publish(bus.KeySubject(rec.ID), key.Change{ID: "evt_k", Type: key.Created, Time: testTime, Actor: "system", Record: *rec})
	return h
}

func (h *house) put(bucket, k string, v any) {
	h.t.Helper()
	kv, err := h.js.KeyValue(h.t.Context(), bucket)
	if err != nil {
		h.t.Fatal(err)
	}
	data, err := json.Marshal(v)
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := kv.Put(h.t.Context(), k, data); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) publish(subject string, v any) {
	h.t.Helper()
	data, ok := v.([]byte)
	if !ok {
		var err error
		if data, err = json.Marshal(v); err != nil {
			h.t.Fatal(err)
		}
	}
	if _, err := h.js.Publish(h.t.Context(), subject, data); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) alert(a *alert.Alert) {
	h.t.Helper()
	h.publish(bus.AlertSubject(a.OrgID, a.KeyID), a)
}

// start runs a notifier; the returned function stops it and waits.
func (h *house) start(cfg Config) (*Service, func()) {
	h.t.Helper()
	if cfg.RetryMin == 0 {
		cfg.RetryMin, cfg.RetryMax = 10*time.Millisecond, 50*time.Millisecond
	}
	cfg.MailFrom = "Latchkey <alerts@latchkey.example>"
	s, err := New(h.t.Context(), cfg, run.Deps{NATS: h.nc, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("Run: %v", err)
		}
	})
	h.t.Cleanup(stop)
	return s, stop
}

// delivery waits until the delivery is in one of the states.
func (h *house) delivery(bucketKey string, states ...string) *delivery.Delivery {
	h.t.Helper()
	kv, err := h.js.KeyValue(h.t.Context(), bus.Deliveries)
	if err != nil {
		h.t.Fatal(err)
	}
	watcher, err := kv.Watch(h.t.Context(), bucketKey)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = watcher.Stop() }()
	var d delivery.Delivery
	late := time.After(time.Minute)
	for {
		select {
		case entry := <-watcher.Updates():
			if entry == nil {
				continue
			}
			d = delivery.Delivery{}
			if err := json.Unmarshal(entry.Value(), &d); err != nil {
				h.t.Fatal(err)
			}
			if slices.Contains(states, d.State) {
				return &d
			}
		case <-late:
			h.t.Fatalf("%s is not %v but %+v", bucketKey, states, d)
		}
	}
}

func numbered(n int) *alert.Alert {
	a := testAlert()
	a.ID = fmt.Sprintf("alrt_%d", n)
	return a
}

func startMailbox(t *testing.T) *mailbox.Mailbox {
	t.Helper()
	m, err := mailbox.New(t.Context(), mailbox.Config{Dir: t.TempDir()}, run.Deps{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return m
}

func TestOneAlertOneMail(t *testing.T) {
	t.Parallel()
	h, box := newHouse(t), startMailbox(t)
	cfg := Config{SMTPURL: box.SMTPURL(), ConsoleURL: "https://latchkey.acme.example"}
	_, stop := h.start(cfg)

	historical := numbered(1)
	historical.Historical = true
	grown := numbered(2)
	grown.Revision, grown.Severity = 2, alert.Critical
	h.alert(historical)
	for range 3 {
		h.alert(numbered(2)) // redelivered
	}
	h.alert(grown)
	h.alert(numbered(3)) // comes after all that
	h.delivery("alert.alrt_2", delivery.Sent)
	h.delivery("alert.alrt_3", delivery.Sent)
	stop()

	_, stop = h.start(cfg) // what a restart sees again
	h.alert(numbered(2))
	h.alert(numbered(4))
	h.delivery("alert.alrt_4", delivery.Sent)
	stop()

	var ids []string
	for _, s := range box.List() {
		m, err := box.Get(s.ID)
		if err != nil {
			t.Fatal(err)
		}
		if m.Copies != 1 {
			t.Errorf("%s came %d times", m.Subject, m.Copies)
		}
		ids = append(ids, m.Headers["X-Latchkey-Alert-Id"][0])
		if m.To[0] != "ada@acme.example" || !strings.Contains(m.Text, "203.0.113.7") || !strings.Contains(m.HTML, "billing-sync") {
			t.Errorf("mail = %+v", m)
		}
	}
	slices.Sort(ids)
	if want := []string{"alrt_2", "alrt_3", "alrt_4"}; !slices.Equal(ids, want) {
		t.Errorf("mails about %v, want %v", ids, want)
	}
}

func TestAMailServerThatFails(t *testing.T) {
	t.Parallel()
	busy := &smtp.SMTPError{Code: 451, EnhancedCode: smtp.EnhancedCode{4, 3, 0}, Message: "Busy, come again"}
	no := &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 1, 1}, Message: "Nobody of that name"}
	tests := []struct {
		name            string
		data            func(n int, conn *smtp.Conn) error
		rcpt            func(string) error
		state           string
		attempts, mails int
		answer          string
	}{
		{
			name: "temporary", state: delivery.Sent, attempts: 3, mails: 1,
			data: func(n int, _ *smtp.Conn) error {
				if n < 3 {
					return busy
				}
				return nil
			},
		},
		{name: "permanent after DATA", state: delivery.Refused, attempts: 1, answer: "Nobody of that name", data: func(int, *smtp.Conn) error { return no }},
		{name: "permanent recipient", state: delivery.Refused, attempts: 1, answer: "Nobody of that name", rcpt: func(string) error { return no }},
		{
			name: "reply lost after DATA", state: delivery.Sent, attempts: 2, mails: 2,
			data: func(n int, conn *smtp.Conn) error {
				if n == 1 {
					_ = conn.Conn().Close()
				}
				return nil
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h, server := newHouse(t), startSMTP(t, &testSMTP{data: tt.data, rcpt: tt.rcpt})
			h.start(Config{SMTPURL: "smtp://" + server.addr})
			h.alert(numbered(1))
			d := h.delivery("alert.alrt_1", delivery.Sent, delivery.Refused, delivery.Abandoned)
			if d.State != tt.state || d.Attempts != tt.attempts || !strings.Contains(d.Answer, tt.answer) || d.Payload != nil {
				t.Errorf("delivery = %+v", d)
			}
			mails := server.taken()
			if len(mails) != tt.mails {
				t.Fatalf("%d mails, want %d", len(mails), tt.mails)
			}
			for _, m := range mails {
				if m != mails[0] {
					t.Error("the repeated mail is not the same")
				}
			}
		})
	}
}

func TestAMailServerThatIsAway(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := listener.Addr().String()
	_ = listener.Close()
	_, stop := h.start(Config{SMTPURL: "smtp://" + addr})
	h.alert(numbered(1))
	kv, err := h.js.KeyValue(t.Context(), bus.Deliveries)
	if err != nil {
		t.Fatal(err)
	}
	watcher, err := kv.Watch(t.Context(), "alert.alrt_1")
	if err != nil {
		t.Fatal(err)
	}
	for entry := range watcher.Updates() {
		var d delivery.Delivery
		if entry != nil && json.Unmarshal(entry.Value(), &d) == nil && d.Attempts >= 2 && d.Answer != "" {
			break
		}
	}
	stop()
	h.start(Config{SMTPURL: startMailbox(t).SMTPURL()})
	if d := h.delivery("alert.alrt_1", delivery.Sent); d.Attempts < 3 {
		t.Errorf("delivery = %+v", d)
	}
	abandoned := &delivery.Delivery{
		ID: "old", Kind: delivery.Digest, To: "a@b.example", State: delivery.Pending, Payload: json.RawMessage(`{"id":1}`),
		CreatedAt: time.Now().Add(-100 * time.Hour),
	}
	h.put(bus.Deliveries, "digest.old", abandoned)
	h.delivery("digest.old", delivery.Abandoned)
}

func TestACrashAfterTheServerTookTheMail(t *testing.T) {
	t.Parallel()
	h, box := newHouse(t), startMailbox(t)
	s, stop := h.start(Config{SMTPURL: box.SMTPURL()})
	h.alert(numbered(1))
	sent := h.delivery("alert.alrt_1", delivery.Sent)
	stop()
	// As a kill -9 between the server's answer and its record leaves it: claimed,
	// the lease over.
	data, err := json.Marshal(numbered(1))
	if err != nil {
		t.Fatal(err)
	}
	sent.State, sent.SentAt, sent.Payload, sent.LeaseUntil = delivery.Pending, nil, data, time.Now().Add(-time.Second)
	h.put(bus.Deliveries, "alert.alrt_1", sent)
	h.start(s.cfg)
	h.delivery("alert.alrt_1", delivery.Sent)
	if list := box.List(); len(list) != 1 {
		t.Fatalf("the owner sees %d mails", len(list))
	}
}

func TestUnknownOrganization(t *testing.T) {
	t.Parallel()
	for _, fallback := range []string{"", "security@acme.example"} {
		h, box := newHouse(t), startMailbox(t)
		h.start(Config{SMTPURL: box.SMTPURL(), FallbackEmail: fallback})
		a := numbered(1)
		a.OrgID, a.KeyID = "aws:123", "AKIA.1"
		h.alert(a)
		d := h.delivery("alert.alrt_1", delivery.Sent, delivery.Unaddressed)
		if fallback == "" && (d.State != delivery.Unaddressed || len(box.List()) != 0) {
			t.Errorf("delivery = %+v", d)
		}
		if fallback != "" && (d.State != delivery.Sent || box.List()[0].To[0] != fallback) {
			t.Errorf("delivery = %+v", d)
		}
	}
}

// An event says whose key it is: naming another's key must not show its record.
func TestTheMailShowsNoStrangersKey(t *testing.T) {
	t.Parallel()
	h, box := newHouse(t), startMailbox(t)
	h.put(bus.Orgs, "org_evil", &key.Org{ID: "org_evil", Name: "Evil", OwnerEmail: "eve@evil.example"})
	h.start(Config{SMTPURL: box.SMTPURL()})
	a := numbered(1)
	a.OrgID = "org_evil"
	h.alert(a)
	h.delivery("alert.alrt_1", delivery.Sent)
	m, err := box.Get(box.List()[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	if all := m.Text + m.HTML + m.Subject; strings.Contains(all, "billing-sync") || strings.Contains(all, "lk_live") {
		t.Errorf("the mail to another organization names the key: %s", m.Subject)
	}
}

func TestAStormEndsInADigest(t *testing.T) {
	t.Parallel()
	h, box := newHouse(t), startMailbox(t)
	h.start(Config{SMTPURL: box.SMTPURL(), MaxPerHour: 2})
	for n := range 6 {
		h.alert(numbered(n))
	}
	for n := range 6 {
		want := delivery.Held
		if n < 2 {
			want = delivery.Sent
		}
		h.delivery(fmt.Sprintf("alert.alrt_%d", n), want)
	}
	// The hour passes.
	kv, err := h.js.KeyValue(t.Context(), bus.Deliveries)
	if err != nil {
		t.Fatal(err)
	}
	entry, err := kv.Get(t.Context(), ownerKey("ada@acme.example"))
	if err != nil {
		t.Fatal(err)
	}
	var w window
	if err := json.Unmarshal(entry.Value(), &w); err != nil {
		t.Fatal(err)
	}
	if w.Sent != 2 || len(w.Held) != 4 {
		t.Fatalf("window = %+v", w)
	}
	w.End = time.Now().Add(-time.Second)
	h.put(bus.Deliveries, entry.Key(), w)
	h.delivery("digest.*", delivery.Sent)
	list := box.List()
	if len(list) != 3 || !strings.Contains(list[0].Subject, "4 more alerts") {
		t.Fatalf("mails = %+v", list)
	}
	digest, err := box.Get(list[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	for n := 2; n < 6; n++ {
		if !strings.Contains(digest.Text, fmt.Sprintf("alrt_%d", n)) {
			t.Errorf("the digest does not name alrt_%d", n)
		}
	}
}

func TestTwoNotifiersShareTheWork(t *testing.T) {
	t.Parallel()
	h, server := newHouse(t), startSMTP(t, &testSMTP{})
	h.start(Config{SMTPURL: "smtp://" + server.addr})
	h.start(Config{SMTPURL: "smtp://" + server.addr})
	const n = 40
	for i := range n {
		h.alert(numbered(i))
	}
	for i := range n {
		h.delivery(fmt.Sprintf("alert.alrt_%d", i), delivery.Sent)
	}
	if got := len(server.taken()); got != n {
		t.Errorf("%d mails for %d alerts", got, n)
	}
}

func TestPoisonGoesToTheDeadLetters(t *testing.T) {
	t.Parallel()
	h, box := newHouse(t), startMailbox(t)
	h.start(Config{SMTPURL: box.SMTPURL()})
	h.publish("alerts.x.y", []byte("{not json"))
	h.publish("alerts.x.y", []byte("{}"))
	h.alert(numbered(1))
	h.delivery("alert.alrt_1", delivery.Sent)
	stream, err := h.js.Stream(t.Context(), bus.Dead)
	if err != nil {
		t.Fatal(err)
	}
	info, err := stream.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.State.Msgs != 2 {
		t.Errorf("%d dead letters, want 2", info.State.Msgs)
	}
}

func TestNoticesAreMailed(t *testing.T) {
	t.Parallel()
	h, box := newHouse(t), startMailbox(t)
	h.start(Config{SMTPURL: box.SMTPURL()})
	expires := testTime.AddDate(0, 0, 14)
	n := key.Notice{ID: "ntc_1", Type: key.Created, Time: testTime, OrgID: "org_acme", KeyID: "key_01JD9Z3N5W", Data: key.Data{Name: "billing-sync", Prefix: "lk_live_ab12"}}
	h.publish(bus.NoticeSubject(n.OrgID, n.KeyID), n) // done by hand: no mail
	n.ID, n.Type, n.Data.ExpiresAt = "ntc_2", key.Expiring, &expires
	h.publish(bus.NoticeSubject(n.OrgID, n.KeyID), n)
	h.delivery("notice.ntc_2", delivery.Sent)
	list := box.List()
	if len(list) != 1 || !strings.Contains(list[0].Subject, "will expire soon") {
		t.Errorf("mails = %+v", list)
	}
}

func TestWebhooks(t *testing.T) {
	t.Parallel()
	const secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	h := newHouse(t)
	verifier, err := standardwebhooks.NewWebhook(secret)
	if err != nil {
		t.Fatal(err)
	}
	type call struct{ id, kind string }
	calls := make(chan call, 100)
	tried := map[string]int{}
	var mu sync.Mutex
	endpoint := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.URL.Path == "/gone" {
			w.WriteHeader(http.StatusGone)
			return
		}
		mu.Lock()
		tried[r.Header.Get("Webhook-Id")]++
		first := tried[r.Header.Get("Webhook-Id")] == 1
		mu.Unlock()
		if first {
			http.Redirect(w, r, "/elsewhere", http.StatusFound) // a failure, to be tried again
			return
		}
		if err := verifier.Verify(body, r.Header); err != nil {
			t.Errorf("signature: %v", err)
		}
		var payload struct{ Type string }
		if err := json.Unmarshal(body, &payload); err != nil {
			t.Error(err)
		}
		calls <- call{r.Header.Get("Webhook-Id"), payload.Type}
	}))
	t.Cleanup(endpoint.Close)
	hook := func(id, org, url string, events ...string) {
		h.put(bus.Webhooks, id, key.Webhook{ID: id, OrgID: org, URL: url, Events: events, Secret: secret})
	}
	hook("wh_a", "org_acme", endpoint.URL+"/a")
	hook("wh_gone", "org_acme", endpoint.URL+"/gone")
	hook("wh_other", "org_other", endpoint.URL+"/other")
	hook("wh_deaf", "org_acme", endpoint.URL+"/deaf", key.Expired)
	hook("wh_inside", "org_acme", "https://169.254.169.254/latest/meta-data")
	h.start(Config{SMTPURL: "none", WebhookAllow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}})

	h.alert(numbered(1))
	h.alert(numbered(1)) // redelivered
	grown := numbered(1)
	grown.Revision = 2
	h.alert(grown)
	if d := h.delivery("hook.wh_a.alrt_1", delivery.Sent); d.Attempts != 2 {
		t.Errorf("delivery = %+v", d)
	}
	h.delivery(delivery.Key(delivery.Hook, "wh_a", "alrt_1.2"), delivery.Sent)
	h.delivery("hook.wh_gone.alrt_1", delivery.Refused)
	if d := h.delivery("hook.wh_inside.alrt_1", delivery.Refused); !strings.Contains(d.Answer, "not public") {
		t.Errorf("delivery = %+v", d)
	}
	got := []call{<-calls, <-calls}
	slices.SortFunc(got, func(a, b call) int { return strings.Compare(a.id, b.id) })
	if want := []call{{"msg_wh_a_alrt_1", alertCreated}, {"msg_wh_a_alrt_1.2", alertUpdated}}; !slices.Equal(got, want) || len(calls) != 0 {
		t.Errorf("calls = %v and %d more, want %v", got, len(calls), want)
	}
	kv, err := h.js.KeyValue(t.Context(), bus.Webhooks)
	if err != nil {
		t.Fatal(err)
	}
	entry, err := kv.Get(t.Context(), "wh_gone")
	if err != nil || !bytes.Contains(entry.Value(), []byte(`"disabled":true`)) {
		t.Errorf("410 does not disable: %s, %v", entry.Value(), err)
	}
}

func TestPublicAddresses(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]bool{
		"93.184.215.14": true, "2606:2800:21f:cb07:6820:80da:af6b:8b2c": true,
		"127.0.0.1": false, "10.0.0.1": false, "192.168.1.1": false, "172.16.0.1": false, "169.254.169.254": false, "100.64.0.1": false,
		"0.0.0.0": false, "255.255.255.255": false, "224.0.0.1": false, "::1": false, "::": false, "fe80::1": false, "fc00::1": false,
		"64:ff9b::7f00:1": false, "2002:7f00:1::": false, "fd00:ec2::254": false,
	} {
		if got := public(netip.MustParseAddr(address)); got != want {
			t.Errorf("public(%s) = %v", address, got)
		}
	}
	h := newHooks(Config{}, slog.New(slog.DiscardHandler))
	if err := h.control("tcp", "[::ffff:127.0.0.1]:443", nil); !errors.Is(err, errForbidden) {
		t.Errorf("an IPv4-mapped loopback address is dialled: %v", err)
	}
}

func TestParseSMTPURL(t *testing.T) {
	t.Parallel()
	for raw, want := range map[string]smtpServer{
		"smtp://mail.example.com":                          {host: "mail.example.com", port: 25, starttls: "opportunistic"},
		"smtp://u:p%40ss@mail.example.com":                 {host: "mail.example.com", port: 587, starttls: "required", user: "u", password: "p@ss"},
		"smtps://u:p@mail.example.com":                     {host: "mail.example.com", port: 465, starttls: "required", user: "u", password: "p", implicitTLS: true},
		"smtp://127.0.0.1:1025?starttls=off":               {host: "127.0.0.1", port: 1025, starttls: "off"},
		"smtp://u:p@localhost:25?auth=login&helo=a.b":      {host: "localhost", port: 25, starttls: "opportunistic", user: "u", password: "p", auth: "login", helo: "a.b"},
		"smtp://[::1]:2525?starttls=required&auth=XOAUTH2": {host: "::1", port: 2525, starttls: "required", auth: "xoauth2"},
	} {
		got, err := parseSMTPURL(raw)
		if err != nil || *got != want {
			t.Errorf("parseSMTPURL(%q) = %+v, %v, want %+v", raw, got, err, want)
		}
	}
	for _, raw := range []string{"", "mail.example.com:25", "http://x", "smtp://", "smtp://h?starttls=maybe", "smtps://h?starttls=off", "smtp://h:0x1", "smtp://h?skip=1", "smtp://h?auth=ntlm"} {
		if _, err := parseSMTPURL(raw); err == nil {
			t.Errorf("parseSMTPURL(%q) is no error", raw)
		}
	}
	if _, err := parseSMTPURL("smtp://u:secret with\x7f@h"); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("the error shows the password: %v", err)
	}
}
