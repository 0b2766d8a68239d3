package usage_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	usagev1 "github.com/latchkey-dev/latchkey/schemas/usage/v1"
)

var now = time.Date(2026, 11, 21, 18, 0, 0, 0, time.UTC)

const good = `{"id":"0198","time":"2026-11-21T17:40:00.123Z","org_id":"org_acme","key_id":"key_01J",` +
	`"source_ip":"203.0.113.7","method":"POST","route":"/v1/devices/{id}","status":201,"scope":"ingest:write",` +
	`"decision":"allow","deny_reason":"","user_agent":"terraform/1.9","latency_us":812,"request_bytes":512,` +
	`"response_bytes":90,"gateway":"edge-1"}`

func goodEvent() usage.Event {
	return usage.Event{
		ID: "0198", Time: time.Date(2026, 11, 21, 17, 40, 0, 123e6, time.UTC), OrgID: "org_acme", KeyID: "key_01J",
		SourceIP: netip.MustParseAddr("203.0.113.7"), Method: "POST", Route: "/v1/devices/{id}", Status: 201,
		Scope: "ingest:write", Decision: usage.Allow, UserAgent: "terraform/1.9", LatencyUS: 812,
		RequestBytes: 512, ResponseBytes: 90, Gateway: "edge-1",
	}
}

// decode is what came of a body: "ok" or the reason, by index.
func decode(t *testing.T, contentType, body string) ([]usage.Event, []string) {
	t.Helper()
	var events []usage.Event
	var results []string
	err := usage.Decode(contentType, []byte(body), now, func(i int, ev *usage.Event, err error) {
		if i != len(results) {
			t.Errorf("index %d after %d elements", i, len(results))
		}
		if err != nil {
			results = append(results, err.Error())
			return
		}
		events = append(events, *ev)
		results = append(results, "ok")
	})
	if err != nil {
		t.Fatalf("Decode: %v", err)
	}
	return events, results
}

func with(old, repl string) string { return strings.Replace(good, old, repl, 1) }

