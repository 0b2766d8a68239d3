package keys

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
)

func (s *Service) registerKeys(a huma.API) {
	const tag = "Keys"
	huma.Register(a, operation(http.MethodPost, "/v1/api-keys", "create-key", tag, "Create a key; its secret is shown this once", "keys:write", http.StatusCreated), s.createKey)
	huma.Register(a, operation(http.MethodGet, "/v1/api-keys", "list-keys", tag, "List and search keys, newest first", "keys:read", http.StatusOK), s.listKeys)
	huma.Register(a, operation(http.MethodGet, "/v1/api-keys/{id}", "get-key", tag, "Show a key", "keys:read", http.StatusOK), s.getKey)
	huma.Register(a, operation(http.MethodPatch, "/v1/api-keys/{id}", "update-key", tag, "Change a key", "keys:write", http.StatusOK), s.updateKey)
	huma.Register(a, operation(http.MethodPost, "/v1/api-keys/{id}/rotate", "rotate-key", tag, "Replace a key; the new secret is shown this once", "keys:write", http.StatusCreated), s.rotateKey)
	huma.Register(a, operation(http.MethodPost, "/v1/api-keys/{id}/claim", "claim-key", tag, "Fetch the secret of a key that a policy made, once", "keys:write", http.StatusOK), s.claimKey)
	huma.Register(a, operation(http.MethodPost, "/v1/api-keys/{id}/revoke", "revoke-key", tag, "End a key for good", "keys:write", http.StatusOK), s.revokeKey)
	huma.Register(a, operation(http.MethodPost, "/v1/api-keys/{id}/suspend", "suspend-key", tag, "Stop a key until it is resumed", "keys:write", http.StatusOK), s.suspendKey)
	huma.Register(a, operation(http.MethodPost, "/v1/api-keys/{id}/resume", "resume-key", tag, "Let a suspended key work again", "keys:write", http.StatusOK), s.resumeKey)
}

type createKeyInput struct {
	Body struct {
		OrgID        string            `json:"org_id,omitempty" doc:"The organization; that of the calling key if absent." maxLength:"128"`
		Name         string            `json:"name" doc:"1 to 200 characters."`
		Scopes       []string          `json:"scopes" nullable:"false" doc:"resource:action, resource:* or full_access; the calling key must hold them all." example:"[\"telemetry:write\",\"commands:read\"]"`
		ExpiresAt    *time.Time        `json:"expires_at,omitempty" doc:"RFC 3339; absent for a key that does not expire."`
		Environment  string            `json:"environment,omitempty" doc:"Part of the key itself; live if absent." example:"live" maxLength:"100"`
		Description  string            `json:"description,omitempty"`
		Owner        string            `json:"owner,omitempty" doc:"The person or team that answers for the key."`
		AllowedCIDRs []string          `json:"allowed_cidrs,omitempty" doc:"Source addresses from which the key may be used; all if absent."`
		Metadata     map[string]string `json:"metadata,omitempty"`
		Tags         []string          `json:"tags,omitempty"`
		PolicyInput
	}
}

// NewKey is a key with its secret, the only time it is shown.
type NewKey struct {
	Secret string `json:"key" doc:"The secret. It is not stored and cannot be shown again."`
	Key
	// Previous is what became of the key that was rotated.
	Previous *Previous `json:"previous,omitempty"`
}

// Previous is the key that a rotation replaced.
type Previous struct {
	ID              string    `json:"id"`
	Status          string    `json:"status"`
	ValidUntil      time.Time `json:"valid_until" doc:"The end of the grace period, or the key's own expiry if that comes first."`
	LimitedByExpiry bool      `json:"limited_by_expiry" doc:"Whether the key's own expiry cut the grace period short."`
}

type newKeyOutput struct{ Body NewKey }

type keyOutput struct{ Body Key }

