package edge

import (
	"encoding/json"
	"net/http"
	"strings"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// ProblemBase begins the type URI of every problem; what follows is the name of
// a heading of its page in the documentation.
const ProblemBase = "https://github.com/latchkey-dev/latchkey/blob/main/pkg/edge/PROBLEMS.md#"

// Problem is the body of a refusal, application/problem+json (RFC 9457).
type Problem struct {
	Type     string `json:"type"`
	Title    string `json:"title"`
	Status   int    `json:"status"`
	Detail   string `json:"detail,omitempty"`
	Instance string `json:"instance,omitempty"`
}

// Answer is how a verdict is told to the client.
type Answer struct {
	// Status is 200, 400, 401, 403 or 503.
	Status int
	// Challenge is the value of WWW-Authenticate (RFC 6750), "" if there is none.
	Challenge string
	// Problem is the body; its Instance is left to the caller.
	Problem Problem
}

// Answer says how a verdict is told to the client. A revoked and an expired key
// are told as an unknown one is: whether a key exists or existed is nobody's
// business.
func (e *Edge) Answer(v Verdict, need Need) Answer {
	realm := e.realm()
	switch v.Reason {
	case "":
		return Answer{Status: http.StatusOK}
	case usage.DenyMissingKey:
		return answer(http.StatusUnauthorized, realm, "missing-key", "No API key",
			"This call needs an API key: Authorization: Bearer <key>.")
	case usage.DenyInsufficientScope:
		if len(need.scopes) == 0 {
			return answer(http.StatusForbidden, realm+`, error="insufficient_scope"`,
				"insufficient-scope", "The key lacks a scope", "No scope allows this call.")
		}
		return answer(http.StatusForbidden, realm+`, error="insufficient_scope", scope="`+quote(need.text)+`"`,
			"insufficient-scope", "The key lacks a scope", "This call requires the scope "+need.text+".")
	case usage.DenyIPNotAllowed:
		return answer(http.StatusForbidden, realm+`, error="invalid_token", error_description="the key may not be used from this address"`, "ip-not-allowed", "Address not allowed",
			"The key may not be used from this address.")
	case Unavailable:
		return answer(http.StatusServiceUnavailable, "", "unavailable", "Keys cannot be checked",
			"The gateway has no fresh list of keys. Try again shortly.")
	default:
		return answer(http.StatusUnauthorized, realm+`, error="invalid_token", error_description="the key is not valid"`,
			"invalid-key", "Invalid API key", "The API key is not valid.")
	}
}

// BadRequest is the answer to a request that cannot be judged, whatever its key.
func (e *Edge) BadRequest(title, detail string) Answer {
	return answer(http.StatusBadRequest, e.realm()+`, error="invalid_request"`, "invalid-request", title, detail)
}

// realm begins every challenge.
func (e *Edge) realm() string { return `Bearer realm="` + quote(e.opts.Realm) + `"` }

func answer(status int, challenge, kind, title, detail string) Answer {
	return Answer{Status: status, Challenge: challenge, Problem: Problem{
		Type: ProblemBase + kind, Title: title, Status: status, Detail: detail,
	}}
}

// quote leaves out what may not stand in a quoted-string of a header.
func quote(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return -1
		}
		return r
	}, s)
}

// Deny writes the answer to a verdict that is no allowance.
func (e *Edge) Deny(w http.ResponseWriter, r *http.Request, v Verdict, need Need) {
	a := e.Answer(v, need)
	a.Problem.Instance = r.URL.Path
	a.Write(w)
}

// Write writes the answer: status, WWW-Authenticate, Retry-After and body.
func (a Answer) Write(w http.ResponseWriter) {
	h := w.Header()
	if a.Challenge != "" {
		h.Set("WWW-Authenticate", a.Challenge)
	}
	if a.Status == http.StatusServiceUnavailable {
		h.Set("Retry-After", "1")
	}
	h.Set("Cache-Control", "no-store")
	WriteProblem(w, a.Problem)
}

// WriteProblem writes a problem and its status.
func WriteProblem(w http.ResponseWriter, p Problem) {
	body, err := json.Marshal(p)
	if err != nil { // strings and a number always encode
		body = []byte("{}")
	}
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(p.Status)
	_, _ = w.Write(append(body, '\n'))
}
