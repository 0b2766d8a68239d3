package ingest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// access is a line of an access log, whichever gateway wrote it.
type access struct {
	time time.Time
	// address may carry a port, or be the value of an X-Forwarded-For header.
	address string
	method  string
	// target is the path with its query, or a whole URL.
	target    string
	status    int
	userAgent string
	latency   time.Duration
	received  int64
	sent      int64
	id        string
	org       string
	gateway   string
	scope     string
	deny      string
	// keyID names the key; secret is what to make a name of where it is absent.
	keyID  string
	secret string
}

// event makes the usage event of a request. A secret leaves this function only
// as its SHA-256, which is also how the KEYS stream names it, and the query,
// which may hold one, not at all.
func (in *reader) event(a access) (usage.Event, error) {
	path, query, _ := strings.Cut(a.target, "?")
	if a.keyID == "" && a.secret == "" {
		a.secret = secretOfQuery(query)
	}
	keyID := a.keyID
	if keyID == "" || usage.CheckIdentifier(keyID) != nil {
		secret := a.secret
		if secret == "" {
			secret = a.keyID // a name with other letters than an id may have
		}
		if secret == "" {
			return usage.Event{}, errNoKey
		}
		keyID = hashedKey(secret)
	}
	addr, err := clientAddress(a.address)
	if err != nil {
		return usage.Event{}, err
	}
	ev := usage.Event{
		ID: a.id, Time: a.time, OrgID: a.org, KeyID: keyID, SourceIP: addr, Method: a.method, Route: routeOf(path),
		UserAgent: a.userAgent, Gateway: a.gateway, Scope: a.scope,
	}
	if ev.OrgID == "" {
		ev.OrgID = in.opts.Org
	}
	if ev.OrgID == "" {
		ev.OrgID = DefaultOrg
	}
	if a.status > 0 && a.status < 1000 {
		ev.Status = uint16(a.status)
	}
	ev.LatencyUS = uint32(min(max(a.latency.Microseconds(), 0), 1<<32-1))
	ev.RequestBytes, ev.ResponseBytes = uint64(max(a.received, 0)), uint64(max(a.sent, 0))
	if ev.DenyReason = a.deny; ev.DenyReason == "" {
		ev.DenyReason = denyReasonOf(a.status)
	}
	if ev.DenyReason != "" {
		ev.Decision = usage.Deny
	}
	return ev, nil
}

// hashedKey names a key by the SHA-256 of its secret.
func hashedKey(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// routeOf folds the ids of a path; a whole URL, as proxies log it, loses its host.
func routeOf(path string) string {
	if !strings.HasPrefix(path, "/") {
		if u, err := url.Parse(path); err == nil && u.Host != "" {
			path = u.EscapedPath()
		}
	}
	return edge.FoldPath(path)
}

// denyReasonOf reads a gateway's refusal out of its status.
func denyReasonOf(status int) string {
	switch status {
	case 401:
		return usage.DenyInvalidKey
	case 403:
		return usage.DenyInsufficientScope
	case 429:
		return usage.DenyRateLimited
	}
	return ""
}

// clientAddress reads "ip", "ip:port", "[ip]:port", or an X-Forwarded-For list,
// of which the last address is the one that the gateway itself saw.
func clientAddress(s string) (netip.Addr, error) {
	if i := strings.LastIndexByte(s, ','); i >= 0 {
		s = s[i+1:]
	}
	s = strings.TrimSpace(s)
	if s == "" || s == "-" {
		return netip.Addr{}, errors.New("the client's address is missing")
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr(), nil
	}
	addr, err := netip.ParseAddr(strings.Trim(s, "[]"))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("client address: %w", err)
	}
	return addr, nil
}

// bearer is the secret in an Authorization header, empty for what a gateway
// blanked out before it logged it.
func bearer(header string) string {
	scheme, secret, found := strings.Cut(strings.TrimSpace(header), " ")
	if !found {
		scheme, secret = "", scheme
	}
	if secret = strings.TrimSpace(secret); strings.Trim(secret, "*-xX.") == "" || strings.EqualFold(secret, "REDACTED") {
		return ""
	}
	if strings.EqualFold(scheme, "bearer") || strings.EqualFold(scheme, "apikey") || scheme == "" {
		return secret
	}
	return header
}

func secretOfQuery(query string) string {
	if !strings.Contains(query, "key") {
		return ""
	}
	values, err := url.ParseQuery(query)
	if err != nil && values == nil {
		return ""
	}
	for _, name := range []string{"api_key", "apikey", "api-key", "key"} {
		if s := bearer(values.Get(name)); s != "" {
			return s
		}
	}
	return ""
}

// fields cuts a line into its blank-delimited fields; "…" and […] hold blanks.
// Escapes as nginx and Envoy write them (\", \\, \xHH) are undone in quotes.
func fields(line string) ([]string, error) {
	var list []string
	for line = strings.TrimLeft(line, " "); line != ""; line = strings.TrimLeft(line, " ") {
		switch line[0] {
		case '"':
			text, rest, err := quoted(line[1:])
			if err != nil {
				return nil, err
			}
			list, line = append(list, text), rest
		case '[':
			text, rest, found := strings.Cut(line[1:], "]")
			if !found {
				return nil, errors.New("no access log line: a bracket is not closed")
			}
			list, line = append(list, text), rest
		default:
			text, rest, _ := strings.Cut(line, " ")
			list, line = append(list, text), rest
		}
	}
	return list, nil
}

