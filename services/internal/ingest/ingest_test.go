package ingest

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// collected is a Sink that keeps everything.
type collected struct {
	events []usage.Event
	left   []string
}

func (c *collected) Event(ev *usage.Event) error {
	c.events = append(c.events, *ev)
	return nil
}

func (c *collected) LeftOut(place, reason string) { c.left = append(c.left, place+": "+reason) }

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func read(t testing.TB, opts Options, text string) *collected {
	t.Helper()
	c := &collected{}
	opts.Now = now
	if err := Read(t.Context(), strings.NewReader(text), opts, c); err != nil {
		t.Fatal(err)
	}
	return c
}

// one reads a text that is one event.
func one(t *testing.T, opts Options, text string) usage.Event {
	t.Helper()
	c := read(t, opts, text)
	if len(c.events) != 1 || len(c.left) != 0 {
		t.Fatalf("%d events, left out: %v", len(c.events), c.left)
	}
	return c.events[0]
}

const event = `{"id":"a","time":"2026-11-21T10:00:00Z","org_id":"org_1","key_id":"key_1","source_ip":"203.0.113.7","route":"/v1/x"}`

func TestNDJSON(t *testing.T) {
	t.Parallel()
	c := read(t, Options{Format: NDJSON}, "\ufeff"+event+"\r\n\n{\"bad\":1}\nnonsense\n"+strings.Replace(event, `"id":"a",`, "", 1)+"\n")
	if len(c.events) != 2 || len(c.left) != 2 {
		t.Fatalf("%d events, left out: %v", len(c.events), c.left)
	}
	if c.events[0].ID != "a" || !strings.HasPrefix(c.events[1].ID, "imp_") {
		t.Errorf("ids %q, %q", c.events[0].ID, c.events[1].ID)
	}
	if !strings.HasPrefix(c.left[0], "line 3: time is required") || !strings.HasPrefix(c.left[1], "line 4: ") {
		t.Errorf("left out: %q", c.left)
	}
}

func TestNDJSONOrgIsForThoseWithout(t *testing.T) {
	t.Parallel()
	opts := Options{Format: NDJSON, Org: "org_2"}
	if got := one(t, opts, event).OrgID; got != "org_1" {
		t.Errorf("org %q", got)
	}
	if got := one(t, opts, strings.Replace(event, `"org_id":"org_1",`, "", 1)).OrgID; got != "org_2" {
		t.Errorf("org %q", got)
	}
}

func TestIDsFollowFromContent(t *testing.T) {
	t.Parallel()
	line := strings.Replace(event, `"id":"a",`, "", 1) + "\n"
	other := strings.Replace(line, "/v1/x", "/v1/y", 1)
	ids := func(opts Options, text string) string {
		opts.Format = NDJSON
		var list []string
		for _, ev := range read(t, opts, text).events {
			list = append(list, ev.ID)
		}
		return strings.Join(list, " ")
	}
	first := ids(Options{}, line+line+other)
	if first != ids(Options{}, line+line+other) {
		t.Error("the same file gives other ids")
	}
	list := strings.Fields(first)
	if list[0] == list[1] || list[1] == list[2] || list[0] == list[2] {
		t.Errorf("ids are not distinct: %v", list)
	}
	if ids(Options{}, line) != list[0] {
		t.Error("the first of equal lines depends on the others")
	}
	if ids(Options{Gateway: "b"}, line) == ids(Options{Gateway: "a"}, line) {
		t.Error("two gateways give the same id")
	}
}

func TestGzip(t *testing.T) {
	t.Parallel()
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	fmt.Fprintln(w, event)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	one(t, Options{Format: NDJSON}, packed.String())
	cut := packed.Bytes()[:packed.Len()-6]
	if err := Read(t.Context(), bytes.NewReader(cut), Options{Format: NDJSON, Now: now}, &collected{}); err == nil {
		t.Error("a cut gzip file is read without an error")
	}
}

