package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/detector"
	"github.com/latchkey-dev/latchkey/services/internal/geo"
	"github.com/latchkey-dev/latchkey/services/internal/ingest"
	"github.com/latchkey-dev/latchkey/services/internal/progress"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// backtestOptions are the flags of `backtest`.
type backtestOptions struct {
	events string
	format string
	geo    string
	budget float64
}

func newBacktestCmd() *cobra.Command {
	var o backtestOptions
	cmd := &cobra.Command{
		Use:   "backtest --events FILE|-",
		Short: "Run the whole detector over a file of events; needs no server",
		Long: `Runs the detector over usage events (NDJSON or a JSON array, gzip or not) and writes one JSON alert a line on stdout, the
summary on stderr. The same input gives the same output, byte for byte.

All events count as live traffic, so that every alert is told; of a key's first days it mostly learns. An episode is one
alert: it is written once, in its final revision, with the time of the event that raised it, and detected_at equals time.
The lines come at the end, in order of time, then id. Events should be in order of time per key: late ones teach the hour
that they belong to and raise nothing. Times in the future are taken as they are.

Geo data that were fetched (latchkey geo fetch) or named by LATCHKEY_GEOIP_COUNTRY_DB and LATCHKEY_GEOIP_ASN_DB are used, and
nothing is downloaded unless --geo fetch says so.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return backtest(cmd, o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.events, "events", "", "`FILE` with the events, - for standard input")
	f.StringVar(&o.format, "format", "json", "`FORMAT` of the alerts: json or ndjson, both one JSON object a line")
	f.StringVar(&o.geo, "geo", "auto", "geo data: `auto` uses what is there, fetch fetches them first, off tells addresses apart by prefix only")
	f.Float64Var(&o.budget, "budget", 0, "accepted false alerts per key and month (default LATCHKEY_ALERT_BUDGET, else one per key and year)")
	_ = cmd.MarkFlagRequired("events")
	return cmd
}

func backtest(cmd *cobra.Command, o backtestOptions) (err error) {
	if o.format != "json" && o.format != "ndjson" {
		return fmt.Errorf("--format %q is neither json nor ndjson", o.format)
	}
	var cfg detector.Config
	if err := run.Load(&cfg); err != nil {
		return err
	}
	if cmd.Flags().Changed("budget") {
		cfg.Budget = o.budget
		if err := cfg.Validate(); err != nil {
			return err
		}
	}
	opts := detector.BacktestOptions{Budget: cfg.Budget}
	locator, err := backtestGeo(cmd.Context(), cmd.ErrOrStderr(), cfg.Config, o.geo)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, locator.Close()) }()
	if len(locator.Sources()) > 0 {
		opts.Locate = locator.Lookup
	}
	began := time.Now()
	report, err := backtestFile(cmd.Context(), o.events, opts)
	if err != nil {
		return err
	}
	if err := report.WriteAlerts(cmd.OutOrStdout()); err != nil {
		return err
	}
	report.PrintSummary(cmd.ErrOrStderr())
	took := time.Since(began)
	fmt.Fprintf(cmd.ErrOrStderr(), "%.1f s, %.0f events/s\n", took.Seconds(), float64(report.Events)/took.Seconds())
	return nil
}

func backtestGeo(ctx context.Context, stderr io.Writer, cfg geo.Config, mode string) (*geo.Locator, error) {
	switch mode {
	case "off":
		fmt.Fprintln(stderr, "geo data: off, addresses are told apart by prefix only")
		return nil, nil
	case "fetch":
		if err := fetchGeo(ctx, cfg); err != nil {
			return nil, err
		}
	case "auto":
	default:
		return nil, fmt.Errorf("--geo %q is none of auto, fetch, off", mode)
	}
	locator, err := geo.Open(ctx, cfg, nil)
	if err != nil {
		return nil, err
	}
	if len(locator.Sources()) == 0 {
		fmt.Fprintln(stderr, "geo data: none fetched yet, addresses are told apart by prefix only (--geo fetch fetches them)")
	} else {
		fmt.Fprintln(stderr, "geo data: "+strings.Join(locator.Sources(), ", "))
	}
	return locator, nil
}

func backtestFile(ctx context.Context, path string, opts detector.BacktestOptions) (report *detector.Report, err error) {
	size := int64(-1)
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
		size = info.Size()
	}
	f, err := ingest.OpenFile(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	bar := progress.Start("backtest", size, progress.Bytes)
	defer bar.Finish()
	return detector.Backtest(ctx, io.TeeReader(f, bar), opts)
}
