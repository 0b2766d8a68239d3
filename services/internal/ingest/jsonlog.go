package ingest

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// The names under which a JSON access log may hold a field, nginx's variables
// and Envoy's documented example first. The README of this folder lists the
// log formats to configure.
var (
	timeNames     = []string{"time", "time_iso8601", "start_time", "timestamp", "@timestamp", "msec", "time_local", "ts"}
	addressNames  = []string{"source_ip", "client_ip", "remote_addr", "remote_ip", "x_forwarded_for", "downstream_remote_address", "downstream_direct_remote_address"}
	methodNames   = []string{"method", "request_method"}
	targetNames   = []string{"route", "request_uri", "uri", "path", "x-envoy-original-path", "original_path"}
	statusNames   = []string{"status", "response_code"}
	agentNames    = []string{"user_agent", "http_user_agent", "user-agent"}
	receivedNames = []string{"request_bytes", "bytes_received", "request_length"}
	sentNames     = []string{"response_bytes", "bytes_sent", "body_bytes_sent"}
	keyNames      = []string{"key_id", "latchkey_key_id", "x_latchkey_key_id", "x-latchkey-key-id", "http_x_latchkey_key_id", "api_key_id"}
	orgNames      = []string{"org_id", "latchkey_org_id", "x_latchkey_org_id", "x-latchkey-org-id"}
	secretNames   = []string{"http_authorization", "authorization", "http_x_api_key", "x_api_key", "x-api-key", "api_key"}
	userNames     = []string{"remote_user", "user_id"}
)

// object is a decoded JSON object.
type object map[string]any

// jsonLine reads an access log line that is a flat JSON object.
func (in *reader) jsonLine(line []byte) (usage.Event, error) {
	o, err := parseObject(line)
	if err != nil {
		return usage.Event{}, err
	}
	if _, ok := o["request"].(map[string]any); ok {
		return in.caddyLine(o)
	}
	a := access{
		address: o.text(addressNames...), method: o.text(methodNames...), target: o.text(targetNames...),
		userAgent: o.text(agentNames...), status: int(o.number(statusNames...)),
		received: int64(o.number(receivedNames...)), sent: int64(o.number(sentNames...)),
		id: o.text("id"), org: o.text(orgNames...), gateway: o.text("gateway"), scope: o.text("scope"), deny: o.text("deny_reason"),
		keyID: o.text(keyNames...), secret: bearer(o.text(secretNames...)),
	}
	if a.time, err = o.time(); err != nil {
		return usage.Event{}, err
	}
	if a.target == "" && a.method == "" {
		if a.method, a.target, err = request(o.text("request")); err != nil {
			return usage.Event{}, err
		}
	}
	if a.keyID == "" && a.secret == "" {
		a.keyID = o.text(userNames...)
	}
	switch {
	case o["latency_us"] != nil:
		a.latency = time.Duration(o.number("latency_us")) * time.Microsecond
	case o["request_time"] != nil: // nginx: seconds
		a.latency = seconds(o.number("request_time"))
	case o["duration"] != nil: // Envoy: milliseconds
		a.latency = seconds(o.number("duration") / 1000)
	}
	return in.event(a)
}

// caddy reads Caddy's JSON access log. The key is in the request's or answer's
// header X-Latchkey-Key-Id, else the user of basic authentication, else the
// Authorization or X-Api-Key header where Caddy was told to log credentials.
func (in *reader) caddy(line []byte) (usage.Event, error) {
	o, err := parseObject(line)
	if err != nil {
		return usage.Event{}, err
	}
	return in.caddyLine(o)
}

