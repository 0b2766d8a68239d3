package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/internal/benchcollect"
)

func newBenchCollectCmd() *cobra.Command {
	var out output
	opts := benchcollect.Options{}
	cmd := &cobra.Command{
		Use:   "collect",
		Short: "The transport and the collector, against a bare insert and a bare fetch",
		Long: `Publishes, fetches and stores made-up events with a NATS and a ClickHouse of its
own, and prints what each step reaches. Rates are of this machine at this
moment; what to compare are the ratios.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			opts.Progress = cmd.ErrOrStderr()
			r, err := benchcollect.Run(cmd.Context(), opts)
			if err != nil {
				return err
			}
			return out.print(cmd.OutOrStdout(), r, func(w io.Writer) { benchCollectTable(w, r) })
		},
	}
	out.flags(cmd)
	cmd.Flags().IntVar(&opts.Events, "events", 4_000_000, "events in frames")
	cmd.Flags().IntVar(&opts.Singles, "singles", 500_000, "events as one JSON message each")
	cmd.Flags().IntVar(&opts.Naive, "naive", 300, "events as one insert each")
	cmd.Flags().StringVar(&opts.Dir, "dir", "", "where data lies meanwhile (a temporary directory)")
	return cmd
}

func benchCollectTable(w io.Writer, r *benchcollect.Report) {
	line := func(what string, rate, base float64, goal string) {
		ratio := ""
		if base > 0 {
			ratio = fmt.Sprintf("%.2f", rate/base)
		}
		fmt.Fprintf(w, "%s\t%.0f\t%s\t%s\n", what, rate, ratio, goal)
	}
	fmt.Fprintln(w, "STEP\tEVENTS/S\tRATIO\tGOAL")
	line("publish, one JSON message an event", r.PublishSingles, 0, "")
	line("publish, in frames", r.PublishFrames, r.PublishSingles, "≥ 10 × the line above")
	line("(a) bare columnar insert", r.BareInsert, 0, "")
	line("(b) bare fetch of frames", r.BareFetch, 0, "")
	line("(c) collector from frames", r.Collector, r.BareInsert, "≥ 0.7 × (a)")
	line("bare fetch of single messages", r.BareFetchSingles, 0, "")
	line("(d) collector from single JSON messages", r.CollectorSingles, r.BareFetchSingles, "≥ 0.6 × the line above")
	line("(e) one insert a message", r.NaiveInsert, r.BareInsert, "")
	fmt.Fprintf(w, "\n%.0f bytes an event in frames with headers; process memory at most %s, NATS included\n", r.BytesPerEvent, size(r.CollectorMemory))
}