func (s *Service) createKey(ctx context.Context, in *createKeyInput) (*newKeyOutput, error) {
	p, b := api.From(ctx), &in.Body
	if b.OrgID == "" && !p.System() {
		b.OrgID = p.OrgID
	}
	if b.OrgID == "" {
		return nil, api.Invalid.New("Say for which organization the key is.", api.Fault("body.org_id", "is required for a key that belongs to the installation itself"))
	}
	if _, err := s.visibleOrg(ctx, b.OrgID); err != nil {
		return nil, err
	}
	r := key.Record{OrgID: b.OrgID, Environment: b.Environment}
	if r.Environment == "" {
		r.Environment = apikey.Live
	}
	var f faults
	if _, err := s.format.Generate(r.Environment); err != nil {
		f.add("body.environment", "%s", err)
	}
	r.Name, r.Scopes = f.name(b.Name), f.scopes("body.scopes", b.Scopes)
	r.Description, r.Owner = f.text("body.description", b.Description, maxDescription), f.text("body.owner", b.Owner, maxName)
	r.ExpiresAt, r.AllowedCIDRs = f.expiry("body.expires_at", b.ExpiresAt, s.now()), f.cidrs("body.allowed_cidrs", b.AllowedCIDRs)
	r.Metadata, r.Tags = f.metadata("body.metadata", b.Metadata), f.tags("body.tags", b.Tags)
	f.policy(b.PolicyInput, &r.Policy)
	if err := f.err(); err != nil {
		return nil, err
	}
	if err := mayGrant(p, r.Scopes); err != nil {
		return nil, err
	}
	r, secret, err := s.create(ctx, caller(ctx), r)
	if err != nil {
		return nil, err
	}
	return &newKeyOutput{NewKey{Secret: secret, Key: s.show(r, nil)}}, nil
}

// mayGrant refuses to hand out more than the caller holds.
func mayGrant(p api.Principal, scopes []string) error {
	if missing := p.Scopes.Missing(scopes); len(missing) > 0 {
		return api.BeyondOwnScopes.New("A key can hand out no more than it holds; the calling key lacks " + strings.Join(missing, ", ") + ".")
	}
	return nil
}

// visibleTo refuses keys of organizations that the caller does not see, as if
// they did not exist.
func visibleTo(p api.Principal) func(key.Record) error {
	return func(r key.Record) error {
		if !p.Sees(r.OrgID) {
			return api.NotFound.New("There is no such key.")
		}
		return nil
	}
}

// answer turns the store's errors into problems.
func answer(err error) error {
	switch {
	case errors.Is(err, errNoKey):
		return api.NotFound.New("There is no such key.")
	case errors.Is(err, errRace):
		return api.Conflict.New("The key is being changed by many at once; try again.")
	}
	return err
}

func (s *Service) getKey(ctx context.Context, in *idInput) (*keyOutput, error) {
	r, err := s.store.read(ctx, in.ID)
	if err == nil {
		err = visibleTo(api.From(ctx))(r.Record)
	}
	if err != nil {
		return nil, answer(err)
	}
	used, _ := s.lastUsed(ctx, []string{r.ID})
	return &keyOutput{s.show(r.Record, used)}, nil
}

type updateKeyInput struct {
	ID   string `path:"id"`
	Body struct {
		Name         *string           `json:"name,omitempty"`
		Scopes       []string          `json:"scopes,omitempty" doc:"The new set, whole; the calling key must hold what is added."`
		ExpiresAt    *time.Time        `json:"expires_at,omitempty"`
		NeverExpires bool              `json:"never_expires,omitempty" doc:"Take the expiry away."`
		Description  *string           `json:"description,omitempty"`
		Owner        *string           `json:"owner,omitempty"`
		AllowedCIDRs *[]string         `json:"allowed_cidrs,omitempty" doc:"The new set, whole; empty allows all."`
		Metadata     map[string]string `json:"metadata,omitempty" doc:"The new set, whole."`
		Tags         *[]string         `json:"tags,omitempty" doc:"The new set, whole."`
		PolicyInput
	}
}