func TestDecode(t *testing.T) {
	t.Parallel()
	const ndjson, jsonType = usage.ContentTypeNDJSON, usage.ContentTypeJSON
	for name, tc := range map[string]struct {
		contentType, body string
		want              []string // prefix of each result
	}{
		"object":          {jsonType, good, []string{"ok"}},
		"charset":         {"Application/JSON; charset=utf-8", good, []string{"ok"}},
		"no content type": {"", good, []string{"ok"}},
		"array":           {jsonType, "[" + good + " , " + good + "]", []string{"ok", "ok"}},
		"empty array":     {jsonType, " [ ] ", nil},
		"lines":           {ndjson, good + "\n\r\n" + good + "\r\n\n", []string{"ok", "ok"}},
		"broken line":     {ndjson, good + "\n{\"id\":\n" + good, []string{"ok", "not valid JSON", "ok"}},
		"line with two":   {ndjson, good + good + "\n" + good, []string{"not valid JSON", "ok"}},
		"element resynchronised": {
			jsonType, "[" + good + `,{"id":tru},` + good + "]",
			[]string{"ok", "not valid JSON", "ok"},
		},
		"element of another kind":  {jsonType, `[1,"x",null,[` + good + `],` + good + "]", []string{"an event is", "an event is", "an event is", "an event is", "ok"}},
		"element unterminated":     {jsonType, "[" + good + `,{"id":"a},` + good + "]", []string{"ok", "not valid JSON"}},
		"array unterminated":       {jsonType, "[" + good, []string{"ok", "not valid JSON"}},
		"comma missing":            {jsonType, "[" + good + good + "]", []string{"ok", "not valid JSON"}},
		"comma before the end":     {jsonType, "[" + good + ",]", []string{"ok", "not valid JSON"}},
		"after the array":          {jsonType, "[" + good + "] x", []string{"ok", "not valid JSON"}},
		"two objects":              {jsonType, good + good, []string{"ok", "data after the first event"}},
		"nulls are absent":         {jsonType, with(`"status":201`, `"status":null,"id":null`), []string{"ok"}},
		"unknown fields":           {jsonType, with(`"status"`, `"x":{"a":[1,{"b":"}"}]},"y":-1.5e3,"status"`), []string{"ok"}},
		"unknown field broken":     {jsonType, with(`"status"`, `"x":{"a":[1},"status"`), []string{"not valid JSON"}},
		"offset":                   {jsonType, with("17:40:00.123Z", "19:40:00.123+02:00"), []string{"ok"}},
		"offset of another sort":   {jsonType, with("17:40:00.123Z", "17:40:00.123+0200"), []string{`time "2026`}},
		"unknown field escaped":    {jsonType, with(`"status"`, `"x":["\u00e9\n\"",-0.5E+3,{}],"status"`), []string{"ok"}},
		"unknown field misescaped": {jsonType, with(`"status"`, `"x":["\u00g9"],"status"`), []string{"not valid JSON"}},
		"unknown number broken":    {jsonType, with(`"status"`, `"x":01,"status"`), []string{"not valid JSON"}},
		"time ahead":               {jsonType, with("17:40", "18:06"), []string{"time 2026-11-21T18:06:00Z is more than 5m0s in the future"}},
		"time a little ahead":      {jsonType, with("17:40", "18:04"), []string{"ok"}},
		"time of another form":     {jsonType, with("2026-11-21T17:40:00.123Z", "21.11.2026"), []string{`time "21.11.2026" is not RFC 3339`}},
		"time as a number":         {jsonType, with(`"2026-11-21T17:40:00.123Z"`, "1763746800"), []string{"time is the number 1763746800"}},
		"no such day":              {jsonType, with("11-21", "02-30"), []string{"time"}},
		"address":                  {jsonType, with("203.0.113.7", "203.0.113.700"), []string{`source_ip "203.0.113.700" is no IP address`}},
		"address with a zone":      {jsonType, with("203.0.113.7", "fe80::1%eth0"), []string{`source_ip "fe80::1%eth0" has a zone`}},
		"status as text":           {jsonType, with("201", `"201"`), []string{"status is a string, want a whole number"}},
		"status as a fraction":     {jsonType, with("201", `201.5`), []string{"status is 201.5, want a whole number"}},
		"status below zero":        {jsonType, with("201", `-1`), []string{"status is -1, want a whole number"}},
		"status too large":         {jsonType, with("201", `2010`), []string{"status 2010 is no HTTP status"}},
		"key missing":              {jsonType, with(`"key_id":"key_01J",`, ""), []string{"key_id is required"}},
		"key with blanks":          {jsonType, with("key_01J", "a b"), []string{"key_id has ' ' at 1"}},
		"deny unexplained":         {jsonType, with(`"decision":"allow"`, `"decision":"deny"`), []string{"ok"}},
		"deny for nothing known":   {jsonType, with(`"decision":"allow","deny_reason":""`, `"decision":"deny","deny_reason":"mood"`), []string{`deny_reason "mood"`}},
		"several at once":          {jsonType, `{"time":"x","status":1.5}`, []string{`time "x" is not RFC 3339; status is 1.5`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, got := decode(t, tc.contentType, tc.body)
			if len(got) != len(tc.want) {
				t.Fatalf("got %q, want %q", got, tc.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], tc.want[i]) {
					t.Errorf("element %d: %q, want %q", i, got[i], tc.want[i])
				}
			}
		})
	}
}

func TestDecodeFields(t *testing.T) {
	t.Parallel()
	want := goodEvent()
	escaped := with("terraform/1.9", `terra\u0066orm\/1.9`)
	mapped := with("203.0.113.7", "::ffff:203.0.113.7")
	for _, body := range []string{good, escaped, mapped} {
		events, _ := decode(t, usage.ContentTypeJSON, body)
		if len(events) != 1 || !reflect.DeepEqual(events[0], want) {
			t.Errorf("%s\ngot  %+v\nwant %+v", body, events, want)
		}
	}
	var viaJSON usage.Event
	if err := json.Unmarshal([]byte(good), &viaJSON); err != nil || !reflect.DeepEqual(viaJSON, want) {
		t.Errorf("UnmarshalJSON: %+v, %v", viaJSON, err)
	}
	again, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if events, results := decode(t, usage.ContentTypeJSON, string(again)); len(events) != 1 || !reflect.DeepEqual(events[0], want) {
		t.Errorf("MarshalJSON: %s: %v", again, results)
	}
}

