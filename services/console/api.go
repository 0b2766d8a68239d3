package console

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/baseline"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// Alert is an alert as the API shows it: CONTRACTS' alert, with the verdict.
type Alert struct {
	ID         string     `json:"id"`
	Time       time.Time  `json:"time" doc:"Of the event that raised the alert."`
	DetectedAt time.Time  `json:"detected_at"`
	OrgID      string     `json:"org_id"`
	KeyID      string     `json:"key_id"`
	Triggers   []string   `json:"triggers" nullable:"false"`
	Severity   string     `json:"severity" doc:"low, medium, high or critical."`
	Score      float64    `json:"score" doc:"-log10 of the combined p-value."`
	Summary    string     `json:"summary"`
	SourceIP   string     `json:"source_ip"`
	Country    string     `json:"country,omitempty"`
	ASN        uint32     `json:"asn,omitempty"`
	ASName     string     `json:"as_name,omitempty"`
	UserAgent  string     `json:"user_agent,omitempty"`
	Method     string     `json:"method,omitempty"`
	Route      string     `json:"route,omitempty"`
	Evidence   []Evidence `json:"evidence" nullable:"false"`
	EventID    string     `json:"event_id"`
	Revision   int        `json:"revision" doc:"Counts from 1 as the episode grows."`
	Historical bool       `json:"historical" doc:"From imported history: stored, never mailed."`
	Verdict    *Verdict   `json:"verdict,omitempty"`
}

// Evidence is what one trigger saw, against what is usual for the key.
type Evidence struct {
	Trigger  string  `json:"trigger"`
	Observed string  `json:"observed"`
	Usual    string  `json:"usual"`
	PValue   float64 `json:"p_value"`
}

// Verdict is an owner's word on an alert.
type Verdict struct {
	AlertID   string     `json:"alert_id"`
	Verdict   string     `json:"verdict" doc:"expected, planned or compromised."`
	Actor     string     `json:"actor" doc:"Id of the key that said so, or “console”."`
	Time      time.Time  `json:"time"`
	ExpiresAt *time.Time `json:"expires_at,omitempty" doc:"When a verdict that quiets alerts ends."`
}

func showVerdict(id string, v *verdict) *Verdict {
	if v == nil {
		return nil
	}
	return &Verdict{AlertID: id, Verdict: v.Verdict, Actor: v.Actor, Time: v.Time, ExpiresAt: v.ExpiresAt}
}

func showAlert(e *episode) Alert {
	a := Alert{
		ID: e.ID, Time: e.Time, DetectedAt: e.DetectedAt, OrgID: e.OrgID, KeyID: e.KeyID, Triggers: e.Triggers, Severity: e.Severity,
		Score: e.Score, Summary: e.Summary, Country: e.Country, ASN: e.ASN, ASName: e.ASName, UserAgent: e.UserAgent, Method: e.Method,
		Route: e.Route, Evidence: []Evidence{}, EventID: e.EventID, Revision: e.Revision, Historical: e.Historical,
		Verdict: showVerdict(e.ID, e.Verdict),
	}
	if a.Triggers == nil {
		a.Triggers = []string{}
	}
	if e.SourceIP.IsValid() {
		a.SourceIP = e.SourceIP.String()
	}
	for _, x := range e.Evidence {
		a.Evidence = append(a.Evidence, Evidence(x))
	}
	return a
}

// Register adds the read API of alerts, activity and baselines.
func (s *Service) Register(a huma.API) {
	op := func(method, path, id, tag, summary, scope string, errs ...int) huma.Operation {
		return huma.Operation{
			OperationID: id, Method: method, Path: path, Tags: []string{tag}, Summary: summary, Security: api.Requires(scope),
			MaxBodyBytes: api.MaxBody, Errors: append([]int{401, 403, 422}, errs...),
		}
	}
	huma.Register(a, op(http.MethodGet, "/v1/alerts", "list-alerts", "Alerts", "List alerts, newest first", "alerts:read"), s.listAlerts)
	huma.Register(a, op(http.MethodGet, "/v1/alerts/{id}", "get-alert", "Alerts", "Show an alert with its evidence", "alerts:read", 404), s.getAlert)
	huma.Register(a, op(http.MethodPost, "/v1/alerts/{id}/verdict", "set-verdict", "Alerts", "Say what an alert was", "alerts:write", 400, 404), s.setVerdict)
	huma.Register(a, op(http.MethodGet, "/v1/api-keys/{id}/activity", "get-activity", "Keys", "What a key did, by hour or day", "usage:read", 404, 503), s.getActivity)
	huma.Register(a, op(http.MethodGet, "/v1/api-keys/{id}/baseline", "get-baseline", "Keys", "What is usual for a key", "usage:read", 404, 503), s.getBaseline)
}

