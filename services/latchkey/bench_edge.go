package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/edge"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
)

func newBenchEdgeCmd() *cobra.Command {
	var out output
	var keys, clients int
	var round time.Duration
	cmd := &cobra.Command{
		Use:   "edge",
		Short: "Measure the edge: one decision, forward-auth, and the start with a million keys",
		Long: `Measures in one run, so that the ratios mean something on any machine:

  one decision   checksum, hash, look-up, status, scope and taking the usage event,
                 against the bare SHA-256 of the same keys (goal: at most 4 times)
  forward-auth   requests a second with their events written down and published,
                 against a handler that only returns 200 (goal: at least 0.8)
  the start      until every key is in memory (goal: 10 s and 500 bytes a key for a million)`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			report, err := benchEdge(cmd.Context(), edge.BenchOptions{
				Keys: keys, Round: round, Clients: clients,
				Say: func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) },
			})
			if err != nil {
				return err
			}
			return out.print(cmd.OutOrStdout(), report, func(w io.Writer) { printBenchEdge(w, report) })
		},
	}
	out.flags(cmd)
	cmd.Flags().IntVar(&keys, "keys", 1_000_000, "how many keys to load")
	cmd.Flags().IntVar(&clients, "clients", 32, "connections that ask forward-auth at once")
	cmd.Flags().DurationVar(&round, "round", time.Second, "length of one measurement")
	return cmd
}

func benchEdge(ctx context.Context, o edge.BenchOptions) (edge.BenchReport, error) {
	dir, err := os.MkdirTemp("", "latchkey-bench-")
	if err != nil {
		return edge.BenchReport{}, fmt.Errorf("make a directory: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	srv, err := natsd.Start(ctx, natsd.Options{DataDir: filepath.Join(dir, "nats"), Addr: "127.0.0.1:0"})
	if err != nil {
		return edge.BenchReport{}, err
	}
	defer srv.Shutdown()
	nc, err := bus.Connect(srv.ClientURL(), "bench") // as an edge of its own does
	if err != nil {
		return edge.BenchReport{}, err
	}
	defer nc.Close()
	o.Spool = filepath.Join(dir, "spool")
	return edge.Bench(ctx, nc, o)
}

func printBenchEdge(w io.Writer, r edge.BenchReport) {
	row := func(what, figure, goal string, ok bool) {
		mark := "met"
		if !ok {
			mark = "missed"
		}
		if goal == "" {
			mark = ""
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", what, figure, goal, mark)
	}
	fmt.Fprintln(w, "MEASURE\tFIGURE\tGOAL\t")
	row("bare SHA-256 of a key", fmt.Sprintf("%.0f ns", r.SHA256Ns), "", true)
	row("verify, scope, enqueue", fmt.Sprintf("%.0f ns", r.DecideNs), "", true)
	row("  among all keys, per SHA-256", fmt.Sprintf("%.2f", r.DecideRatio), "≤ 4", r.DecideRatio <= 4)
	row("  one key again and again, per SHA-256", fmt.Sprintf("%.2f", r.HotRatio), "≤ 4", r.HotRatio <= 4)
	row("  allocations", fmt.Sprintf("%.0f", r.DecideAllocs), "0", r.DecideAllocs == 0)
	row("handler that only returns 200", fmt.Sprintf("%.0f requests/s", r.BareRequests), "", true)
	row("forward-auth", fmt.Sprintf("%.0f requests/s", r.AuthRequests), "", true)
	row("  ratio", fmt.Sprintf("%.2f", r.AuthRatio), "≥ 0.8", r.AuthRatio >= 0.8)
	row("  events stored, dropped", fmt.Sprintf("%.0f, %.0f", r.EventsStored, r.EventsDropped), "0 dropped", r.EventsDropped == 0)
	row(fmt.Sprintf("start with %d keys", r.Keys), fmt.Sprintf("%.1f s", r.StartSeconds), "≤ 10 s", r.StartSeconds <= 10)
	row("  memory a key", fmt.Sprintf("%.0f bytes", r.BytesPerKey), "≤ 500", r.BytesPerKey <= 500)
}
