package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Problem is the body of every error: RFC 9457 problem details, with the
// request's id and the single faults of a bad request as extension members.
type Problem struct {
	// Type is a URI reference under which this API explains the problem; it does not change.
	Type      string              `json:"type" format:"uri-reference" doc:"Names the problem; a GET explains it." example:"/problems/insufficient-scope"`
	Title     string              `json:"title" doc:"The problem in short, the same each time."`
	Status    int                 `json:"status" doc:"HTTP status code."`
	Detail    string              `json:"detail,omitempty" doc:"What was wrong this time, and what to do."`
	Instance  string              `json:"instance,omitempty" format:"uri-reference" doc:"The path that was asked for."`
	RequestID string              `json:"request_id,omitempty" doc:"Find the request in the logs by it."`
	Errors    []*huma.ErrorDetail `json:"errors,omitempty" doc:"What is wrong with the request, one by one."`

	header http.Header
	cause  error
}

func (p *Problem) Error() string { return p.Detail }

func (p *Problem) Unwrap() error { return p.cause }

// GetStatus and GetHeaders and ContentType are what huma asks of an error.
func (p *Problem) GetStatus() int { return p.Status }

// GetHeaders are sent with the problem.
func (p *Problem) GetHeaders() http.Header { return p.header }

// ContentType is application/problem+json, whatever JSON was agreed on.
func (p *Problem) ContentType(string) string { return "application/problem+json" }

// Kind is a type of problem: a stable URI and its meaning.
type Kind struct {
	slug   string
	status int
	title  string
	// explain is the page behind the URI: what it means and what to do.
	explain string
}

// Kinds of problems.
var (
	MissingKey        = newKind("missing-key", 401, "A key is needed", "The request carried no key. Send it as “Authorization: Bearer lk_…” or in the header X-API-Key.")
	InvalidKey        = newKind("invalid-key", 401, "The key is not valid", "The key is malformed, unknown, expired, suspended or revoked; which of these is not told. Check that it was copied whole, or ask its owner for a new one.")
	InsufficientScope = newKind("insufficient-scope", 403, "The key lacks a scope", "The key is valid and does not hold the scope that the WWW-Authenticate header names. Ask for a key that holds it, or for resource:* or full_access.")
	AddressNotAllowed = newKind("address-not-allowed", 403, "The key may not be used from here", "The key is limited to certain source addresses, and this request came from another one.")
	NotYours          = newKind("not-yours", 403, "Outside of the key's organization", "The call reaches beyond the organization of the key; only keys of the installation's own organization may make it.")
	BeyondOwnScopes   = newKind("beyond-own-scopes", 403, "A key grants no more than it holds", "The call would hand out scopes that the calling key does not hold itself.")
	InvalidRequest    = newKind("invalid-request", 400, "The request is malformed", "The request could not be read: broken JSON, two different keys at once, or an empty one. The detail says which.")
	NotFound          = newKind("not-found", 404, "Not found", "There is nothing under this path that the key may see.")
	MethodNotAllowed  = newKind("method-not-allowed", 405, "Method not allowed", "The path exists, with other methods; the Allow header names them.")
	Conflict          = newKind("conflict", 409, "In conflict with the present state", "The object is in a state that does not allow the call, or somebody else changed it meanwhile. Read it again and decide anew.")
	TooLarge          = newKind("too-large", 413, "The body is too large", "The body exceeds the limit that the detail names.")
	Unsupported       = newKind("unsupported-media-type", 415, "Unsupported content type", "Send the body as application/json.")
	Invalid           = newKind("invalid-parameters", 422, "The request is not valid", "The request could be read, and something in it is not allowed. The member “errors” names each fault and where it lies.")
	Internal          = newKind("internal", 500, "Something went wrong here", "An error that is not the caller's. The log has it under the request's id.")
	Unavailable       = newKind("unavailable", 503, "Not available just now", "A server that this call needs does not answer. Nothing is known to have been changed; try again.")
	other             = newKind("other", 0, "", "The request failed; its status and detail say how.")
)

var kinds = map[string]*Kind{}