func (in *reader) caddyLine(o object) (usage.Event, error) {
	inner, ok := o["request"].(map[string]any)
	if !ok {
		return usage.Event{}, errors.New("no access log line: it has no request")
	}
	request := object(inner)
	sent, answered := request.headers("headers"), o.headers("resp_headers")
	a := access{
		address: request.text("client_ip", "remote_ip", "remote_addr"), method: request.text("method"), target: request.text("uri"),
		status: int(o.number("status")), userAgent: sent["user-agent"], received: int64(o.number("bytes_read")), sent: int64(o.number("size")),
		org: o.text(orgNames...), keyID: o.text(keyNames...),
	}
	for _, from := range []map[string]string{answered, sent} {
		if a.keyID == "" {
			a.keyID = from["x-latchkey-key-id"]
		}
		if a.org == "" {
			a.org = from["x-latchkey-org-id"]
		}
	}
	if a.keyID == "" {
		a.keyID = o.text("user_id")
	}
	if a.secret = bearer(sent["authorization"]); a.secret == "" {
		a.secret = bearer(sent["x-api-key"])
	}
	at, err := o.time()
	if err != nil {
		return usage.Event{}, err
	}
	a.time = at
	if text, isText := o["duration"].(string); isText {
		a.latency, _ = time.ParseDuration(text) // an unreadable latency is none
	} else {
		a.latency = seconds(o.number("duration"))
	}
	return in.event(a)
}

func parseObject(line []byte) (object, error) {
	var o object
	if err := json.Unmarshal(line, &o); err != nil {
		return nil, fmt.Errorf("no JSON object: %w", err)
	}
	if o == nil {
		return nil, errors.New("no JSON object: null")
	}
	return o, nil
}

// text is the first field that is there and not empty or "-".
func (o object) text(names ...string) string {
	for _, name := range names {
		switch v := o[name].(type) {
		case string:
			if s := dash(strings.TrimSpace(v)); s != "" {
				return s
			}
		case float64:
			return strconv.FormatFloat(v, 'f', -1, 64)
		}
	}
	return ""
}

// number is the first field that is a number or a text with one, else 0.
func (o object) number(names ...string) float64 {
	for _, name := range names {
		switch v := o[name].(type) {
		case float64:
			return within(v)
		case string:
			if n, err := strconv.ParseFloat(v, 64); err == nil {
				return within(n)
			}
		}
	}
	return 0
}

// within keeps a number where every conversion that follows is defined.
func within(n float64) float64 {
	if math.IsNaN(n) {
		return 0
	}
	return max(min(n, 1<<53), -1<<53)
}

func seconds(n float64) time.Duration {
	return time.Duration(max(min(n, 1e9), 0) * float64(time.Second))
}

// headers are the first values of each header, names in lower case.
func (o object) headers(name string) map[string]string {
	all, _ := o[name].(map[string]any)
	out := make(map[string]string, len(all))
	for header, values := range all {
		if list, ok := values.([]any); ok && len(list) > 0 {
			if s, ok := list[0].(string); ok {
				out[strings.ToLower(header)] = s
			}
		}
	}
	return out
}

var timeLayouts = []string{
	time.RFC3339Nano, "2006-01-02T15:04:05.000Z0700", "02/Jan/2006:15:04:05 -0700", "2006/01/02 15:04:05.000", "2006/01/02 15:04:05", "2006-01-02 15:04:05.000",
}

// time reads Unix seconds with a fraction, or one of the layouts.
func (o object) time() (time.Time, error) {
	text := o.text(timeNames...)
	if text == "" {
		return time.Time{}, errors.New("time is required")
	}
	if t, err := unix(text); err == nil {
		return t, nil
	}
	for _, layout := range timeLayouts {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, errors.New("the time is in no known form")
}

// unix reads seconds with a fraction to the microsecond, which is what a
// float64 of today's seconds can hold, or whole milliseconds.
func unix(text string) (time.Time, error) {
	n, err := strconv.ParseFloat(text, 64)
	if err != nil {
		return time.Time{}, err
	}
	if n > 1e11 {
		n /= 1000
	}
	if n < 0 || n > 1e11 || math.IsNaN(n) {
		return time.Time{}, errors.New("out of range")
	}
	return time.UnixMicro(int64(math.Round(n * 1e6))).UTC(), nil
}
