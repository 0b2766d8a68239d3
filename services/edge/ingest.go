package edge

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/pkg/usage"
	"github.com/latchkey-dev/latchkey/schemas/key"
	schema "github.com/latchkey-dev/latchkey/schemas/usage"
)

// Scopes of POST /v1/usage.
var (
	needWrite = edge.Require("usage:write")
	// needHistory is for events that mail nobody: who may send those could hide.
	needHistory = edge.Require("usage:write", "usage:import")
)

const (
	// storeTimeout is how long JetStream may take to store a body.
	storeTimeout = 20 * time.Second
	// readTimeout is how long a client may take to send one.
	readTimeout = 2 * time.Minute
)

// accepted is the answer to POST /v1/usage.
type accepted struct {
	Accepted int        `json:"accepted"`
	Rejected []rejected `json:"rejected"`
}

type rejected struct {
	Index int    `json:"index"`
	Error string `json:"error"`
}

// serveUsage takes usage events and answers 202 once JetStream has stored them.
// The post itself makes no event unless it is denied: what it carries is the usage.
func (s *Service) serveUsage(w http.ResponseWriter, r *http.Request) {
	need, publisher := needWrite, s.live
	switch mode := r.Header.Get(schema.HeaderMode); mode {
	case "", "live":
	case schema.ModeHistory:
		need, publisher = needHistory, s.history
	default:
		invalid(w, fmt.Sprintf("%s %q is neither live nor %s", schema.HeaderMode, mode, schema.ModeHistory))
		return
	}
	k := s.authenticate(w, r, need)
	if k == nil {
		return
	}
	body, release, ok := s.readBody(w, r)
	if !ok {
		return
	}
	defer release()
	events, answer, err := s.decodeEvents(r, body, k)
	if err != nil {
		refuseBody(w, err)
		return
	}
	if !s.storeEvents(w, r, publisher, events) {
		s.metrics.ingested["not_stored"].Add(float64(len(events)))
		return
	}
	s.metrics.ingested["accepted"].Add(float64(len(events)))
	s.metrics.ingested["rejected"].Add(float64(len(answer.Rejected)))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusAccepted)
	_ = json.NewEncoder(w).Encode(answer)
}

// authenticate is the key of a request to this service, or nil once it was refused.
func (s *Service) authenticate(w http.ResponseWriter, r *http.Request, need edge.Need) *edge.Key {
	now, source := s.now(), s.edge.Source(r)
	v := s.edge.DecideAt(now, s.edge.Secret(r.Header), source, need)
	s.metrics.decided(v.Reason)
	if v.Allowed() {
		return v.Key
	}
	status := s.edge.Answer(v, need).Status
	s.edge.Record(v, need, &schema.Event{
		Time: now, SourceIP: source, Method: r.Method, Route: "/v1/usage", Status: uint16(status), UserAgent: r.UserAgent(),
	})
	s.edge.Deny(w, r, v, need)
	return nil
}

// readBody reads the whole body, unpacked, within the limits; release gives its
// memory back.
func (s *Service) readBody(w http.ResponseWriter, r *http.Request) (body []byte, release func(), ok bool) {
	weight := s.cfg.MaxBody
	encoding := strings.ToLower(r.Header.Get("Content-Encoding"))
	if r.ContentLength >= 0 && (encoding == "" || encoding == "identity") {
		weight = r.ContentLength
	}
	if weight > s.cfg.MaxBody {
		tooLarge(w, s.cfg.MaxBody)
		return nil, nil, false
	}
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	if err := s.bodies.Acquire(ctx, weight); err != nil {
		notStored(w, "Too many bodies are being worked on.", 1)
		return nil, nil, false
	}
	release = func() { s.bodies.Release(weight) }
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(readTimeout))
	body, err := readAll(http.MaxBytesReader(w, r.Body, s.cfg.MaxBody), encoding, r.ContentLength, s.cfg.MaxBody)
	if err == nil {
		return body, release, true
	}
	release()
	var large *http.MaxBytesError
	var bad unsupportedEncoding
	switch {
	case errors.As(err, &large), errors.Is(err, errLarge):
		tooLarge(w, s.cfg.MaxBody)
	case errors.As(err, &bad):
		unsupported(w, err.Error())
	default:
		invalid(w, "The body cannot be read: "+err.Error())
	}
	return nil, nil, false
}

type unsupportedEncoding string

func (e unsupportedEncoding) Error() string {
	return fmt.Sprintf("content encoding %.40q is not supported, send gzip or none", string(e))
}

var errLarge = errors.New("body is too large")