func TestNginx(t *testing.T) {
	t.Parallel()
	const combined = `203.0.113.9 - alice [21/Nov/2026:09:00:00 +0100] "GET /v1/orders/1234?api_key=s3cret HTTP/1.1" 403 153 "-" "curl/8 \x22x\x22"`
	ev := one(t, Options{Format: Nginx}, combined)
	if ev.KeyID != "alice" || ev.Route != "/v1/orders/{id}" || ev.Method != "GET" || ev.Status != 403 || ev.DenyReason != usage.DenyInsufficientScope ||
		ev.UserAgent != `curl/8 "x"` || ev.ResponseBytes != 153 || ev.OrgID != DefaultOrg || !ev.Time.Equal(now.Add(-4*time.Hour)) || ev.SourceIP.String() != "203.0.113.9" {
		t.Errorf("%+v", ev)
	}
	ev = one(t, Options{Format: Nginx, Org: "org_9"}, combined+` "key_77"`)
	if ev.KeyID != "key_77" || ev.OrgID != "org_9" {
		t.Errorf("%+v", ev)
	}
	anonymous := strings.Replace(combined, "alice", "-", 1)
	if got := one(t, Options{Format: Nginx}, anonymous).KeyID; got != hashedKey("s3cret") {
		t.Errorf("key %q", got)
	}
	if got := one(t, Options{Format: Nginx}, anonymous+` "Bearer lk_live_abc"`).KeyID; got != hashedKey("lk_live_abc") {
		t.Errorf("key %q", got)
	}
	ev = one(t, Options{Format: Nginx}, `{"time":"2026-11-21T09:00:00+00:00","remote_addr":"2001:db8::1","request_method":"POST","request_uri":"/v1/x?y=1","status":"201",`+
		`"request_time":"0.012","body_bytes_sent":"20","request_length":"300","http_user_agent":"t","latchkey_key_id":"key_1","latchkey_org_id":"org_1"}`)
	if ev.KeyID != "key_1" || ev.OrgID != "org_1" || ev.LatencyUS != 12000 || ev.Route != "/v1/x" || ev.Status != 201 || ev.RequestBytes != 300 {
		t.Errorf("%+v", ev)
	}
}

func TestCaddy(t *testing.T) {
	t.Parallel()
	const line = `{"level":"info","ts":1795250000.524,"logger":"http.log.access","msg":"handled request","request":{"remote_ip":"127.0.0.1","client_ip":"198.51.100.4",` +
		`"proto":"HTTP/2.0","method":"GET","host":"localhost","uri":"/v1/devices/019a?x=1","headers":{"User-Agent":["curl/7.82.0"],"Authorization":["Bearer tops3cret"]}},` +
		`"bytes_read":7,"user_id":"","duration":0.000929675,"size":10900,"status":200,"resp_headers":{"X-Latchkey-Key-Id":["key_5"]}}`
	ev := one(t, Options{Format: Caddy}, line)
	if ev.KeyID != "key_5" || ev.SourceIP.String() != "198.51.100.4" || ev.LatencyUS != 929 || ev.Status != 200 || ev.RequestBytes != 7 || ev.UserAgent != "curl/7.82.0" ||
		ev.Time.UnixMilli() != 1795250000524 {
		t.Errorf("%+v", ev)
	}
	if got := one(t, Options{Format: Caddy}, strings.Replace(line, "X-Latchkey-Key-Id", "X-Other", 1)).KeyID; got != hashedKey("tops3cret") {
		t.Errorf("key %q", got)
	}
	redacted := strings.NewReplacer("X-Latchkey-Key-Id", "X-Other", "Bearer tops3cret", "REDACTED").Replace(line)
	if c := read(t, Options{Format: Caddy}, redacted); len(c.events) != 0 || len(c.left) != 1 || !strings.HasSuffix(c.left[0], errNoKey.Error()) {
		t.Errorf("%+v", c)
	}
}

