package keys

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
)

// webhookEvents are what an endpoint can hear; those about alerts come from the
// detector.
var webhookEvents = []string{
	key.Created, key.Updated, key.Rotated, key.RevokedEv, key.SuspendEv, key.ResumedEv, key.Expiring, key.Expired, key.RotationDue, key.Unused,
	"alert.created", "alert.updated",
}

// Webhook is an endpoint as the API shows it.
type Webhook struct {
	ID             string    `json:"id"`
	OrgID          string    `json:"org_id"`
	URL            string    `json:"url"`
	Events         []string  `json:"events,omitempty" doc:"Absent: all."`
	Description    string    `json:"description,omitempty"`
	Disabled       bool      `json:"disabled"`
	DisabledReason string    `json:"disabled_reason,omitempty"`
	CreatedAt      time.Time `json:"created_at"`
}

// NewWebhook is an endpoint with its signing secret, the only time it is shown.
type NewWebhook struct {
	Secret string `json:"secret" doc:"Signs the deliveries (Standard Webhooks). It cannot be shown again." example:"whsec_…"`
	Webhook
}

func showWebhook(w key.Webhook) Webhook {
	return Webhook{
		ID: w.ID, OrgID: w.OrgID, URL: w.URL, Events: w.Events, Description: w.Description,
		Disabled: w.Disabled, DisabledReason: w.DisabledReason, CreatedAt: w.CreatedAt,
	}
}

type createWebhookInput struct {
	Body struct {
		OrgID       string   `json:"org_id,omitempty" doc:"The organization; that of the calling key if absent." maxLength:"128"`
		URL         string   `json:"url" doc:"Where to POST the events: https. Private and loopback addresses, and http to them, are called only where LATCHKEY_WEBHOOK_ALLOW names their range." maxLength:"2000"`
		Events      []string `json:"events,omitempty" doc:"Types of events to hear; all if absent."`
		Description string   `json:"description,omitempty"`
	}
}

type updateWebhookInput struct {
	ID   string `path:"id"`
	Body struct {
		URL         *string   `json:"url,omitempty" maxLength:"2000"`
		Events      *[]string `json:"events,omitempty"`
		Description *string   `json:"description,omitempty"`
		Disabled    *bool     `json:"disabled,omitempty"`
	}
}

type listWebhooksInput struct {
	OrgID string `query:"org_id" maxLength:"128"`
}

type (
	webhookOutput      struct{ Body Webhook }
	newWebhookOutput   struct{ Body NewWebhook }
	listWebhooksOutput struct {
		Body struct {
			Webhooks []Webhook `json:"webhooks" nullable:"false"`
		}
	}
)

func (s *Service) registerWebhooks(a huma.API) {
	const tag = "Webhooks"
	huma.Register(a, operation(http.MethodPost, "/v1/webhooks", "create-webhook", tag, "Add an endpoint; its signing secret is shown this once", "webhooks:write", http.StatusCreated), s.createWebhook)
	huma.Register(a, operation(http.MethodGet, "/v1/webhooks", "list-webhooks", tag, "List endpoints", "webhooks:read", http.StatusOK), s.listWebhooks)
	huma.Register(a, operation(http.MethodGet, "/v1/webhooks/{id}", "get-webhook", tag, "Show an endpoint", "webhooks:read", http.StatusOK), s.getWebhook)
	huma.Register(a, operation(http.MethodPatch, "/v1/webhooks/{id}", "update-webhook", tag, "Change an endpoint", "webhooks:write", http.StatusOK), s.updateWebhook)
	huma.Register(a, operation(http.MethodPost, "/v1/webhooks/{id}/rotate-secret", "rotate-webhook-secret", tag, "Replace the signing secret; the old one signs along for a day", "webhooks:write", http.StatusCreated), s.rotateWebhook)
	huma.Register(a, operation(http.MethodDelete, "/v1/webhooks/{id}", "delete-webhook", tag, "Remove an endpoint", "webhooks:write", http.StatusNoContent), s.deleteWebhook)
}

func newWebhookSecret() string {
	var b [32]byte
	rand.Read(b[:])
	return "whsec_" + base64.StdEncoding.EncodeToString(b[:])
}

func (s *Service) createWebhook(ctx context.Context, in *createWebhookInput) (*newWebhookOutput, error) {
	p, b := api.From(ctx), &in.Body
	if b.OrgID == "" {
		b.OrgID = p.OrgID
	}
	if _, err := s.visibleOrg(ctx, b.OrgID); err != nil {
		return nil, err
	}
	var f faults
	now := s.now().UTC()
	w := key.Webhook{
		ID: s.ids.next("whk", now), OrgID: b.OrgID, URL: f.endpoint("body.url", b.URL), Events: f.events("body.events", b.Events),
		Description: f.text("body.description", b.Description, maxDescription), Secret: newWebhookSecret(), CreatedAt: now,
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	if err := s.putWebhook(ctx, "webhook.created", nil, w, 0); err != nil {
		return nil, err
	}
	return &newWebhookOutput{NewWebhook{Secret: w.Secret, Webhook: showWebhook(w)}}, nil
}

// putWebhook audits and stores an endpoint over the revision that was read.
func (s *Service) putWebhook(ctx context.Context, typ string, before *key.Webhook, w key.Webhook, revision uint64) error {
	c := change{typ: typ, kind: "webhook", id: w.ID, org: w.OrgID, after: showWebhook(w)}
	if before != nil {
		c.before = showWebhook(*before)
	}
	body, err := json.Marshal(w)
	if err != nil {
		return fmt.Errorf("encode webhook: %w", err)
	}
	return s.audited(ctx, caller(ctx), c, func() error {
		// Update with revision 0 creates.
		_, err := s.webhooks.Update(ctx, w.ID, body, revision)
		var apiErr *jetstream.APIError
		if errors.As(err, &apiErr) && apiErr.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
			return api.Conflict.New("The endpoint was changed meanwhile; read it again.")
		}
		if err != nil {
			return fmt.Errorf("store webhook %s: %w", w.ID, err)
		}
		return nil
	})
}

