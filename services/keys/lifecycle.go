package keys

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
)

// issue makes the secret of a record and puts its hash and prefix there.
func (s *Service) issue(r *key.Record) (secret string, err error) {
	k, err := s.format.Generate(r.Environment)
	if err != nil {
		return "", err
	}
	r.Hash, r.Prefix = s.hasher.Sum(k.Secret()).String(), k.Masked()
	return k.Secret(), nil
}

// create stores a new key. The record has everything but its id, secret and times.
func (s *Service) create(ctx context.Context, by actor, r key.Record) (key.Record, string, error) {
	now := s.now().UTC()
	r.ID, r.Status, r.CreatedAt = s.ids.next("key", now), key.Active, now
	secret, err := s.issue(&r)
	if err != nil {
		return r, "", err
	}
	if err := s.store.commit(ctx, by, write{after: r, typ: key.Created}); err != nil {
		return r, "", err
	}
	return r, secret, nil
}

// rotation is what a rotation did.
type rotation struct {
	old, new key.Record
	secret   string
	// limited says that the old key's own expiry came before the end of the grace period.
	limited bool
}

// rotateOptions say how a key is to be replaced.
type rotateOptions struct {
	// grace is how long the old key stays valid.
	grace time.Duration
	// fromFirstUse lets grace begin when the successor is first used, and at
	// the latest so that it ends after maxGrace.
	fromFirstUse bool
	// expires is the new key's expiry; nil gives it as long a life as the old one's.
	expires *time.Time
	// unclaimed makes a successor whose secret nobody has seen.
	unclaimed bool
	reason    string
}

// rotate replaces a key: the successor is created and the old key given its end
// in one atomic batch. check may refuse it for the state that the key is in.
func (s *Service) rotate(ctx context.Context, by actor, id string, opts rotateOptions, check func(key.Record) error) (rotation, error) {
	for range maxRaces {
		before, err := s.store.read(ctx, id)
		if err != nil {
			return rotation{}, err
		}
		if err := check(before.Record); err != nil {
			return rotation{}, err
		}
		rot, err := s.successor(before.Record, opts)
		if err != nil {
			return rotation{}, err
		}
		rot.new.Unclaimed = opts.unclaimed
		reason := opts.reason
		if rot.limited {
			reason = strings.TrimPrefix(reason+"; the key's own expiry cuts the grace period of "+opts.grace.String()+" short", "; ")
		}
		err = s.store.commit(ctx, by,
			write{after: rot.new, typ: key.Created, reason: "successor of " + id},
			write{before: before, after: rot.old, typ: key.Rotated, reason: reason})
		if !errors.Is(err, errRace) {
			return rot, err
		}
	}
	return rotation{}, errRace
}

// successor makes both records of a rotation. The old key never outlives its own
// expiry; without grace it is revoked as superseded, so that no clock decides.
// The new key lives as long as the old one was meant to, unless told otherwise.
func (s *Service) successor(old key.Record, opts rotateOptions) (rotation, error) {
	now := s.now().UTC()
	fresh := old
	fresh.ID, fresh.ParentKeyID, fresh.SuccessorID = s.ids.next("key", now), old.ID, ""
	fresh.Status, fresh.RevokeReason, fresh.RevokedAt = key.Active, "", nil
	fresh.CreatedAt, fresh.LastRotatedAt, fresh.Unclaimed, fresh.GraceAfterUse = now, &now, false, ""
	switch {
	case opts.expires != nil:
		fresh.ExpiresAt = opts.expires
	case old.ExpiresAt != nil:
		at := now.Add(old.ExpiresAt.Sub(old.CreatedAt))
		fresh.ExpiresAt = &at
	}
	secret, err := s.issue(&fresh)
	if err != nil {
		return rotation{}, err
	}
	rot := rotation{old: old, new: fresh, secret: secret}
	rot.old.SuccessorID = fresh.ID
	end := now.Add(opts.grace)
	if opts.fromFirstUse && !expired(old, now) {
		rot.old.GraceAfterUse, end = opts.grace.String(), now.Add(maxGrace)
	}
	switch {
	case old.ExpiresAt != nil && !old.ExpiresAt.After(end):
		rot.limited = true
	case opts.grace == 0 && !opts.fromFirstUse:
		rot.old.ExpiresAt, rot.old.RevokedAt = &now, &now
		rot.old.Status, rot.old.RevokeReason = key.Revoked, "superseded"
	default:
		rot.old.ExpiresAt = &end
	}
	return rot, nil
}