func TestEnvoy(t *testing.T) {
	t.Parallel()
	const line = `[2026-11-21T10:00:00.310Z] "POST /v1/locations HTTP/2" 204 - 154 0 226 100 "10.0.35.28, 203.0.113.5" "nsq2http" "cc21d9b0-cf5c-432b-8c7e-98aeb7988cd2" "locations" "tcp://10.0.2.1:80"`
	if c := read(t, Options{Format: Envoy}, line); len(c.events) != 0 || len(c.left) != 1 {
		t.Errorf("%+v", c)
	}
	ev := one(t, Options{Format: Envoy}, line+` "key_3"`)
	if ev.KeyID != "key_3" || ev.SourceIP.String() != "203.0.113.5" || ev.LatencyUS != 226000 || ev.Status != 204 || ev.RequestBytes != 154 || ev.UserAgent != "nsq2http" {
		t.Errorf("%+v", ev)
	}
	ev = one(t, Options{Format: Envoy}, `{"start_time":"2026-11-21T10:00:00.310Z","method":"GET","path":"/v1/a?b","response_code":429,"duration":5,"downstream_remote_address":"[2001:db8::9]:4242","key_id":"key_4"}`)
	if ev.KeyID != "key_4" || ev.SourceIP.String() != "2001:db8::9" || ev.DenyReason != usage.DenyRateLimited || ev.LatencyUS != 5000 {
		t.Errorf("%+v", ev)
	}
}

func TestCloudTrail(t *testing.T) {
	t.Parallel()
	const record = `{"eventID":"f0cce5bc-5f9e-4ee1-bb48-e20fecb32403","eventTime":"2023-07-10T12:11:15Z","eventSource":"ec2.amazonaws.com","eventName":"CreateVolume","awsRegion":"us-east-1",` +
		`"sourceIPAddress":"AWS Internal","userAgent":"x","errorCode":"Client.UnauthorizedOperation","recipientAccountId":"123837392027","userIdentity":{"accessKeyId":"AKIA1","accountId":"1"}}`
	const anonymous = `{"eventID":"x","eventTime":"2023-07-10T12:11:15Z","userIdentity":{"type":"AWSService"}}`
	quoted := fmt.Sprintf("%q", record)
	for name, text := range map[string]string{
		"file":          `{"Records":[` + record + `,` + anonymous + `]}`,
		"lookup-events": `{"NextToken":"t","Events":[{"EventId":"x","CloudTrailEvent":` + quoted + `},` + anonymous + `]}`,
		"array":         `[` + record + `,` + anonymous + `]`,
		"lines":         record + "\n" + anonymous + "\n",
	} {
		c := read(t, Options{Format: CloudTrail}, text)
		if len(c.events) != 1 || len(c.left) != 1 || c.left[0] != "record 2: made without a key" {
			t.Errorf("%s: %d events, left out: %v", name, len(c.events), c.left)
			continue
		}
		ev := c.events[0]
		if ev.ID != "f0cce5bc-5f9e-4ee1-bb48-e20fecb32403" || ev.KeyID != "AKIA1" || ev.OrgID != "123837392027" || ev.Route != "ec2.amazonaws.com/CreateVolume" ||
			ev.Scope != "ec2:CreateVolume" || ev.Status != 403 || ev.DenyReason != usage.DenyInsufficientScope || !ev.SourceIP.IsUnspecified() || ev.Gateway != "us-east-1" {
			t.Errorf("%s: %+v", name, ev)
		}
	}
	for _, broken := range []string{`{"Records":[` + record, `{"Records":7}`, `7`, `{"Records":[` + record + `]]}`} {
		c := &collected{}
		if err := Read(t.Context(), strings.NewReader(broken), Options{Format: CloudTrail, Now: now}, c); err == nil {
			t.Errorf("%.20q…: no error", broken)
		}
	}
}

