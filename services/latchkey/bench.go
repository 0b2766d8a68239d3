package main

import "github.com/spf13/cobra"

func newBenchCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure this machine: the published performance figures, as ratios in one run",
	}
	cmd.AddCommand(newBenchDetectCmd(), newBenchEdgeCmd(), newBenchCollectCmd())
	return cmd
}
