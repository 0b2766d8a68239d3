package main

import (
	"strings"

	"github.com/spf13/cobra"
)

// policyFlags set the policy of a key or of an organization; a flag that is not
// given changes nothing.
type policyFlags struct {
	rotationDays, unusedDays int
	autoRotate               bool
	grace, onCompromise      string
	alertBudget              float64
}

func (p *policyFlags) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.IntVar(&p.rotationDays, "rotation-days", 0, "rotation interval in `DAYS` (0: the organization's, else 90)")
	f.BoolVar(&p.autoRotate, "auto-rotate", false, "rotate when the interval is over, instead of only saying so; the owner fetches the new secret with `latchkey key claim`")
	f.StringVar(&p.grace, "rotation-grace", "", "how long a key stays valid that the policy rotated, a `DURATION`: 24h, 7d, 0")
	f.StringVar(&p.onCompromise, "on-compromise", "", "what an alert does to its key, `ACTION[:SEVERITY]`: notify, rotate or suspend, from low, medium, high (if absent) or critical on")
	f.IntVar(&p.unusedDays, "unused-days", 0, "tell the owner after so many `DAYS` without use (0: 90)")
	f.Float64Var(&p.alertBudget, "alert-budget", 0, "accept `N` false alerts per key and month (0: the organization's, else LATCHKEY_ALERT_BUDGET, else one a year)")
}

// put adds to a request what the flags say.
func (p *policyFlags) put(cmd *cobra.Command, in object) {
	changed := cmd.Flags().Changed
	for flag, value := range map[string]any{
		"rotation-days": p.rotationDays, "unused-days": p.unusedDays, "auto-rotate": p.autoRotate, "rotation-grace": p.grace,
		"alert-budget": p.alertBudget,
	} {
		if changed(flag) {
			in[strings.ReplaceAll(flag, "-", "_")] = value
		}
	}
	if changed("on-compromise") {
		action, severity, found := strings.Cut(p.onCompromise, ":")
		if !found {
			severity = "high"
		}
		in["on_compromise"] = object{"action": action, "severity": severity}
	}
}
