package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/notifier"
)

func newNotifierCmd() *cobra.Command {
	var addr string
	cmd := &cobra.Command{
		Use:   "notifier",
		Short: "Run the notifier: one mail an alert, mails of notices, webhooks",
		Long: `Reads alerts and notices from NATS ($LATCHKEY_NATS_URL) and tells the owners of the
organizations, by mail and by webhook. What is to be told is recorded first, so
that neither a crash nor a second notifier repeats it.

  LATCHKEY_SMTP_URL        smtp://user:password@host:587, smtps://…, or "none";
                           ?starttls=required|opportunistic|off, &auth=…, &helo=…
  LATCHKEY_MAIL_FROM       sender, "Latchkey <latchkey@example.com>"
  LATCHKEY_FALLBACK_EMAIL  who hears of alerts of unknown organizations
  LATCHKEY_CONSOLE_URL     the console's address, as its readers reach it
  LATCHKEY_MAIL_TIMEZONE   the readers' time zone, "Europe/Berlin"
  LATCHKEY_MAIL_MAX_PER_HOUR  mails to one address in an hour (200), then a digest`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var cfg notifier.Config
			if err := run.Load(&cfg); err != nil {
				return err
			}
			if cmd.Flags().Changed("notifier-addr") {
				cfg.Addr = addr
			}
			return run.Service(cmd.Context(), "notifier", func(ctx context.Context, deps run.Deps) (run.Runner, error) {
				return notifier.New(ctx, cfg, deps)
			})
		},
	}
	cmd.Flags().StringVar(&addr, "notifier-addr", "", "metrics and health, empty for none ($LATCHKEY_NOTIFIER_ADDR)")
	return cmd
}