// readWebhook is an endpoint that the caller sees, and its revision.
func (s *Service) readWebhook(ctx context.Context, id string) (key.Webhook, uint64, error) {
	var w key.Webhook
	notFound := api.NotFound.New("There is no such webhook.")
	if !validKeyID(id) {
		return w, 0, notFound
	}
	entry, err := s.webhooks.Get(ctx, id)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return w, 0, notFound
	}
	if err != nil {
		return w, 0, fmt.Errorf("read webhook %s: %w", id, err)
	}
	if err := json.Unmarshal(entry.Value(), &w); err != nil {
		return w, 0, fmt.Errorf("decode webhook %s: %w", id, err)
	}
	if !api.From(ctx).Sees(w.OrgID) {
		return w, 0, notFound
	}
	return w, entry.Revision(), nil
}

func (s *Service) getWebhook(ctx context.Context, in *idInput) (*webhookOutput, error) {
	w, _, err := s.readWebhook(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	return &webhookOutput{showWebhook(w)}, nil
}

func (s *Service) listWebhooks(ctx context.Context, in *listWebhooksInput) (*listWebhooksOutput, error) {
	org, ok := api.From(ctx).Org(in.OrgID)
	if !ok {
		return nil, api.NotFound.New("There is no such organization.")
	}
	keyIDs, err := s.webhooks.Keys(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoKeysFound) {
		return nil, fmt.Errorf("list webhooks: %w", err)
	}
	slices.Sort(keyIDs)
	out := &listWebhooksOutput{}
	out.Body.Webhooks = []Webhook{}
	for _, id := range keyIDs {
		w, _, err := s.readWebhook(ctx, id)
		if api.NotFound.Is(err) || err == nil && org != "" && w.OrgID != org {
			continue
		}
		if err != nil {
			return nil, err
		}
		out.Body.Webhooks = append(out.Body.Webhooks, showWebhook(w))
	}
	return out, nil
}

func (s *Service) updateWebhook(ctx context.Context, in *updateWebhookInput) (*webhookOutput, error) {
	before, revision, err := s.readWebhook(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	var f faults
	w, b := before, in.Body
	if b.URL != nil {
		w.URL = f.endpoint("body.url", *b.URL)
	}
	if b.Events != nil {
		w.Events = f.events("body.events", *b.Events)
	}
	if b.Description != nil {
		w.Description = f.text("body.description", *b.Description, maxDescription)
	}
	if b.Disabled != nil {
		w.Disabled, w.DisabledReason = *b.Disabled, ""
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	if err := s.putWebhook(ctx, "webhook.updated", &before, w, revision); err != nil {
		return nil, err
	}
	return &webhookOutput{showWebhook(w)}, nil
}

func (s *Service) rotateWebhook(ctx context.Context, in *idInput) (*newWebhookOutput, error) {
	before, revision, err := s.readWebhook(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	w, until := before, s.now().UTC().Add(day)
	w.PreviousSecret, w.PreviousUntil, w.Secret = before.Secret, &until, newWebhookSecret()
	if err := s.putWebhook(ctx, "webhook.secret_rotated", &before, w, revision); err != nil {
		return nil, err
	}
	return &newWebhookOutput{NewWebhook{Secret: w.Secret, Webhook: showWebhook(w)}}, nil
}

func (s *Service) deleteWebhook(ctx context.Context, in *idInput) (*struct{}, error) {
	w, revision, err := s.readWebhook(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	c := change{typ: "webhook.deleted", kind: "webhook", id: w.ID, org: w.OrgID, before: showWebhook(w)}
	return nil, s.audited(ctx, caller(ctx), c, func() error {
		// Purge, so that the signing secret does not stay in the bucket's history.
		if err := s.webhooks.Purge(ctx, w.ID, jetstream.LastRevision(revision)); err != nil {
			return fmt.Errorf("delete webhook %s: %w", w.ID, err)
		}
		return nil
	})
}

// endpoint checks an address for deliveries. That it does not lead into a
// network of our own is checked when a delivery is made, since names change.
func (f *faults) endpoint(location, s string) string {
	s = f.text(location, s, 2000)
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		f.add(location, "is not an address like https://example.com/hooks")
	case u.User != nil:
		f.add(location, "must not hold a user name or password; deliveries are signed")
	case u.Fragment != "":
		f.add(location, "must not hold a fragment (#…)")
	case u.Scheme == "http" && !isLocal(u.Hostname()):
		f.add(location, "must be https; http is for this machine and private networks only")
	}
	return s
}

// isLocal reports whether a host is on this machine or in a private network,
// where plain HTTP is usual: a private address, or a name without a public suffix.
func isLocal(host string) bool {
	if a, err := netip.ParseAddr(host); err == nil {
		return a.IsLoopback() || a.IsPrivate()
	}
	return !strings.Contains(host, ".") || strings.HasSuffix(host, ".internal") || strings.HasSuffix(host, ".local")
}

func (f *faults) events(location string, events []string) []string {
	for i, e := range events {
		if !slices.Contains(webhookEvents, e) {
			f.add(location+index(i), "%q is not one of %s", e, strings.Join(webhookEvents, ", "))
		}
	}
	slices.Sort(events)
	return slices.Compact(events)
}
