package keys

import (
	"context"
	"errors"
	"time"

	"github.com/latchkey-dev/latchkey/services/internal/api"
)

// facts is what is known of the use of keys. It may be slow or away; nothing
// that changes a key asks for it.
type facts interface {
	// lastUsed is when keys were last used: those of ids, or, for no ids, those
	// of an organization (empty: all).
	lastUsed(ctx context.Context, org string, ids []string) (map[string]time.Time, error)
	// usage is what the keys of an organization (empty: all) did since a time.
	usage(ctx context.Context, org string, since time.Time) (map[string]use, error)
	check(ctx context.Context) error
	close()
}

// use is what one key did.
type use struct {
	// Scopes that its allowed requests needed.
	Scopes []string
	// Agents are the families of its user agents, Networks its /24 and /48.
	Agents, Networks []string
	Requests         uint64
}

// errNoClickHouse says that no ClickHouse is configured.
var errNoClickHouse = errors.New("no ClickHouse is configured")

func factsProblem(err error) error {
	if errors.Is(err, errNoClickHouse) {
		return api.Unavailable.New("What asks for the use of keys needs ClickHouse, and none is configured (LATCHKEY_CLICKHOUSE_URL).")
	}
	return api.Unavailable.New("What asks for the use of keys needs ClickHouse, which does not answer just now.")
}

type noFacts struct{}

func (noFacts) lastUsed(context.Context, string, []string) (map[string]time.Time, error) {
	return nil, errNoClickHouse
}

func (noFacts) usage(context.Context, string, time.Time) (map[string]use, error) {
	return nil, errNoClickHouse
}
func (noFacts) check(context.Context) error { return errNoClickHouse }
func (noFacts) close()                      {}