func quoted(s string) (text, rest string, err error) {
	end := 0
	for end < len(s) && s[end] != '"' {
		if s[end] == '\\' {
			end++
		}
		end++
	}
	if end >= len(s) {
		return "", "", errors.New("no access log line: a quote is not closed")
	}
	text, rest = s[:end], s[end+1:]
	if !strings.Contains(text, `\`) {
		return text, rest, nil
	}
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' || i+1 == len(text) {
			b.WriteByte(text[i])
			continue
		}
		if i++; text[i] == 'x' && i+2 < len(text) {
			if n, err := strconv.ParseUint(text[i+1:i+3], 16, 8); err == nil {
				b.WriteByte(byte(n))
				i += 2
				continue
			}
		}
		b.WriteByte(text[i])
	}
	return b.String(), rest, nil
}

// nginx reads the combined format (nginx's own default, and Apache's) or JSON.
//
//	$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent "$http_referer" "$http_user_agent" "$key"
//
// The key is the quoted field after the user agent, if the format was extended
// by one, else the user of basic authentication.
func (in *reader) nginx(line []byte) (usage.Event, error) {
	if line[0] == '{' {
		return in.jsonLine(line)
	}
	f, err := fields(string(line))
	if err != nil {
		return usage.Event{}, err
	}
	if len(f) < 7 {
		return usage.Event{}, fmt.Errorf("no line of the combined format: %d fields", len(f))
	}
	a := access{address: f[0], keyID: dash(f[2])}
	if a.time, err = time.Parse("02/Jan/2006:15:04:05 -0700", f[3]); err != nil {
		return usage.Event{}, errors.New("no line of the combined format: the time is not [02/Jan/2006:15:04:05 -0700]")
	}
	if a.method, a.target, err = request(f[4]); err != nil {
		return usage.Event{}, err
	}
	if a.status, err = strconv.Atoi(f[5]); err != nil {
		return usage.Event{}, errors.New("no line of the combined format: the status is no number")
	}
	a.sent, _ = strconv.ParseInt(f[6], 10, 64) // "-" is none
	if len(f) > 8 {
		a.userAgent = dash(f[8])
	}
	if len(f) > 9 {
		a.keyID, a.secret = keyOrSecret(dash(f[9]), a.keyID)
	}
	return in.event(a)
}

// keyOrSecret reads a field that an operator added for the key: an
// Authorization header is a secret, anything else the key's id.
func keyOrSecret(s, fallback string) (keyID, secret string) {
	switch {
	case s == "":
		return fallback, ""
	case strings.Contains(s, " ") || strings.HasPrefix(s, "lk_"):
		return "", bearer(s)
	}
	return s, ""
}

func dash(s string) string {
	if s == "-" {
		return ""
	}
	return s
}

// request reads `GET /path HTTP/1.1`.
func request(s string) (method, target string, err error) {
	method, rest, found := strings.Cut(s, " ")
	if !found || method == "" {
		return "", "", errors.New("the request line is broken, as of a client that spoke no HTTP")
	}
	if i := strings.LastIndex(rest, " "); i >= 0 {
		rest = rest[:i]
	}
	return method, rest, nil
}

// envoy reads Envoy's default format, or JSON.
//
//	[start] "method path protocol" status flags received sent duration upstream-time "x-forwarded-for" "user-agent" "request-id" "authority" "upstream"
//
// The default names no key: add "%REQ(X-LATCHKEY-KEY-ID)%" as a last quoted field.
func (in *reader) envoy(line []byte) (usage.Event, error) {
	if line[0] == '{' {
		return in.jsonLine(line)
	}
	f, err := fields(string(line))
	if err != nil {
		return usage.Event{}, err
	}
	if len(f) < 13 {
		return usage.Event{}, fmt.Errorf("no line of Envoy's default format: %d fields", len(f))
	}
	a := access{address: f[8], userAgent: dash(f[9])}
	if a.time, err = time.Parse(time.RFC3339Nano, f[0]); err != nil {
		return usage.Event{}, errors.New("no line of Envoy's default format: it begins with no time")
	}
	if a.method, a.target, err = request(f[1]); err != nil {
		return usage.Event{}, err
	}
	if a.status, err = strconv.Atoi(f[2]); err != nil {
		return usage.Event{}, errors.New("no line of Envoy's default format: the status is no number")
	}
	a.received, _ = strconv.ParseInt(f[4], 10, 64) // "-" is none, here and below
	a.sent, _ = strconv.ParseInt(f[5], 10, 64)
	if ms, err := strconv.ParseInt(f[6], 10, 32); err == nil {
		a.latency = time.Duration(ms) * time.Millisecond
	}
	if len(f) > 13 {
		a.keyID, a.secret = keyOrSecret(dash(f[13]), "")
	}
	return in.event(a)
}