// startGrace lets the grace period of a rotated key begin if its successor is
// in use by now, and reports whether it did.
func (s *Service) startGrace(ctx context.Context, r key.Record) (bool, error) {
	used, err := s.lastUsed(ctx, []string{r.SuccessorID})
	if _, ok := used[r.SuccessorID]; err != nil || !ok {
		return false, nil // asked again later; the key has its latest end
	}
	_, err = s.store.change(ctx, system, r.ID, key.Updated, func(r *key.Record) (string, error) {
		period, err := time.ParseDuration(r.GraceAfterUse)
		if err != nil || ended(*r, s.now()) {
			return "", errNothing
		}
		if end := s.now().UTC().Add(period); r.ExpiresAt == nil || end.Before(*r.ExpiresAt) {
			r.ExpiresAt = &end
		}
		r.GraceAfterUse = ""
		return "successor " + r.SuccessorID + " is in use: the grace period begins", nil
	})
	return err == nil, err
}

// rotatable refuses keys that have an end already.
func rotatable(r key.Record) error {
	switch {
	case r.Status == key.Revoked && r.SuccessorID == "":
		return api.Conflict.New("The key is revoked and cannot be rotated; create a new one.")
	case r.SuccessorID != "":
		return api.Conflict.New(fmt.Sprintf("The key was rotated already; rotate its successor %s.", r.SuccessorID))
	}
	return nil
}

// claim gives a key that a policy made its first secret that anybody sees.
func (s *Service) claim(ctx context.Context, by actor, id string, check func(key.Record) error) (r key.Record, secret string, err error) {
	r, err = s.store.change(ctx, by, id, key.Updated, func(r *key.Record) (string, error) {
		if err := check(*r); err != nil {
			return "", err
		}
		if !r.Unclaimed {
			return "", api.Conflict.New("The secret of this key was shown already; rotate the key to get a new one.")
		}
		if r.Status == key.Revoked {
			return "", api.Conflict.New("The key is revoked.")
		}
		r.Unclaimed = false
		secret, err = s.issue(r)
		return "secret claimed", err
	})
	return r, secret, err
}

func (s *Service) revoke(ctx context.Context, by actor, id, reason, comment string, check func(key.Record) error) (key.Record, error) {
	return s.store.change(ctx, by, id, key.RevokedEv, func(r *key.Record) (string, error) {
		if err := check(*r); err != nil {
			return "", err
		}
		if r.Status == key.Revoked {
			return "", errNothing
		}
		now := s.now().UTC()
		r.Status, r.RevokeReason, r.RevokedAt = key.Revoked, reason, &now
		return comment, nil
	})
}

func (s *Service) suspend(ctx context.Context, by actor, id, comment string, check func(key.Record) error) (key.Record, error) {
	return s.store.change(ctx, by, id, key.SuspendEv, func(r *key.Record) (string, error) {
		if err := check(*r); err != nil {
			return "", err
		}
		switch r.Status {
		case key.Suspended:
			return "", errNothing
		case key.Revoked:
			return "", api.Conflict.New("The key is revoked, which is final.")
		}
		r.Status = key.Suspended
		return comment, nil
	})
}

func (s *Service) resume(ctx context.Context, by actor, id, comment string, check func(key.Record) error) (key.Record, error) {
	return s.store.change(ctx, by, id, key.ResumedEv, func(r *key.Record) (string, error) {
		if err := check(*r); err != nil {
			return "", err
		}
		switch r.Status {
		case key.Active:
			return "", errNothing
		case key.Revoked:
			return "", api.Conflict.New("The key is revoked, which is final; create a new one.")
		}
		r.Status = key.Active
		return comment, nil
	})
}

// Names of RFC 5280, section 5.3.1, that fit a key's end.
var revokeReasons = []string{
	"unspecified", "keyCompromise", "cACompromise", "affiliationChanged", "superseded",
	"cessationOfOperation", "privilegeWithdrawn", "aACompromise",
}

// revokeReason reads a reason: a name of RFC 5280 in any spelling
// ("keyCompromise", "key_compromise"); other text is a comment on an unspecified one.
func revokeReason(text string) (reason, comment string, err error) {
	fold := func(s string) string {
		return strings.ToLower(strings.NewReplacer("_", "", "-", "", " ", "").Replace(s))
	}
	switch fold(text) {
	case "":
		return "unspecified", text, nil
	case "certificatehold":
		return "", "", api.Fault("body.reason", "certificateHold is not final: suspend the key instead")
	case "removefromcrl":
		return "", "", api.Fault("body.reason", "removeFromCRL is no revocation: resume the key instead")
	}
	for _, r := range revokeReasons {
		if fold(text) == fold(r) {
			return r, r, nil
		}
	}
	return "unspecified", text, nil
}
