package main

import (
	"slices"
	"testing"

	"github.com/caarlos0/env/v11"

	"github.com/latchkey-dev/latchkey/services/collector"
	"github.com/latchkey-dev/latchkey/services/console"
	"github.com/latchkey-dev/latchkey/services/detector"
	"github.com/latchkey-dev/latchkey/services/edge"
	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
	"github.com/latchkey-dev/latchkey/services/keys"
	"github.com/latchkey-dev/latchkey/services/notifier"
)

// variables are the names of every environment variable that a service reads.
func variables(t *testing.T) []string {
	t.Helper()
	var names []string
	for _, cfg := range []any{
		&run.Common{}, &edge.Config{}, &keys.Config{}, &detector.Config{}, &notifier.Config{}, &engine.Config{}, &collector.Config{}, &console.Config{}, &store.Config{},
	} {
		params, err := env.GetFieldParamsWithOptions(cfg, env.Options{Prefix: run.EnvPrefix})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range params {
			names = append(names, p.Key)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
