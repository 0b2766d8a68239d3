package keys

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// orgs holds the organizations in memory, as their bucket tells them.
type orgs struct {
	kv      jetstream.KeyValue
	watcher jetstream.KeyWatcher

	mu   sync.RWMutex
	byID map[string]orgEntry
}

type orgEntry struct {
	key.Org
	revision uint64
}

func openOrgs(ctx context.Context, js jetstream.JetStream, log *slog.Logger) (*orgs, error) {
	kv, err := js.KeyValue(ctx, bus.Orgs)
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bus.Orgs, err)
	}
	// The watcher outlives the call that opens it.
	watcher, err := kv.WatchAll(context.WithoutCancel(ctx))
	if err != nil {
		return nil, fmt.Errorf("watch bucket %s: %w", bus.Orgs, err)
	}
	o := &orgs{kv: kv, watcher: watcher, byID: map[string]orgEntry{}}
	caughtUp := make(chan struct{})
	go o.follow(caughtUp, log)
	select {
	case <-caughtUp:
		return o, nil
	case <-ctx.Done():
		o.close()
		return nil, fmt.Errorf("watch bucket %s: %w", bus.Orgs, ctx.Err())
	}
}

func (o *orgs) close() { _ = o.watcher.Stop() }

func (o *orgs) follow(caughtUp chan<- struct{}, log *slog.Logger) {
	for entry := range o.watcher.Updates() {
		if entry == nil {
			close(caughtUp)
			continue
		}
		if entry.Operation() != jetstream.KeyValuePut {
			continue
		}
		var org key.Org
		if err := json.Unmarshal(entry.Value(), &org); err != nil {
			log.Error("organization cannot be read, it stays as it was", "org_id", entry.Key(), "error", err)
			continue
		}
		org.ID = entry.Key()
		o.apply(org, entry.Revision())
	}
}

func (o *orgs) apply(org key.Org, revision uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byID[org.ID].revision < revision {
		o.byID[org.ID] = orgEntry{org, revision}
	}
}

func (o *orgs) get(id string) (orgEntry, bool) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	e, ok := o.byID[id]
	return e, ok
}

// policy is that of an organization; the zero policy if it is not known.
func (o *orgs) policy(id string) key.Policy {
	e, _ := o.get(id)
	return e.Policy
}