func (s *Service) updateKey(ctx context.Context, in *updateKeyInput) (*keyOutput, error) {
	p := api.From(ctx)
	visible := visibleTo(p)
	r, err := s.store.change(ctx, caller(ctx), in.ID, key.Updated, func(r *key.Record) (string, error) {
		if err := visible(*r); err != nil {
			return "", err
		}
		if ended(*r, s.now()) {
			return "", api.Conflict.New("The key has ended and cannot be changed.")
		}
		if in.Body.Scopes != nil {
			held, err := apikey.CompileScopes(r.Scopes)
			if err != nil {
				held = apikey.Scopes{}
			}
			if err := mayGrant(p, held.Missing(in.Body.Scopes)); err != nil {
				return "", err
			}
		}
		if in.Body.Scopes != nil && !slices.Contains(in.Body.Scopes, apikey.FullAccess) {
			if err := s.keepOneAdmin(*r); err != nil {
				return "", err
			}
		}
		return "", s.edit(r, in)
	})
	if err != nil {
		return nil, answer(err)
	}
	used, _ := s.lastUsed(ctx, []string{r.ID})
	return &keyOutput{s.show(r, used)}, nil
}

// edit puts what a PATCH says into a record.
func (s *Service) edit(r *key.Record, in *updateKeyInput) error {
	var f faults
	b := &in.Body
	setText := func(to *string, from *string, name string, limit int) {
		if from != nil {
			*to = f.text("body."+name, *from, limit)
		}
	}
	if b.Name != nil {
		r.Name = f.name(*b.Name)
	}
	setText(&r.Description, b.Description, "description", maxDescription)
	setText(&r.Owner, b.Owner, "owner", maxName)
	if b.Scopes != nil {
		r.Scopes = f.scopes("body.scopes", b.Scopes)
	}
	if b.AllowedCIDRs != nil {
		r.AllowedCIDRs = f.cidrs("body.allowed_cidrs", *b.AllowedCIDRs)
	}
	if b.Metadata != nil {
		r.Metadata = f.metadata("body.metadata", b.Metadata)
	}
	if b.Tags != nil {
		r.Tags = f.tags("body.tags", *b.Tags)
	}
	s.editExpiry(&f, r, b.ExpiresAt, b.NeverExpires)
	f.policy(b.PolicyInput, &r.Policy)
	return f.err()
}

func (s *Service) editExpiry(f *faults, r *key.Record, at *time.Time, never bool) {
	switch {
	case never && at != nil:
		f.add("body.never_expires", "contradicts expires_at")
	case r.SuccessorID != "" && (never || at != nil && r.ExpiresAt != nil && at.After(*r.ExpiresAt)):
		f.add("body.expires_at", "the key was rotated, its end can only be brought forward")
	case never:
		r.ExpiresAt = nil
	case at != nil:
		r.ExpiresAt = f.expiry("body.expires_at", at, s.now())
	}
}

type rotateInput struct {
	ID   string `path:"id"`
	Body *struct {
		Grace     *string    `json:"grace,omitempty" doc:"How long the old key stays valid: 24h, 30m, 7d, or 0 to end it at once. The policy's, or 24h, if absent. Never beyond the old key's own expiry." maxLength:"20" example:"24h"`
		GraceFrom string     `json:"grace_from,omitempty" enum:"now,first_use" doc:"When the grace period begins: now, or when the new key is first used, so that nobody is cut off who was slow to change over. The old key then ends after 90 days at the latest."`
		ExpiresAt *time.Time `json:"expires_at,omitempty" doc:"Expiry of the new key. If absent it lives as long as the old one was meant to."`
		Reason    string     `json:"reason,omitempty" doc:"For the audit."`
	}
}