func readAll(r io.Reader, encoding string, length, limit int64) ([]byte, error) {
	var buf bytes.Buffer
	switch encoding {
	case "", "identity":
		if length > 0 {
			buf.Grow(int(min(length, limit)) + bytes.MinRead)
		}
	case "gzip", "x-gzip":
		unzip, err := gzip.NewReader(r)
		if err != nil {
			return nil, fmt.Errorf("read gzip: %w", err)
		}
		r = unzip
	default:
		return nil, unsupportedEncoding(encoding)
	}
	n, err := buf.ReadFrom(io.LimitReader(r, limit+1))
	if n > limit {
		return nil, errLarge
	}
	return buf.Bytes(), err
}

// decodeEvents reads a body's events, and refuses those that key k may not publish.
func (s *Service) decodeEvents(r *http.Request, body []byte, k *edge.Key) ([]schema.Event, accepted, error) {
	answer := accepted{Rejected: []rejected{}}
	var events []schema.Event
	ids := newIDs(k, r.Header.Get("Idempotency-Key"))
	err := schema.Decode(r.Header.Get("Content-Type"), body, s.now(), func(i int, ev *schema.Event, err error) {
		if err == nil {
			err = s.mayPublish(k, ev)
		}
		if err != nil {
			answer.Rejected = append(answer.Rejected, rejected{i, err.Error()})
			return
		}
		events = append(events, *ev)
		ids.give(&events[len(events)-1], i)
	})
	answer.Accepted = len(events)
	return events, answer, err
}

// mayPublish is the wall between organizations: a key speaks for its own, and
// only keys of the installation's own organization for all.
func (s *Service) mayPublish(k *edge.Key, ev *schema.Event) error {
	if k.OrgID() == key.SystemOrg {
		return nil
	}
	if ev.OrgID != k.OrgID() {
		return fmt.Errorf("org_id %q is not the organization of the key that publishes", ev.OrgID)
	}
	if about := s.keys.ByID(ev.KeyID); about != nil && about.OrgID() != ev.OrgID {
		return fmt.Errorf("key_id %q is not a key of org_id %q", ev.KeyID, ev.OrgID)
	}
	return nil
}

// ids makes the ids of events that have none from the client's Idempotency-Key,
// so that the same post sent again stores nothing twice. Without that header the
// publisher makes them.
type ids struct {
	base [sha256.Size]byte
	on   bool
}

func newIDs(k *edge.Key, idempotency string) ids {
	if idempotency == "" {
		return ids{}
	}
	return ids{base: sha256.Sum256([]byte(k.ID() + "\x00" + idempotency)), on: true}
}

func (d ids) give(ev *schema.Event, index int) {
	if !d.on || ev.ID != "" {
		return
	}
	var b [sha256.Size + 8]byte
	copy(b[:], d.base[:])
	binary.BigEndian.PutUint64(b[sha256.Size:], uint64(index))
	sum := sha256.Sum256(b[:])
	var id [16]byte
	copy(id[:], sum[:])
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80 // UUID version 8, RFC 9562
	ev.ID = schema.UUID(id)
}

// storeEvents returns true once JetStream has all of them.
func (s *Service) storeEvents(w http.ResponseWriter, r *http.Request, publisher *usage.Publisher, events []schema.Event) bool {
	if len(events) == 0 {
		return true
	}
	if !s.nc.IsConnected() {
		notStored(w, "NATS is away.", 2)
		return false
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTimeout)
	defer cancel()
	err := publisher.Publish(ctx, events)
	switch {
	case err == nil:
		return true
	case errors.Is(err, usage.ErrFull):
		notStored(w, "The stream is full: its consumers are behind.", 10)
	default:
		notStored(w, "JetStream did not take the events in time.", 2)
	}
	s.log.Warn("store posted events", "events", len(events), "error", err)
	return false
}

func refuseBody(w http.ResponseWriter, err error) {
	if errors.Is(err, schema.ErrContentType) {
		unsupported(w, err.Error())
		return
	}
	invalid(w, err.Error())
}

func problem(w http.ResponseWriter, status int, kind, title, detail string) {
	w.Header().Set("Cache-Control", "no-store")
	edge.WriteProblem(w, edge.Problem{Type: edge.ProblemBase + kind, Title: title, Status: status, Detail: detail, Instance: "/v1/usage"})
}

func invalid(w http.ResponseWriter, detail string) {
	problem(w, http.StatusBadRequest, "invalid-request", "The request cannot be read", detail)
}

func unsupported(w http.ResponseWriter, detail string) {
	problem(w, http.StatusUnsupportedMediaType, "unsupported-media-type", "Unsupported media type", detail)
}

func tooLarge(w http.ResponseWriter, limit int64) {
	problem(w, http.StatusRequestEntityTooLarge, "too-large", "The body is too large",
		fmt.Sprintf("At most %d bytes are accepted in one body, unpacked. Send the events in parts.", limit))
}

func notStored(w http.ResponseWriter, detail string, retrySeconds int) {
	w.Header().Set("Retry-After", strconv.Itoa(retrySeconds))
	problem(w, http.StatusServiceUnavailable, "not-stored", "The events were not stored", detail+" Send the same body again.")
}