func (o *orgs) list() []key.Org {
	o.mu.RLock()
	defer o.mu.RUnlock()
	out := make([]key.Org, 0, len(o.byID))
	for _, e := range o.byID {
		out = append(out, e.Org)
	}
	slices.SortFunc(out, func(a, b key.Org) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// Org is an organization as the API shows it.
type Org struct {
	ID         string    `json:"id" example:"org_01KAEXAMPLE"`
	Name       string    `json:"name"`
	OwnerEmail string    `json:"owner_email" doc:"Where alerts and notices about its keys go."`
	CreatedAt  time.Time `json:"created_at"`
	PolicyView
}

func showOrg(o key.Org) Org {
	return Org{ID: o.ID, Name: o.Name, OwnerEmail: o.OwnerEmail, CreatedAt: o.CreatedAt, PolicyView: showPolicy(o.Policy)}
}

type createOrgInput struct {
	Body struct {
		ID         string `json:"id,omitempty" doc:"An id of your own, for tenants that have one already; made up if absent." maxLength:"64" example:"org_acme"`
		Name       string `json:"name" doc:"1 to 200 characters."`
		OwnerEmail string `json:"owner_email" doc:"Where alerts and notices about its keys go."`
		PolicyInput
	}
}

type orgOutput struct{ Body Org }

type updateOrgInput struct {
	ID   string `path:"id"`
	Body struct {
		Name       *string `json:"name,omitempty"`
		OwnerEmail *string `json:"owner_email,omitempty"`
		PolicyInput
	}
}

type listOrgsInput struct {
	Q      string `query:"q" doc:"Part of the name, id or address." maxLength:"200"`
	Cursor string `query:"cursor" doc:"next_cursor of the page before." maxLength:"300"`
	Limit  int    `query:"limit" default:"100" minimum:"1" maximum:"1000"`
}

type listOrgsOutput struct {
	Body struct {
		Orgs       []Org  `json:"orgs" nullable:"false"`
		NextCursor string `json:"next_cursor,omitempty" doc:"Absent on the last page."`
	}
}

type idInput struct {
	ID string `path:"id"`
}

func (s *Service) registerOrgs(a huma.API) {
	const tag = "Organizations"
	huma.Register(a, operation(http.MethodPost, "/v1/orgs", "create-org", tag, "Create an organization", "orgs:write", http.StatusCreated), s.createOrg)
	huma.Register(a, operation(http.MethodGet, "/v1/orgs", "list-orgs", tag, "List organizations", "orgs:read", http.StatusOK), s.listOrgs)
	huma.Register(a, operation(http.MethodGet, "/v1/orgs/{id}", "get-org", tag, "Show an organization", "orgs:read", http.StatusOK), s.getOrg)
	huma.Register(a, operation(http.MethodPatch, "/v1/orgs/{id}", "update-org", tag, "Change an organization or its policy", "orgs:write", http.StatusOK), s.updateOrg)
}

func (s *Service) createOrg(ctx context.Context, in *createOrgInput) (*orgOutput, error) {
	if !api.From(ctx).System() {
		return nil, api.NotYours.New("Only the installation's own keys create organizations.")
	}
	var f faults
	org := key.Org{ID: in.Body.ID, Name: f.name(in.Body.Name), OwnerEmail: f.email("body.owner_email", in.Body.OwnerEmail)}
	f.policy(in.Body.PolicyInput, &org.Policy)
	now := s.now().UTC()
	if org.ID == "" {
		org.ID = s.ids.next("org", now)
	} else if !validKeyID(org.ID) {
		f.add("body.id", "must be made of letters, digits, _ and -")
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	org.CreatedAt = now
	if _, ok := s.orgs.get(org.ID); ok {
		return nil, api.Conflict.New(fmt.Sprintf("There is an organization %s already.", org.ID))
	}
	err := s.audited(ctx, caller(ctx), change{typ: "org.created", kind: "org", id: org.ID, org: org.ID, after: org}, func() error {
		return s.putOrg(ctx, org, 0)
	})
	if err != nil {
		return nil, err
	}
	return &orgOutput{showOrg(org)}, nil
}

// putOrg stores an organization over the revision that was read, 0 for a new one.
func (s *Service) putOrg(ctx context.Context, org key.Org, revision uint64) error {
	body, err := json.Marshal(org)
	if err != nil {
		return fmt.Errorf("encode organization: %w", err)
	}
	if revision == 0 {
		revision, err = s.orgs.kv.Create(ctx, org.ID, body)
	} else {
		revision, err = s.orgs.kv.Update(ctx, org.ID, body, revision)
	}
	var apiErr *jetstream.APIError
	if errors.Is(err, jetstream.ErrKeyExists) || errors.As(err, &apiErr) && apiErr.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
		return api.Conflict.New("The organization was changed meanwhile; read it again.")
	}
	if err != nil {
		return fmt.Errorf("store organization %s: %w", org.ID, err)
	}
	s.orgs.apply(org, revision)
	return nil
}

func (s *Service) getOrg(ctx context.Context, in *idInput) (*orgOutput, error) {
	e, err := s.visibleOrg(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	return &orgOutput{showOrg(e.Org)}, nil
}

// visibleOrg is an organization that the caller sees, else not found.
func (s *Service) visibleOrg(ctx context.Context, id string) (orgEntry, error) {
	e, ok := s.orgs.get(id)
	if !ok || !api.From(ctx).Sees(id) {
		return e, api.NotFound.New("There is no such organization.")
	}
	return e, nil
}

func (s *Service) updateOrg(ctx context.Context, in *updateOrgInput) (*orgOutput, error) {
	before, err := s.visibleOrg(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	var f faults
	org := before.Org
	if in.Body.Name != nil {
		org.Name = f.name(*in.Body.Name)
	}
	if in.Body.OwnerEmail != nil {
		org.OwnerEmail = f.email("body.owner_email", *in.Body.OwnerEmail)
	}
	f.policy(in.Body.PolicyInput, &org.Policy)
	if err := f.err(); err != nil {
		return nil, err
	}
	err = s.audited(ctx, caller(ctx), change{typ: "org.updated", kind: "org", id: org.ID, org: org.ID, before: before.Org, after: org}, func() error {
		return s.putOrg(ctx, org, before.revision)
	})
	if err != nil {
		return nil, err
	}
	if before.Policy != org.Policy {
		if err := s.wake(ctx, org.ID); err != nil {
			return nil, err
		}
	}
	return &orgOutput{showOrg(org)}, nil
}

func (s *Service) listOrgs(ctx context.Context, in *listOrgsInput) (*listOrgsOutput, error) {
	after, err := readCursor(in.Cursor)
	if err != nil {
		return nil, err
	}
	p := api.From(ctx)
	out := &listOrgsOutput{}
	out.Body.Orgs = []Org{}
	for _, o := range s.orgs.list() {
		if !p.Sees(o.ID) || o.ID <= after || !contains(in.Q, o.ID, o.Name, o.OwnerEmail) {
			continue
		}
		if len(out.Body.Orgs) == in.Limit {
			out.Body.NextCursor = writeCursor(out.Body.Orgs[len(out.Body.Orgs)-1].ID)
			break
		}
		out.Body.Orgs = append(out.Body.Orgs, showOrg(o))
	}
	return out, nil
}
