package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/internal/simulate"
)

type simulateFlags struct {
	options simulate.Options
	variant string
	start   string
	attacks int
	only    []string
	out     string
	labels  string
}

func newSimulateCmd() *cobra.Command {
	f := simulateFlags{}
	cmd := &cobra.Command{
		Use:   "simulate",
		Short: "Make labelled traffic of API keys: ten benign lives and thirteen attacks",
		Long: `Make labelled traffic of API keys: NDJSON events in the order of their arrival,
and a JSON file that says what each key is and when it is attacked. The same
flags make the same bytes. The traffic is invented: it serves to compare
detectors, and to see one at work.`,
		Example: `  latchkey simulate --seed 7 --days 60 --keys 120 --attacks 52 --out events.ndjson --labels labels.json
  latchkey simulate --seed 7 | latchkey backtest --events -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	cmd.Flags().Uint64Var(&f.options.Seed, "seed", 1, "`number` that decides everything random")
	cmd.Flags().IntVar(&f.options.Days, "days", 60, "length in days")
	cmd.Flags().IntVar(&f.options.Keys, "keys", 120, "number of keys")
	cmd.Flags().IntVar(&f.attacks, "attacks", 52, "number of keys that are attacked, once each")
	cmd.Flags().StringSliceVar(&f.only, "only", nil, "attacks to choose from (default all)")
	cmd.Flags().StringVar(&f.start, "start", "", "first day, as 2026-03-02 (default: so that it ends yesterday)")
	cmd.Flags().StringVar(&f.variant, "variant", "a", "how habits are drawn: a or b")
	cmd.Flags().StringVar(&f.out, "out", "-", "`FILE` for the events, - for standard output")
	cmd.Flags().StringVar(&f.labels, "labels", "", "`FILE` for the labels")
	return cmd
}

func (f *simulateFlags) run(cmd *cobra.Command) error {
	if err := f.check(); err != nil {
		return err
	}
	t := simulate.New(f.options)
	if f.labels != "" {
		content, err := json.MarshalIndent(t.Labels(), "", "  ")
		if err != nil {
			return fmt.Errorf("encode labels: %w", err)
		}
		if err := os.WriteFile(f.labels, append(content, '\n'), 0o644); err != nil {
			return fmt.Errorf("write labels: %w", err)
		}
	}
	if f.out == "-" {
		return writeEvents(cmd.OutOrStdout(), t)
	}
	file, err := os.Create(f.out)
	if err != nil {
		return fmt.Errorf("create event file: %w", err)
	}
	return errors.Join(writeEvents(file, t), file.Close())
}

func (f *simulateFlags) check() error {
	o := &f.options
	o.Variant, o.Attacks = simulate.Variant(f.variant), f.attacks
	if o.Variant != simulate.VariantA && o.Variant != simulate.VariantB {
		return fmt.Errorf("variant %q is neither a nor b", f.variant)
	}
	if o.Days < 1 || o.Keys < 1 || o.Attacks < 0 {
		return errors.New("--days and --keys must be positive, --attacks not negative")
	}
	for _, name := range f.only {
		o.Only = append(o.Only, simulate.Attack(name))
	}
	if err := simulate.CheckAttacks(o.Only); err != nil {
		return err
	}
	if f.start == "" {
		o.Start = time.Now().UTC().Truncate(24*time.Hour).AddDate(0, 0, -o.Days)
		return nil
	}
	at, err := time.Parse(time.DateOnly, f.start)
	if err != nil {
		return fmt.Errorf("read --start: %w", err)
	}
	o.Start = at
	return nil
}

func writeEvents(w io.Writer, t *simulate.Traffic) error {
	out := bufio.NewWriterSize(w, 1<<18)
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	for ev := range t.Events() {
		if err := enc.Encode(ev); err != nil {
			return fmt.Errorf("write events: %w", err)
		}
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write events: %w", err)
	}
	return nil
}
