package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/console"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

func newConsoleCmd() *cobra.Command {
	var addr string
	cmd := &cobra.Command{
		Use:   "console",
		Short: "Run the console: pages, and the API of alerts, activity and baselines",
		Long: `Shows keys, alerts and their evidence, and takes verdicts. Needs NATS
($LATCHKEY_NATS_URL); what keys did is read from ClickHouse
($LATCHKEY_CLICKHOUSE_URL), without which the console shows the rest. The keys
service's part of the API is passed on to $LATCHKEY_KEYS_URL.

Pages are open without a login to this machine alone; everybody else logs in with
an API key and sees what the key may see. LATCHKEY_CONSOLE_LOGIN=always asks for
a login in any case.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var cfg console.Config
			if err := run.Load(&cfg); err != nil {
				return err
			}
			if cmd.Flags().Changed("console-addr") {
				cfg.Addr = addr
			}
			return run.Service(cmd.Context(), "console", func(ctx context.Context, deps run.Deps) (run.Runner, error) {
				return console.New(ctx, cfg, deps)
			})
		},
	}
	cmd.Flags().StringVar(&addr, "console-addr", "127.0.0.1:8080", "pages and API ($LATCHKEY_CONSOLE_ADDR)")
	return cmd
}
