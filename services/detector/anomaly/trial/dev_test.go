package trial

import (
	"fmt"
	"net/netip"
	"os"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/services/internal/geo"
	"github.com/latchkey-dev/latchkey/services/internal/simulate"
)

func TestDev(t *testing.T) {
	seeds := os.Getenv("DEV_SEEDS")
	if seeds == "" {
		t.Skip()
	}
	v := simulate.Variant(os.Getenv("DEV_VARIANT"))
	var locate func(netip.Addr) geo.Location = simulate.Locate
	if os.Getenv("DEV_NOGEO") != "" {
		locate = nil
	}
	budget := 1.0 / 12
	if b := os.Getenv("DEV_BUDGET"); b != "" {
		budget, _ = strconv.ParseFloat(b, 64)
	}
	var outs []Outcome
	for _, s := range strings.Split(seeds, ",") {
		n, _ := strconv.Atoi(s)
		o := simulate.Options{Seed: uint64(n), Variant: v, Start: time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC), Days: 60, Keys: 120, Attacks: 52}
		tr := simulate.New(o)
		out := Run(tr, o, Engine(budget, locate))
		outs = append(outs, out)
		for _, c := range out.Cases {
			if !c.Found || c.Alerts > 1 {
				fmt.Println("CASE", c.Label.Attack, c.Label.Kind, c.Label.KeyID, c.Label.Start.Format(time.DateTime), c.Label.Events, "alerts", c.Alerts)
			}
		}
		for _, f := range out.False {
			fmt.Println("FALSE", f.Kind, f.Flag.Time.Format(time.DateTime), f.Flag.Summary)
		}
	}
	s := Summarize(outs)
	fmt.Printf("recall %.3f fp %.3f cold %d events p50 %.0f p90 %.0f secs p50 %.0f p90 %.0f mails %.2f\n", s.Recall, s.PerMonth, s.Cold, s.MedianEvents, s.NinetyEvents, s.MedianSeconds, s.NinetySeconds, s.Mails)
	show(s.ByAttack)
	show(s.ByKind)
}

func show(m map[string]float64) {
	var k []string
	for n := range m {
		k = append(k, n)
	}
	sort.Strings(k)
	for _, n := range k {
		fmt.Printf("%s %.2f  ", n, m[n])
	}
	fmt.Println()
}
