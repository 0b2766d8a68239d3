package apikey

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// FullAccess is the scope that covers every other.
const FullAccess = "full_access"

// MaxScopeLen is the most that a scope may have, in bytes.
const MaxScopeLen = 128

// CheckScope reports why s is no scope: "resource:action", "resource:*" or
// [FullAccess], where resource and action are made of [A-Za-z0-9_.-].
func CheckScope(s string) error {
	if s == FullAccess {
		return nil
	}
	if len(s) > MaxScopeLen {
		return fmt.Errorf("scope of %d bytes is longer than %d", len(s), MaxScopeLen)
	}
	resource, action, ok := strings.Cut(s, ":")
	if !ok {
		return fmt.Errorf("scope %q is neither resource:action, resource:* nor %s", s, FullAccess)
	}
	if resource == "*" {
		return fmt.Errorf("scope %q: the resource cannot be *, the scope for everything is %s", s, FullAccess)
	}
	if !isScopeWord(resource) {
		return fmt.Errorf("scope %q: the resource must be made of letters, digits and _ . -", s)
	}
	if action != "*" && !isScopeWord(action) {
		return fmt.Errorf("scope %q: the action must be * or made of letters, digits and _ . -", s)
	}
	return nil
}

func isScopeWord(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_', c == '.', c == '-':
		default:
			return false
		}
	}
	return s != ""
}

// Scopes is a compiled set of scopes. It does not change, so goroutines may
// share it. The zero value covers nothing.
type Scopes struct {
	full bool
	// resources are those held as resource:*, sorted.
	resources []string
	// exact are the rest, sorted and not covered by resources.
	exact []string
}

// CompileScopes compiles a set; the error names every bad scope at once.
func CompileScopes(scopes []string) (Scopes, error) {
	var set Scopes
	var errs []error
	for _, s := range scopes {
		if err := CheckScope(s); err != nil {
			errs = append(errs, err)
			continue
		}
		switch resource, wild := strings.CutSuffix(s, ":*"); {
		case s == FullAccess:
			set.full = true
		case wild:
			set.resources = append(set.resources, resource)
		default:
			set.exact = append(set.exact, s)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return Scopes{}, err
	}
	slices.Sort(set.resources)
	set.resources = slices.Compact(set.resources)
	set.exact = slices.DeleteFunc(set.exact, func(s string) bool {
		resource, _, _ := strings.Cut(s, ":")
		_, covered := slices.BinarySearch(set.resources, resource)
		return covered
	})
	slices.Sort(set.exact)
	set.exact = slices.Clip(slices.Compact(set.exact))
	return set, nil
}

// Full reports whether the set holds [FullAccess].
func (s Scopes) Full() bool { return s.full }

// Covers reports whether the set grants what a request requires. An empty
// requirement is always granted; "resource:*" only by itself or [FullAccess].
// It allocates nothing.
func (s Scopes) Covers(required string) bool {
	if s.full || required == "" {
		return true
	}
	for _, e := range s.exact {
		if e == required {
			return true
		}
	}
	if len(s.resources) == 0 {
		return false
	}
	i := strings.IndexByte(required, ':')
	if i <= 0 || i == len(required)-1 {
		return false
	}
	for _, r := range s.resources {
		if r == required[:i] {
			return true
		}
	}
	return false
}

// Missing is those of scopes that the set does not cover, nil if it covers all:
// a key grants no more than it holds.
func (s Scopes) Missing(scopes []string) []string {
	var missing []string
	for _, r := range scopes {
		if !s.Covers(r) {
			missing = append(missing, r)
		}
	}
	return missing
}

// List is the set in its shortest sorted form.
func (s Scopes) List() []string {
	if s.full {
		return []string{FullAccess}
	}
	out := slices.Clone(s.exact)
	for _, r := range s.resources {
		out = append(out, r+":*")
	}
	slices.Sort(out)
	return out
}