func (s *Service) rotateKey(ctx context.Context, in *rotateInput) (*newKeyOutput, error) {
	p := api.From(ctx)
	var (
		f     faults
		given *time.Duration
		opts  rotateOptions
	)
	if b := in.Body; b != nil {
		if b.Grace != nil {
			d := f.duration("body.grace", *b.Grace, maxGrace)
			given = &d
		}
		opts.expires, opts.reason = f.expiry("body.expires_at", b.ExpiresAt, s.now()), f.text("body.reason", b.Reason, maxName)
		if opts.fromFirstUse = b.GraceFrom == "first_use"; opts.fromFirstUse && s.facts == facts(noFacts{}) {
			return nil, factsProblem(errNoClickHouse)
		}
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	old, err := s.store.read(ctx, in.ID)
	if err != nil {
		return nil, answer(err)
	}
	opts.grace = grace(effective(old.Policy, s.orgs.policy(old.OrgID)))
	if given != nil {
		opts.grace = *given
	}
	rot, err := s.rotate(ctx, caller(ctx), in.ID, opts, func(r key.Record) error {
		if err := visibleTo(p)(r); err != nil {
			return err
		}
		if err := rotatable(r); err != nil {
			return err
		}
		// Whoever rotates a key gets its new secret, and all that it grants.
		return mayGrant(p, r.Scopes)
	})
	if err != nil {
		return nil, answer(err)
	}
	return &newKeyOutput{NewKey{
		Secret: rot.secret, Key: s.show(rot.new, nil),
		Previous: &Previous{ID: rot.old.ID, Status: status(rot.old, s.now()), ValidUntil: *rot.old.ExpiresAt, LimitedByExpiry: rot.limited},
	}}, nil
}

func (s *Service) claimKey(ctx context.Context, in *idInput) (*newKeyOutput, error) {
	p := api.From(ctx)
	r, secret, err := s.claim(ctx, caller(ctx), in.ID, func(r key.Record) error {
		if err := visibleTo(p)(r); err != nil {
			return err
		}
		return mayGrant(p, r.Scopes)
	})
	if err != nil {
		return nil, answer(err)
	}
	return &newKeyOutput{NewKey{Secret: secret, Key: s.show(r, nil)}}, nil
}

type reasonInput struct {
	ID   string `path:"id"`
	Body *struct {
		Reason string `json:"reason,omitempty" doc:"For revoke a name of RFC 5280 (keyCompromise, superseded, cessationOfOperation, affiliationChanged, privilegeWithdrawn, unspecified); any other text is kept as a comment." example:"keyCompromise"`
	}
}

func (in *reasonInput) text(f *faults) string {
	if in.Body == nil {
		return ""
	}
	return f.text("body.reason", in.Body.Reason, maxName)
}

func (s *Service) revokeKey(ctx context.Context, in *reasonInput) (*keyOutput, error) {
	var f faults
	reason, comment, err := revokeReason(in.text(&f))
	if err != nil {
		f = append(f, err)
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	visible := visibleTo(api.From(ctx))
	r, err := s.revoke(ctx, caller(ctx), in.ID, reason, comment, func(r key.Record) error {
		if err := visible(r); err != nil {
			return err
		}
		return s.keepOneAdmin(r)
	})
	if err != nil {
		return nil, answer(err)
	}
	return &keyOutput{s.show(r, nil)}, nil
}

// keepOneAdmin refuses to end the last key that can manage the installation: no
// call could make another. Two such keys that end each other at the same moment
// pass; removing the admin key's file and starting anew makes another.
func (s *Service) keepOneAdmin(r key.Record) error {
	if r.OrgID != key.SystemOrg || !slices.Contains(r.Scopes, apikey.FullAccess) || r.Status != key.Active {
		return nil
	}
	now, others := s.now(), false
	s.set.Walk(key.SystemOrg, "", func(o key.Record) bool {
		others = o.ID != r.ID && o.Status == key.Active && !expired(o, now) && !o.Unclaimed && slices.Contains(o.Scopes, apikey.FullAccess)
		return !others
	})
	if others {
		return nil
	}
	return api.Conflict.New(fmt.Sprintf("The key is the last that can manage this installation; create another with full_access in %s first.", key.SystemOrg))
}

func (s *Service) suspendKey(ctx context.Context, in *reasonInput) (*keyOutput, error) {
	visible := visibleTo(api.From(ctx))
	return s.transition(ctx, in, s.suspend, func(r key.Record) error {
		if err := visible(r); err != nil {
			return err
		}
		return s.keepOneAdmin(r)
	})
}

func (s *Service) resumeKey(ctx context.Context, in *reasonInput) (*keyOutput, error) {
	return s.transition(ctx, in, s.resume, visibleTo(api.From(ctx)))
}

func (s *Service) transition(
	ctx context.Context, in *reasonInput,
	do func(ctx context.Context, by actor, id, comment string, check func(key.Record) error) (key.Record, error),
	check func(key.Record) error,
) (*keyOutput, error) {
	var f faults
	comment := in.text(&f)
	if err := f.err(); err != nil {
		return nil, err
	}
	r, err := do(ctx, caller(ctx), in.ID, comment, check)
	if err != nil {
		return nil, answer(err)
	}
	return &keyOutput{s.show(r, nil)}, nil
}
