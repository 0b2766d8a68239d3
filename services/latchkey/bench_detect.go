package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly/trial"
	"github.com/latchkey-dev/latchkey/services/internal/geo"
	"github.com/latchkey-dev/latchkey/services/internal/simulate"
)

// frozenSeeds are the seeds of the published figures. No parameter was chosen by
// looking at them.
var frozenSeeds = []uint64{7101, 7102}

type detectFlags struct {
	speed   bool
	output  string
	svg     string
	data    string
	seeds   []uint
	variant string
	noGeo   bool
	only    []string
}

// detectReport is what `bench detect --output json` prints.
type detectReport struct {
	Seeds       []uint64                 `json:"seeds,omitempty"`
	Variants    []string                 `json:"variants,omitempty"`
	Ours        map[string]trial.Summary `json:"latchkey,omitempty"` // by budget
	Others      map[string]trial.Summary `json:"others,omitempty"`
	NAB         []trial.Spikes           `json:"nab,omitempty"`
	Masquerades []trial.Masquerades      `json:"masquerade,omitempty"`
	Speed       []trial.Speed            `json:"speed,omitempty"`
	points      []trial.Point
}

func newBenchDetectCmd() *cobra.Command {
	f := detectFlags{}
	cmd := &cobra.Command{
		Use:   "detect",
		Short: "Compare the detector with the rules that others use",
		Long: `Compare the detector with the rules that others use: on simulated traffic with
seeds that no parameter was tuned on, and, with --data, on the Numenta Anomaly
Benchmark (DIR/nab) and on Schonlau's masquerade data (DIR/masquerade).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	cmd.Flags().BoolVar(&f.speed, "speed", false, "measure events per second and bytes per key instead")
	cmd.Flags().StringVar(&f.output, "output", "text", "text or json")
	cmd.Flags().StringVar(&f.svg, "svg", "", "write a chart to `FILE`")
	cmd.Flags().StringVar(&f.data, "data", "", "`DIR` with nab/ and masquerade/")
	cmd.Flags().UintSliceVar(&f.seeds, "seeds", nil, "seeds of the simulated traffic (default the frozen ones)")
	cmd.Flags().StringVar(&f.variant, "variant", "both", "a, b or both generators")
	cmd.Flags().StringSliceVar(&f.only, "only", nil, "compare only detectors whose name contains one of these `words`")
	cmd.Flags().BoolVar(&f.noGeo, "no-geo", false, "give the detector no countries and operators")
	return cmd
}

func (f *detectFlags) run(cmd *cobra.Command) error {
	if f.output != "text" && f.output != "json" {
		return fmt.Errorf("output %q is neither text nor json", f.output)
	}
	var r detectReport
	if f.speed {
		for _, keys := range []int{100_000, 1_000_000} {
			r.Speed = append(r.Speed, trial.MeasureSpeed(keys, 4_000_000))
		}
	} else {
		if err := f.real(cmd.ErrOrStderr(), &r); err != nil {
			return err
		}
		if err := f.simulated(cmd.ErrOrStderr(), &r); err != nil {
			return err
		}
	}
	if f.svg != "" && len(r.points) > 0 {
		if err := writeChart(f.svg, &r); err != nil {
			return err
		}
	}
	if f.output == "json" {
		enc := json.NewEncoder(cmd.OutOrStdout())
		enc.SetIndent("", "  ")
		return enc.Encode(&r)
	}
	return r.print(cmd.OutOrStdout())
}

var detectBudgets = []float64{0.01, 0.05, anomaly.DefaultBudget, 0.1, 0.5}

func (f *detectFlags) simulated(progress io.Writer, r *detectReport) error {
	r.Seeds = frozenSeeds
	if len(f.seeds) > 0 {
		r.Seeds = nil
		for _, s := range f.seeds {
			r.Seeds = append(r.Seeds, uint64(s))
		}
	}
	switch f.variant {
	case "both":
		r.Variants = []string{"a", "b"}
	case "a", "b":
		r.Variants = []string{f.variant}
	default:
		return fmt.Errorf("variant %q is none of a, b, both", f.variant)
	}
	locate := simulate.Locate
	if f.noGeo {
		locate = nil
	}
	contestants := slices.DeleteFunc(contestantsFor(locate), func(c contestant) bool {
		return len(f.only) > 0 && !slices.ContainsFunc(f.only, func(word string) bool { return strings.Contains(c.name, word) })
	})
	if len(contestants) == 0 {
		return fmt.Errorf("no detector's name contains any of %q", f.only)
	}
	outcomes := make([][]trial.Outcome, len(contestants))
	for _, run := range f.runs(progress, r, contestants) {
		for i, out := range run {
			outcomes[i] = append(outcomes[i], out)
		}
	}
	r.Ours, r.Others = map[string]trial.Summary{}, map[string]trial.Summary{}
	for i, c := range contestants {
		s := trial.Summarize(outcomes[i])
		r.points = append(r.points, trial.Point{Name: c.name, Summary: s, Ours: c.ours})
		if c.ours {
			r.Ours[c.name] = s
		} else {
			r.Others[c.name] = s
		}
	}
	return nil
}

// runs plays every generator with every seed to fresh detectors, as many at a
// time as there are processors.
func (f *detectFlags) runs(progress io.Writer, r *detectReport, contestants []contestant) [][]trial.Outcome {
	out := make([][]trial.Outcome, len(r.Variants)*len(r.Seeds))
	var wg sync.WaitGroup
	slots := make(chan struct{}, runtime.NumCPU())
	for i := range out {
		variant, seed := r.Variants[i/len(r.Seeds)], r.Seeds[i%len(r.Seeds)]
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			o := simulate.Options{
				Seed: seed, Variant: simulate.Variant(variant), Start: time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC),
				Days: 60, Keys: 120, Attacks: 52,
			}
			fmt.Fprintf(progress, "generator %s, seed %d …\n", variant, seed)
			detectors := make([]trial.Detector, len(contestants))
			for k, c := range contestants {
				detectors[k] = c.make()
			}
			out[i] = trial.RunAll(simulate.New(o), o, detectors)
		})
	}
	wg.Wait()
	return out
}

type contestant struct {
	name string
	ours bool
	make func() trial.Detector
}

func contestantsFor(locate func(netip.Addr) geo.Location) []contestant {
	var out []contestant
	for _, b := range detectBudgets {
		name := fmt.Sprintf("Latchkey, budget %.3g", b)
		if b == anomaly.DefaultBudget {
			name = "Latchkey, default"
		}
		out = append(out, contestant{name, true, func() trial.Detector { return trial.Engine(b, locate) }})
	}
	for _, rule := range trial.Rules() {
		out = append(out, contestant{rule.Name, false, rule.Detector})
	}
	return out
}

// real runs what --data has; either of its parts may be missing.
func (f *detectFlags) real(progress io.Writer, r *detectReport) error {
	if f.data == "" {
		return nil
	}
	nab, masquerade := filepath.Join(f.data, "nab"), filepath.Join(f.data, "masquerade")
	hasNAB, hasMasquerade := isDir(nab), isDir(masquerade)
	if !hasNAB && !hasMasquerade {
		return fmt.Errorf("%s has neither nab/ nor masquerade/", f.data)
	}
	var err1, err2 error
	if hasNAB {
		fmt.Fprintln(progress, "Numenta count series …")
		r.NAB, err1 = trial.NAB(nab, []float64{anomaly.DefaultBudget, 0.3, 1, 3, 10})
	}
	if hasMasquerade {
		fmt.Fprintln(progress, "masquerade blocks …")
		r.Masquerades, err2 = trial.Masquerade(masquerade, []float64{anomaly.DefaultBudget})
	}
	return errors.Join(err1, err2)
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func writeChart(path string, r *detectReport) error {
	file, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("create chart: %w", err)
	}
	months, attacks := 0.0, 0
	for _, s := range r.Ours {
		months, attacks = s.KeyMonths, s.Attacks
	}
	note := fmt.Sprintf("Simulated traffic, %.0f key-months, %d attacks, seeds that nothing was tuned on; bars are 95 %% intervals", months, attacks)
	return errors.Join(trial.Chart(file, r.points, note), file.Close())
}

func (r *detectReport) print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	if len(r.points) > 0 {
		r.printSimulated(tw)
	}
	if len(r.NAB) > 0 {
		fmt.Fprintln(tw, "\nNumenta count series, 10× spikes put in\tlow hours\thigh hours\tfalse per series-month")
		for _, s := range r.NAB {
			fmt.Fprintf(tw, "%s\t%.2f\t%.2f\t%.2f\n", s.Name, s.Low, s.High, s.PerMonth)
		}
	}
	if len(r.Masquerades) > 0 {
		fmt.Fprintln(tw, "\nMasquerade blocks\tfound\tfalse alarms")
		for _, m := range r.Masquerades {
			fmt.Fprintf(tw, "%s\t%.1f %%\t%.2f %%\n", m.Name, 100*m.Found, 100*m.False)
		}
	}
	if len(r.Speed) > 0 {
		fmt.Fprintln(tw, "keys\tevents/s\theap bytes a key\tencoded bytes\tallocations an event\talerts")
		for _, s := range r.Speed {
			fmt.Fprintf(tw, "%d\t%.0f\t%.0f\t%.0f\t%.4f\t%d\n", s.Keys, s.EventsPerSecond, s.HeapBytes, s.EncodedBytes, s.Allocations, s.Alerts)
		}
	}
	return tw.Flush()
}

// whole is a number without its fraction, or a dash for none.
func whole(x *float64) string {
	if x == nil {
		return "–"
	}
	return strconv.FormatFloat(*x, 'f', 0, 64)
}

func (r *detectReport) printSimulated(w io.Writer) {
	fmt.Fprintf(w, "simulated traffic: generators %s, seeds %v\n", strings.Join(r.Variants, " and "), r.Seeds)
	fmt.Fprintln(w, "detector\trecall\t95 %\tfalse per key-month\t95 %\tevents to alert (median, p90)\tmails an episode\tcold start")
	for _, p := range r.points {
		s := p.Summary
		fmt.Fprintf(w, "%s\t%.3f\t%.2f–%.2f\t%.3f\t%.3f–%.3f\t%s, %s\t%.2f\t%d\n", p.Name, s.Recall, s.RecallLow, s.RecallTop,
			s.PerMonth, s.PerLow, s.PerHigh, whole(s.MedianEvents), whole(s.NinetyEvents), s.Mails, s.Cold)
	}
	i := slices.IndexFunc(r.points, func(p trial.Point) bool { return p.Name == "Latchkey, default" })
	if i < 0 {
		return
	}
	s := r.points[i].Summary
	fmt.Fprintf(w, "\nLatchkey by default: seconds to the alert, median %s, p90 %s\n", whole(s.MedianSeconds), whole(s.NinetySeconds))
	fmt.Fprintln(w, "attack\trecall")
	for _, name := range simulate.Attacks {
		if v, ok := s.ByAttack[string(name)]; ok {
			fmt.Fprintf(w, "%s\t%.2f\n", name, v)
		}
	}
	fmt.Fprintln(w, "benign life\tfalse per key-month")
	for _, name := range simulate.Kinds {
		fmt.Fprintf(w, "%s\t%.3f\n", name, s.ByKind[string(name)])
	}
}