type listAlertsInput struct {
	OrgID    string    `query:"org_id" maxLength:"128"`
	KeyID    string    `query:"key_id" maxLength:"128"`
	Since    time.Time `query:"since" doc:"Alerts at or after this time."`
	Trigger  string    `query:"trigger" maxLength:"64" example:"new_ip_range"`
	Severity string    `query:"severity" enum:"low,medium,high,critical"`
	Cursor   string    `query:"cursor" doc:"next_cursor of the page before." maxLength:"400"`
	Limit    int       `query:"limit" default:"100" minimum:"1" maximum:"1000"`
}

type listAlertsOutput struct {
	Body struct {
		Alerts     []Alert `json:"alerts" nullable:"false"`
		NextCursor string  `json:"next_cursor,omitempty" doc:"Absent on the last page."`
	}
}

func (s *Service) listAlerts(ctx context.Context, in *listAlertsInput) (*listAlertsOutput, error) {
	org, ok := api.From(ctx).Org(in.OrgID)
	if !ok {
		return nil, api.NotFound.New("There is no such organization.")
	}
	before, err := readCursor(in.Cursor)
	if err != nil {
		return nil, api.Invalid.New("The cursor is not one of this API.", api.Fault("query.cursor", "is not a next_cursor of a page before"))
	}
	page, more := s.alerts.list(alertFilter{
		Org: org, Key: in.KeyID, Trigger: in.Trigger, Severity: in.Severity, Since: in.Since, Before: before, Limit: in.Limit,
	})
	out := &listAlertsOutput{}
	out.Body.Alerts = make([]Alert, len(page))
	for i := range page {
		out.Body.Alerts[i] = showAlert(&page[i])
	}
	if more {
		out.Body.NextCursor = writeCursor(&page[len(page)-1].Alert)
	}
	return out, nil
}

func writeCursor(a *alert.Alert) string {
	return base64.RawURLEncoding.EncodeToString([]byte(a.Time.UTC().Format(time.RFC3339Nano) + " " + a.ID))
}

func readCursor(cursor string) (position, error) {
	if cursor == "" {
		return position{}, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil {
		return position{}, err
	}
	at, id, ok := strings.Cut(string(raw), " ")
	if !ok || id == "" {
		return position{}, errors.New("cursor has no id")
	}
	t, err := time.Parse(time.RFC3339Nano, at)
	return position{t, id}, err
}

type alertInput struct {
	ID string `path:"id" maxLength:"200"`
}

type alertOutput struct{ Body Alert }

func (s *Service) getAlert(ctx context.Context, in *alertInput) (*alertOutput, error) {
	e, ok := s.alerts.get(in.ID)
	if !ok || !api.From(ctx).Sees(e.OrgID) {
		return nil, api.NotFound.New("There is no such alert.")
	}
	return &alertOutput{Body: showAlert(&e)}, nil
}

type verdictInput struct {
	ID   string `path:"id" maxLength:"200"`
	Body struct {
		Verdict string `json:"verdict" enum:"expected,compromised,planned"`
	}
}

type verdictOutput struct{ Body Verdict }

func (s *Service) setVerdict(ctx context.Context, in *verdictInput) (*verdictOutput, error) {
	p := api.From(ctx)
	e, ok := s.alerts.get(in.ID)
	if !ok || !p.Sees(e.OrgID) {
		return nil, api.NotFound.New("There is no such alert.")
	}
	by := &viewer{KeyID: p.KeyID, IP: p.IP}
	v, err := s.judge(ctx, &e, in.Body.Verdict, by)
	if err != nil {
		return nil, err
	}
	return &verdictOutput{Body: *showVerdict(e.ID, v)}, nil
}

// verdictLife is how long a verdict that quiets alerts holds: a thief who gives
// one does not whitelist himself for ever.
var verdictLife = map[string]time.Duration{
	"expected":    90 * 24 * time.Hour,
	"planned":     7 * 24 * time.Hour,
	"compromised": 0, // quiets nothing
}

// judge tells of a verdict and then gives it.
func (s *Service) judge(ctx context.Context, e *episode, word string, by *viewer) (*verdict, error) {
	life, ok := verdictLife[word]
	if !ok {
		return nil, api.Invalid.New("A verdict is expected, planned or compromised.")
	}
	now := s.now().UTC()
	v := &verdict{Verdict: word, Actor: by.actor(), Time: now}
	if life > 0 {
		until := now.Add(life)
		v.ExpiresAt = &until
	}
	after, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode verdict: %w", err)
	}
	ev := key.AuditEvent{
		ID: fmt.Sprintf("evt_%s_%d", e.ID, now.UnixNano()), Type: "alert.verdict", Time: now, Actor: by.actor(), ActorIP: by.IP,
		OrgID: e.OrgID, Kind: "alert", Subject: e.ID, After: after,
	}
	if e.Verdict != nil {
		if ev.Before, err = json.Marshal(e.Verdict); err != nil {
			return nil, fmt.Errorf("encode verdict: %w", err)
		}
	}
	body, err := json.Marshal(ev)
	if err != nil {
		return nil, fmt.Errorf("encode audit event: %w", err)
	}
	if _, err := s.js.Publish(ctx, "audit.alert."+usage.SubjectToken(e.ID), body, jetstream.WithMsgID(ev.ID)); err != nil {
		return nil, fmt.Errorf("publish audit event: %w", err)
	}
	kv, err := s.js.KeyValue(ctx, bus.Verdicts)
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bus.Verdicts, err)
	}
	if _, err := kv.Put(ctx, e.ID, after); err != nil {
		return nil, fmt.Errorf("write verdict: %w", err)
	}
	s.alerts.setVerdict(e.ID, *v) // who gave it sees it at once
	return v, nil
}

