package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/keys"
)

func newKeysCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "keys",
		Short: "Run the keys service: the REST API of keys and organizations, notices, policies",
		Long: `Runs the keys service against the NATS that LATCHKEY_NATS_URL names. Its API
listens on LATCHKEY_KEYS_ADDR (127.0.0.1:8083). With LATCHKEY_ADMIN_KEY_PATH set,
the first admin key is written there, once. Any number may run side by side.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return run.Service(cmd.Context(), "keys", func(ctx context.Context, deps run.Deps) (run.Runner, error) {
				var cfg keys.Config
				if err := run.Load(&cfg); err != nil {
					return nil, err
				}
				service, err := keys.New(ctx, cfg, deps)
				if err != nil {
					return nil, err
				}
				deps.Log.Info("keys API listens", "addr", service.Addr())
				return service, nil
			})
		},
	}
}