// TestRealCloudTrail reads the records of an attack exercise, which lie beside
// the repository where it was set up for that.
func TestRealCloudTrail(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../../../../shared/data/cloudtrail/CloudTrail/*.json")
	if err != nil || len(files) == 0 {
		t.Skip("no ../shared/data/cloudtrail beside the repository")
	}
	c, ids := &collected{}, map[string]bool{}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		err = Read(t.Context(), f, Options{Format: CloudTrail, Now: now}, c)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	nowhere := 0
	for _, ev := range c.events {
		ids[ev.ID+ev.KeyID+ev.Time.String()] = true
		if ev.SourceIP.IsUnspecified() {
			nowhere++
		}
	}
	if len(c.events) != 2815 || len(ids) != 2815 || len(c.left) != 85 || nowhere != 271 {
		t.Errorf("%d events (%d distinct, %d without an address), %d left out", len(c.events), len(ids), nowhere, len(c.left))
	}
	for _, reason := range c.left {
		if !strings.HasSuffix(reason, errNoKey.Error()) {
			t.Error(reason)
		}
	}
}

func TestOrderer(t *testing.T) {
	t.Parallel()
	var got []string
	o := NewOrderer(func(ev *usage.Event) error {
		got = append(got, ev.ID)
		return nil
	})
	for i, minute := range []int{3, 1, 2, 1} {
		if err := o.Add(&usage.Event{ID: fmt.Sprint(minute, i), Time: now.Add(time.Duration(minute) * time.Minute)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.Flush(); err != nil {
		t.Fatal(err)
	}
	if s := strings.Join(got, ","); s != "1 1,1 3,2 2,3 0" {
		t.Error(s)
	}
}

func TestExpand(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"b.json", "a.json", "sub/c.json"} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	files, err := Expand([]string{filepath.Join(dir, "*.json"), dir, Stdin})
	if err != nil || len(files) != 4 || filepath.Base(files[0]) != "a.json" || files[3] != Stdin {
		t.Errorf("%v, %v", files, err)
	}
	if _, err := Expand([]string{filepath.Join(dir, "*.nothing")}); err == nil {
		t.Error("a pattern without a match is an error")
	}
}

func FuzzRead(f *testing.F) {
	for i, text := range []string{
		event, `{"Records":[{"eventTime":"2023-07-10T12:11:15Z","userIdentity":{"accessKeyId":"A"},"eventName":"x"}]}`,
		`1.2.3.4 - u [21/Nov/2026:09:00:00 +0100] "GET /a?key=\x22 HTTP/1.1" 200 1 "-" "x"`,
		`{"ts":1e300,"request":{"uri":"/","client_ip":"::1","headers":{"Authorization":["Bearer x"]}},"duration":-1e308}`,
		`[2026-11-21T10:00:00.310Z] "POST /v1 HTTP/2" 204 - 154 0 226 100 "1.2.3.4" "a" "b" "c" "d" "k"`,
	} {
		f.Add(uint8(i), []byte(text))
	}
	f.Fuzz(func(t *testing.T, format uint8, data []byte) {
		c := &collected{}
		opts := Options{Format: Formats()[int(format)%len(Formats())], Now: now}
		_ = Read(t.Context(), bytes.NewReader(data), opts, c)
		for i := range c.events {
			ev := &c.events[i]
			if err := ev.Validate(now); err != nil || ev.ID == "" {
				t.Fatalf("event %d: id %q, %v", i, ev.ID, err)
			}
			if strings.Contains(ev.Route, "?") && opts.Format != NDJSON && opts.Format != CloudTrail {
				t.Fatalf("route %q has a query", ev.Route)
			}
		}
	})
}

func TestOrdererSorts(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		minutes := rapid.SliceOf(rapid.IntRange(0, 20)).Draw(t, "minutes")
		var got []string
		o := NewOrderer(func(ev *usage.Event) error {
			got = append(got, ev.ID)
			return nil
		})
		var want []string
		for i, m := range minutes {
			id := fmt.Sprintf("%02d-%04d", m, i)
			want = append(want, id)
			if err := o.Add(&usage.Event{ID: id, Time: now.Add(time.Duration(m) * time.Minute)}); err != nil {
				t.Fatal(err)
			}
		}
		if err := o.Flush(); err != nil {
			t.Fatal(err)
		}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Fatalf("%v, want %v", got, want)
		}
	})
}
