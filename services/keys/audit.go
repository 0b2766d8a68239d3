package keys

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// change is one change of what is no key, for the audit.
type change struct {
	typ, kind, id, org string
	before, after      any
}

// audited tells of a change and then makes it. Telling comes first, so that a
// crash in between leaves a record of what was tried and never a change that
// nobody heard of; a change that fails is told as well.
func (s *Service) audited(ctx context.Context, by actor, c change, make func() error) error {
	if err := s.tell(ctx, by, c, ""); err != nil {
		return err
	}
	err := make()
	if err != nil {
		c.typ += ".failed"
		if tellErr := s.tell(context.WithoutCancel(ctx), by, c, "the change above was not made"); tellErr != nil {
			s.log.Error("failed change is not in the audit", "type", c.typ, "id", c.id, "error", tellErr)
		}
	}
	return err
}

func (s *Service) tell(ctx context.Context, by actor, c change, reason string) error {
	if !s.js.Conn().IsConnected() {
		return fmt.Errorf("publish audit event: %w", nats.ErrDisconnected)
	}
	now := s.now().UTC()
	ev := key.AuditEvent{
		ID: s.ids.next("evt", now), Type: c.typ, Time: now, Actor: by.id, ActorIP: by.ip, OrgID: c.org, Kind: c.kind, Subject: c.id, Reason: reason,
	}
	var err, err2 error
	if c.before != nil {
		ev.Before, err = json.Marshal(c.before)
	}
	if c.after != nil {
		ev.After, err2 = json.Marshal(c.after)
	}
	body, err3 := json.Marshal(ev)
	if err := errors.Join(err, err2, err3); err != nil {
		return fmt.Errorf("encode audit event: %w", err)
	}
	if _, err := s.js.Publish(ctx, "audit."+c.kind+"."+c.id, body, jetstream.WithMsgID(ev.ID)); err != nil {
		return fmt.Errorf("publish audit event: %w", err)
	}
	return nil
}

// AuditEvent is a change as the API shows it.
type AuditEvent struct {
	ID      string    `json:"id"`
	Type    string    `json:"type" example:"api_key.rotated"`
	Time    time.Time `json:"time"`
	Actor   string    `json:"actor" doc:"Id of the key that made the change, or “system”."`
	ActorIP string    `json:"actor_ip,omitempty"`
	OrgID   string    `json:"org_id"`
	Kind    string    `json:"kind" doc:"api_key, org or webhook."`
	Subject string    `json:"subject" doc:"Id of what was changed."`
	Reason  string    `json:"reason,omitempty"`
	Before  any       `json:"before,omitempty" doc:"The object before the change, without secrets and hashes."`
	After   any       `json:"after,omitempty" doc:"The object after the change, without secrets and hashes."`
}

type auditInput struct {
	OrgID  string `query:"org_id" maxLength:"128"`
	KeyID  string `query:"key_id" maxLength:"128" doc:"Only what happened to this key."`
	Type   string `query:"type" maxLength:"64" doc:"Only changes of this type."`
	Actor  string `query:"actor" maxLength:"128" doc:"Only what this key changed."`
	Cursor string `query:"cursor" maxLength:"300" doc:"next_cursor of the page before."`
	Limit  int    `query:"limit" default:"100" minimum:"1" maximum:"500"`
}

type auditOutput struct {
	Body struct {
		Events     []AuditEvent `json:"events" nullable:"false"`
		NextCursor string       `json:"next_cursor,omitempty" doc:"Absent at the end. A page may hold fewer events than asked for, and still be followed by another."`
	}
}

func (s *Service) registerAudit(a huma.API) {
	huma.Register(a, operation(http.MethodGet, "/v1/audit", "list-audit", "Audit", "What was changed, by whom, newest first", "audit:read", http.StatusOK), s.listAudit)
}

// auditScan is how many messages one page may look at: a page of a quiet
// organization on a busy installation may come up short, with a cursor.
const auditScan = 5000

func (s *Service) listAudit(ctx context.Context, in *auditInput) (*auditOutput, error) {
	org, ok := api.From(ctx).Org(in.OrgID)
	if !ok {
		return nil, api.NotFound.New("There is no such organization.")
	}
	if in.KeyID != "" && !validKeyID(in.KeyID) {
		return nil, api.NotFound.New("There is no such key.")
	}
	pos, err := readAuditCursor(in.Cursor)
	if err != nil {
		return nil, err
	}
	keep := func(e AuditEvent) bool {
		return (org == "" || e.OrgID == org) && (in.Type == "" || e.Type == in.Type) && (in.Actor == "" || e.Actor == in.Actor) &&
			(in.KeyID == "" || e.Kind == "api_key" && e.Subject == in.KeyID)
	}
	keys, err := s.openTail(ctx, bus.Keys, in.KeyID, pos.keys, decodeChange)
	if err != nil {
		return nil, err
	}
	sources := []*tail{keys}
	if in.KeyID == "" {
		others, err := s.openTail(ctx, bus.Audit, "", pos.audit, decodeAudit)
		if err != nil {
			return nil, err
		}
		sources = append(sources, others)
	}
	out := &auditOutput{}
	out.Body.Events = []AuditEvent{}
	for scanned := 0; scanned < auditScan && len(out.Body.Events) < in.Limit; scanned++ {
		newest, err := newestOf(ctx, sources)
		if err != nil {
			return nil, err
		}
		if newest == nil {
			return out, nil
		}
		if e := newest.take(); keep(e) {
			out.Body.Events = append(out.Body.Events, e)
		}
	}
	next := auditCursor{keys: keys.next}
	if len(sources) > 1 {
		next.audit = sources[1].next
	}
	if newest, err := newestOf(ctx, sources); err != nil || newest != nil {
		out.Body.NextCursor = next.String()
	}
	return out, nil
}

