package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/collector"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

func newCollectorCmd() *cobra.Command {
	var addr string
	cmd := &cobra.Command{
		Use:   "collector",
		Short: "Run the collector: events, alerts, audit and baselines into ClickHouse",
		Long: `Reads from NATS ($LATCHKEY_NATS_URL) and stores in ClickHouse ($LATCHKEY_CLICKHOUSE_URL),
each event once. Any number may run: they share the partitions, and one takes
over about five seconds after another died. Without ClickHouse it waits.

  LATCHKEY_CLICKHOUSE_CLUSTER        migrate ON CLUSTER with Replicated engines
  LATCHKEY_COLLECTOR_BATCH_ROWS      rows of an insert when it is behind (50000)
  LATCHKEY_COLLECTOR_FLUSH_INTERVAL  how long an event waits for others (1s)
  LATCHKEY_COLLECTOR_INSERTERS       inserts at once (4)
  LATCHKEY_COLLECTOR_MIGRATE         bring the schema up to date first (true)
  LATCHKEY_USAGE_TAIL_BYTES          how much of USAGE to keep though all have read it

It stays below 300 MB of memory (GOMEMLIMIT moves that).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var cfg collector.Config
			if err := run.Load(&cfg); err != nil {
				return err
			}
			if cmd.Flags().Changed("collector-addr") {
				cfg.Addr = addr
			}
			collector.LimitMemory()
			return run.Service(cmd.Context(), "collector", func(ctx context.Context, deps run.Deps) (run.Runner, error) {
				return collector.New(ctx, cfg, deps)
			})
		},
	}
	cmd.Flags().StringVar(&addr, "collector-addr", "", "metrics and health, empty for none ($LATCHKEY_COLLECTOR_ADDR)")
	return cmd
}