func TestDecodeRefusesBodies(t *testing.T) {
	t.Parallel()
	never := func(int, *usage.Event, error) { t.Error("called") }
	if err := usage.Decode("text/html", []byte(good), now, never); err == nil {
		t.Error("text/html was read")
	}
	if err := usage.Decode(usage.ContentTypeJSON, []byte(" \n"), now, never); err == nil {
		t.Error("an empty body was read as JSON")
	}
}

func protoEvent(e usage.Event) *usagev1.UsageEvent {
	return &usagev1.UsageEvent{
		Id: e.ID, Time: timestamppb.New(e.Time), OrgId: e.OrgID, KeyId: e.KeyID, SourceIp: e.SourceIP.String(),
		Method: e.Method, Route: e.Route, Status: uint32(e.Status), Scope: e.Scope, Decision: e.Decision,
		DenyReason: e.DenyReason, UserAgent: e.UserAgent, LatencyUs: uint64(e.LatencyUS),
		RequestBytes: e.RequestBytes, ResponseBytes: e.ResponseBytes, Gateway: e.Gateway,
	}
}

func TestProtobuf(t *testing.T) {
	t.Parallel()
	want := goodEvent()
	long := want
	long.UserAgent, long.Route = strings.Repeat("é", 500), strings.Repeat("/a", 500)
	bad := want
	bad.KeyID = ""
	batch := &usagev1.UsageBatch{Events: []*usagev1.UsageEvent{protoEvent(want), protoEvent(bad), protoEvent(long)}}
	body, err := proto.Marshal(batch)
	if err != nil {
		t.Fatal(err)
	}
	events, results := decode(t, usage.ContentTypeProtobuf, string(body))
	if len(results) != 3 || results[1] != "key_id is required" || !reflect.DeepEqual(events, []usage.Event{want, long}) {
		t.Errorf("got %q, %+v", results, events)
	}
	var own []byte
	for _, ev := range []usage.Event{want, bad, long} {
		own = ev.AppendProtobuf(own)
	}
	var back usagev1.UsageBatch
	if err := proto.Unmarshal(own, &back); err != nil || !proto.Equal(&back, batch) {
		t.Errorf("AppendProtobuf: %v, %v", err, &back)
	}
	if _, results := decode(t, usage.ContentTypeProtobuf, string(body[:len(body)-1])); len(results) != 3 || results[2] == "ok" {
		t.Errorf("truncated: %q", results)
	}
}

func TestPartitionIsFNV(t *testing.T) {
	t.Parallel()
	for i := range 200 {
		key := fmt.Sprintf("key.%d:x", i)
		h := fnv.New32a()
		h.Write([]byte(usage.SubjectToken(key)))
		if got, want := usage.Partition(key, 16), int(h.Sum32()%16); got != want {
			t.Errorf("%s: %d, want %d", key, got, want)
		}
	}
}