// tail reads a stream backwards from a sequence.
type tail struct {
	stream jetstream.Stream
	decode func([]byte) (AuditEvent, error)
	// next is the sequence to read next; 0 at the end.
	next uint64
	// first is the first sequence of the stream.
	first uint64
	// only are the sequences of one subject, ascending; nil for all.
	only []AuditEvent
	head *AuditEvent
}

func newestOf(ctx context.Context, sources []*tail) (*tail, error) {
	var newest *tail
	for _, t := range sources {
		if err := t.fill(ctx); err != nil {
			return nil, err
		}
		if t.head != nil && (newest == nil || t.head.Time.After(newest.head.Time)) {
			newest = t
		}
	}
	return newest, nil
}

// openTail begins below sequence before, or at the newest message for 0.
func (s *Service) openTail(ctx context.Context, name, keyID string, before uint64, decode func([]byte) (AuditEvent, error)) (*tail, error) {
	stream, err := s.js.Stream(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", name, err)
	}
	state := stream.CachedInfo().State
	t := &tail{stream: stream, decode: decode, first: max(state.FirstSeq, 1), next: state.LastSeq}
	if before != 0 {
		t.next = min(before-1, state.LastSeq)
	}
	if keyID != "" {
		if t.only, err = history(ctx, stream, keyID); err != nil {
			return nil, err
		}
		t.first, t.next = 1, uint64(len(t.only))
		if before != 0 {
			t.next = min(before-1, t.next)
		}
	}
	return t, nil
}

// history is every change of one key, oldest first.
func history(ctx context.Context, stream jetstream.Stream, keyID string) ([]AuditEvent, error) {
	out := []AuditEvent{}
	consumer, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{FilterSubjects: []string{bus.KeySubject(keyID)}})
	if err != nil {
		return nil, fmt.Errorf("read changes of %s: %w", keyID, err)
	}
	info, err := consumer.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("read changes of %s: %w", keyID, err)
	}
	for want := int(info.NumPending); len(out) < want; {
		msgs, err := consumer.Fetch(min(want-len(out), 500), jetstream.FetchMaxWait(2*time.Second))
		if err != nil {
			return nil, fmt.Errorf("read changes of %s: %w", keyID, err)
		}
		got := len(out)
		for m := range msgs.Messages() {
			e, err := decodeChange(m.Data())
			if err != nil {
				return nil, err
			}
			out = append(out, e)
		}
		if len(out) == got {
			return nil, fmt.Errorf("read changes of %s: %w", keyID, errors.Join(context.DeadlineExceeded, msgs.Error()))
		}
	}
	return out, nil
}

// fill reads the next event into head, skipping what is no longer stored.
func (t *tail) fill(ctx context.Context) error {
	for t.head == nil && t.next >= t.first && t.next > 0 {
		if t.only != nil {
			t.head = &t.only[t.next-1]
			return nil
		}
		msg, err := t.stream.GetMsg(ctx, t.next)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			t.next--
			continue
		}
		if err != nil {
			return fmt.Errorf("read message %d: %w", t.next, err)
		}
		e, err := t.decode(msg.Data)
		if err != nil {
			return err
		}
		t.head = &e
	}
	return nil
}

func (t *tail) take() AuditEvent {
	e := *t.head
	t.head = nil
	t.next--
	return e
}

func decodeChange(body []byte) (AuditEvent, error) {
	var c key.Change
	if err := json.Unmarshal(body, &c); err != nil {
		return AuditEvent{}, fmt.Errorf("decode change: %w", err)
	}
	e := AuditEvent{
		ID: c.ID, Type: c.Type, Time: c.Time, Actor: c.Actor, ActorIP: showIP(c.ActorIP), OrgID: c.Record.OrgID, Kind: "api_key",
		Subject: c.Record.ID, Reason: c.Reason, After: showKey(c.Record, c.Time),
	}
	if c.Before != nil {
		e.Before = showKey(*c.Before, c.Time)
	}
	return e, nil
}

func decodeAudit(body []byte) (AuditEvent, error) {
	var a key.AuditEvent
	if err := json.Unmarshal(body, &a); err != nil {
		return AuditEvent{}, fmt.Errorf("decode audit event: %w", err)
	}
	e := AuditEvent{
		ID: a.ID, Type: a.Type, Time: a.Time, Actor: a.Actor, ActorIP: showIP(a.ActorIP), OrgID: a.OrgID, Kind: a.Kind, Subject: a.Subject, Reason: a.Reason,
	}
	if a.Before != nil {
		e.Before = a.Before
	}
	if a.After != nil {
		e.After = a.After
	}
	return e, nil
}

func showIP(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// auditCursor is the sequence below which each stream goes on, plus one so that
// 0 means the newest.
type auditCursor struct{ keys, audit uint64 }

func (c auditCursor) String() string {
	return writeCursor(strconv.FormatUint(c.keys+1, 10) + "." + strconv.FormatUint(c.audit+1, 10))
}

func readAuditCursor(s string) (c auditCursor, err error) {
	text, err := readCursor(s)
	if err != nil || text == "" {
		return c, err
	}
	a, b, _ := strings.Cut(text, ".")
	var err2 error
	c.keys, err = strconv.ParseUint(a, 10, 64)
	c.audit, err2 = strconv.ParseUint(b, 10, 64)
	if err := errors.Join(err, err2); err != nil || c.keys == 0 || c.audit == 0 {
		return c, api.Invalid.New("The cursor is not one that this API gave out.", api.Fault("query.cursor", "take next_cursor of the page before, unchanged"))
	}
	return c, nil
}