// keyOwner is the organization whose key it is, for who asks; false if the key
// does not exist for them. A key that Latchkey does not manage belongs to the
// organization that its events name.
func (s *Service) keyOwner(ctx context.Context, id string, sees func(string) bool, org string) (string, bool, error) {
	if rec, ok := s.keys.Get(id); ok {
		return rec.OrgID, sees(rec.OrgID), nil
	}
	if page, _ := s.alerts.list(alertFilter{Key: id, Org: org, Limit: 1}); len(page) > 0 {
		return page[0].OrgID, true, nil
	}
	uses, err := s.usage.keyUses(ctx, org)
	if err != nil {
		return "", false, err
	}
	use, ok := uses[id]
	return use.OrgID, ok && sees(use.OrgID), nil
}

// askedKey is [Service.keyOwner] for the API, its errors as problems.
func (s *Service) askedKey(ctx context.Context, id string) (string, error) {
	p := api.From(ctx)
	limit, _ := p.Org("")
	org, ok, err := s.keyOwner(ctx, id, p.Sees, limit)
	if err != nil {
		return "", unavailable(err)
	}
	if !ok {
		return "", api.NotFound.New("There is no such key.")
	}
	return org, nil
}

func unavailable(err error) error {
	if errors.Is(err, errNoClickHouse) {
		return api.Unavailable.New("This needs ClickHouse, and none is configured (LATCHKEY_CLICKHOUSE_URL).")
	}
	return api.Unavailable.New("This needs ClickHouse, which does not answer just now.")
}

type activityInput struct {
	ID       string    `path:"id" maxLength:"128"`
	From     time.Time `query:"from" doc:"30 days ago if absent."`
	To       time.Time `query:"to" doc:"Now if absent."`
	Interval string    `query:"interval" enum:"hour,day" default:"day"`
}

// Activity is a key's use in one interval.
type Activity struct {
	Time   time.Time `json:"time" doc:"When the interval begins, UTC."`
	Events uint64    `json:"events"`
	Denied uint64    `json:"denied"`
}

type activityOutput struct {
	Body struct {
		KeyID    string     `json:"key_id"`
		OrgID    string     `json:"org_id"`
		Interval string     `json:"interval"`
		Activity []Activity `json:"activity" nullable:"false"`
	}
}

// maxBins is how many intervals one answer may have.
const maxBins = 24 * 92

func (s *Service) getActivity(ctx context.Context, in *activityInput) (*activityOutput, error) {
	width := 24 * time.Hour
	if in.Interval == "hour" {
		width = time.Hour
	}
	to, from := in.To, in.From
	if to.IsZero() {
		to = s.now()
	}
	if from.IsZero() {
		from = to.AddDate(0, 0, -30)
	}
	if to.Before(from) || to.Sub(from) > maxBins*width {
		return nil, api.Invalid.New("The interval is empty or too long.", api.Fault("query.from", "must lie before to, and by at most %d intervals", maxBins))
	}
	org, err := s.askedKey(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	bins, err := s.usage.activity(ctx, org, in.ID, from, to, width)
	if err != nil {
		return nil, unavailable(err)
	}
	out := &activityOutput{}
	out.Body.KeyID, out.Body.OrgID, out.Body.Interval, out.Body.Activity = in.ID, org, in.Interval, make([]Activity, len(bins))
	for i, b := range bins {
		out.Body.Activity[i] = Activity(b)
	}
	return out, nil
}

type baselineInput struct {
	ID string `path:"id" maxLength:"128"`
}

type baselineOutput struct{ Body baseline.Row }

func (s *Service) getBaseline(ctx context.Context, in *baselineInput) (*baselineOutput, error) {
	org, err := s.askedKey(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	row, err := s.usage.baseline(ctx, org, in.ID)
	if err != nil {
		return nil, unavailable(err)
	}
	if row == nil {
		return nil, api.NotFound.New("Nothing is known of the key's habits yet.")
	}
	return &baselineOutput{Body: *row}, nil
}