func TestValidateDoesNotAllocate(t *testing.T) {
	ev := goodEvent()
	if n := testing.AllocsPerRun(100, func() {
		ev.Normalize()
		if err := ev.Validate(now); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestDecodeUnusualTexts(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`\ud83d\ude00 \"\\\/\b\f\n\r\t`: "😀 \"\\/\b\f\n\r\t", `half \ud83d!`: "half \ufffd!", "broken \xff \\n": "broken \ufffd \n", `\ufffd`: "\ufffd",
	} {
		events, _ := decode(t, usage.ContentTypeJSON, with("terraform/1.9", text))
		if len(events) != 1 || events[0].UserAgent != want {
			t.Errorf("%s: %+v", text, events)
		}
	}
	for text, want := range map[string]string{
		"2024-02-29T23:30:00-01:00": "2024-03-01T00:30:00Z", "2026-01-31T00:00:00.5+00:30": "2026-01-30T23:30:00.5Z",
		"2026-05-31T10:00:00.1234567891Z": "2026-05-31T10:00:00.123456789Z", "2026-02-29T10:00:00Z": "", "2026-04-31T10:00:00Z": "", "2026-04-30T10:00:00+25:00": "",
	} {
		events, _ := decode(t, usage.ContentTypeJSON, with("2026-11-21T17:40:00.123Z", text))
		if got := len(events) == 1; got != (want != "") || got && events[0].Time.Format(time.RFC3339Nano) != want {
			t.Errorf("%s: %+v", text, events)
		}
	}
}

// FuzzDecodeJSON compares the scanner with encoding/json: what that reads as an
// event is read alike, and what it calls broken is refused.
func FuzzDecodeJSON(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte(with("terraform", `\ud83d\ude00\u00e9<é`)))
	f.Add([]byte(with(`"status":201`, `"status":1e2,"x":[{}]`)))
	f.Add([]byte("[" + good + ",{}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var want struct {
			ID            *string `json:"id"`
			UserAgent     *string `json:"user_agent"`
			Route         *string `json:"route"`
			Status        *uint16 `json:"status"`
			RequestBytes  *uint64 `json:"request_bytes"`
			ResponseBytes *uint64 `json:"response_bytes"`
		}
		seen := 0
		err := usage.Decode(usage.ContentTypeJSON, data, now, func(_ int, ev *usage.Event, err error) {
			seen++
			if err != nil || !json.Valid(data) || bytes.TrimSpace(data)[0] != '{' || bytes.ContainsAny(data, "ABCDEFGHIJKLMNOPQRSTUVWXYZſK") {
				return
			}
			if err := json.Unmarshal(data, &want); err != nil {
				t.Fatalf("accepted, but encoding/json says %v", err)
			}
			if want.UserAgent != nil && len(*want.UserAgent) <= usage.MaxText && *want.UserAgent != ev.UserAgent {
				t.Errorf("user agent %q, want %q", ev.UserAgent, *want.UserAgent)
			}
			if want.Status != nil && *want.Status != ev.Status || want.RequestBytes != nil && *want.RequestBytes != ev.RequestBytes {
				t.Errorf("numbers differ: %+v", ev)
			}
		})
		if !json.Valid(data) && err == nil && seen == 0 {
			t.Error("broken JSON went unnoticed")
		}
	})
}

// FuzzDecodeProtobuf has the generated code as its oracle.
func FuzzDecodeProtobuf(f *testing.F) {
	ev := goodEvent()
	f.Add(ev.AppendProtobuf(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		var batch usagev1.UsageBatch
		oracle := proto.Unmarshal(data, &batch)
		var got []usage.Event
		total := 0
		_ = usage.Decode(usage.ContentTypeProtobuf, data, now, func(_ int, ev *usage.Event, err error) {
			total++
			if err == nil {
				got = append(got, *ev)
			}
		})
		// Groups are of an older protobuf: the oracle skips them, we refuse them.
		if oracle != nil || batch.GetColumns() != nil || len(batch.ProtoReflect().GetUnknown()) > 0 {
			return
		}
		if total != len(batch.Events) {
			t.Fatalf("%d elements, want %d", total, len(batch.Events))
		}
		if total == 1 && len(got) == 1 && got[0].KeyID != batch.Events[0].KeyId {
			t.Errorf("key %q, want %q", got[0].KeyID, batch.Events[0].KeyId)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	const n = 200
	var lines, batch []byte
	for i := range n {
		ev := goodEvent()
		ev.ID = fmt.Sprintf("0198a6c0-0000-7000-8000-%012d", i)
		ev.SourceIP = netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
		ev.Route = fmt.Sprintf("/v1/devices/{id}/%d", i%20)
		lines = append(ev.AppendJSON(lines), '\n')
		batch = ev.AppendProtobuf(batch)
	}
	for name, body := range map[string][]byte{usage.ContentTypeNDJSON: lines, usage.ContentTypeProtobuf: batch} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var d usage.Decoder
			for b.Loop() {
				if err := d.Decode(name, body, now, func(_ int, _ *usage.Event, err error) {
					if err != nil {
						b.Fatal(err)
					}
				}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)*n/b.Elapsed().Seconds(), "events/s")
		})
	}
}