func newKind(slug string, status int, title, explain string) *Kind {
	k := &Kind{slug: slug, status: status, title: title, explain: explain}
	kinds[slug] = k
	return k
}

// problemPath is where the pages of the kinds are served.
const problemPath = "/problems/"

// Fault is one thing wrong with a request: where ("body.scopes[1]") and what.
func Fault(location, format string, args ...any) error {
	return &huma.ErrorDetail{Location: location, Message: fmt.Sprintf(format, args...)}
}

// New makes a problem of this kind. Faults become the member "errors".
func (k *Kind) New(detail string, faults ...error) *Problem {
	p := &Problem{Type: problemPath + k.slug, Title: k.title, Status: k.status, Detail: detail}
	for _, f := range faults {
		var d huma.ErrorDetailer
		switch {
		case f == nil:
		case errors.As(f, &d):
			p.Errors = append(p.Errors, d.ErrorDetail())
		default:
			p.Errors = append(p.Errors, &huma.ErrorDetail{Message: f.Error()})
		}
	}
	return p
}

// Is reports whether err is a problem of this kind.
func (k *Kind) Is(err error) bool {
	var p *Problem
	return errors.As(err, &p) && p.Type == problemPath+k.slug
}

func (p *Problem) with(name, value string) *Problem {
	if p.header == nil {
		p.header = http.Header{}
	}
	p.header.Set(name, value)
	return p
}

// Write answers a request that is not huma's with the problem.
func (p *Problem) Write(w http.ResponseWriter, r *http.Request) {
	for name, values := range p.header {
		w.Header()[name] = values
	}
	out := *p
	out.Instance, out.RequestID = r.URL.Path, requestID(r.Context())
	w.Header().Set("Content-Type", p.ContentType(""))
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(&out)
}

// huma has one hook for the whole process through which it makes errors.
func init() {
	huma.NewError = func(status int, msg string, errs ...error) huma.StatusError {
		return fromStatus(status, msg, errs...)
	}
	huma.NewErrorWithContext = func(ctx huma.Context, status int, msg string, errs ...error) huma.StatusError {
		if status == http.StatusInternalServerError {
			return fromUnexpected(ctx.Context(), errors.Join(errs...))
		}
		return fromStatus(status, msg, errs...)
	}
}

func fromStatus(status int, msg string, errs ...error) *Problem {
	kind := other
	for _, k := range []*Kind{InvalidRequest, InvalidKey, InsufficientScope, NotFound, MethodNotAllowed, Conflict, TooLarge, Unsupported, Invalid, Internal, Unavailable} {
		if k.status == status {
			kind = k
			break
		}
	}
	if msg == "validation failed" { // what huma says of everything
		msg = "Something in the request is not allowed; “errors” says what."
		if kind == Unsupported {
			msg = "Send the body as JSON, with the header Content-Type: application/json."
		}
	}
	p := kind.New(msg, errs...)
	for _, e := range p.Errors {
		if e.Location == "body" {
			e.Value = nil // the whole body, back to whoever sent it
		}
	}
	if p.Status = status; p.Title == "" {
		p.Title = http.StatusText(status)
	}
	return p
}

// fromUnexpected keeps an unexpected error for the log and tells the caller
// only whether to try again.
func fromUnexpected(ctx context.Context, err error) *Problem {
	p := Internal.New("The request failed; the log says why.")
	if isUnavailable(err) {
		p = Unavailable.New("NATS does not answer; try again.").with("Retry-After", "1")
	}
	p.cause = err
	if log := logFrom(ctx); log != nil {
		log.ErrorContext(ctx, "request failed", "request_id", requestID(ctx), "error", err)
	}
	return p
}

func isUnavailable(err error) bool {
	for _, e := range []error{
		nats.ErrTimeout, nats.ErrNoResponders, nats.ErrConnectionClosed, nats.ErrDisconnected, nats.ErrReconnectBufExceeded,
		jetstream.ErrNoStreamResponse, jetstream.ErrJetStreamNotEnabled, context.DeadlineExceeded,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
