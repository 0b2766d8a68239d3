package wording

import (
	"math"
	"testing"

	"github.com/latchkey-dev/latchkey/schemas/alert"
)

func TestRarity(t *testing.T) {
	t.Parallel()
	for p, want := range map[float64]string{
		1.2e-6: "very rare: about 1 in 830\u202f000 by chance", 0.0003: "rare: about 1 in 3\u202f300 by chance",
		0.2: "usual by itself", 0: "never by chance: less than 1 in a billion", 1e-40: "never by chance: less than 1 in a billion", -1: "",
	} {
		if got := Rarity(p); got != want {
			t.Errorf("Rarity(%g) = %q, want %q", p, got, want)
		}
	}
	if Rarity(math.NaN()) != "" {
		t.Error("NaN has a rarity")
	}
}

func TestHeadline(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		a    alert.Alert
		want string
	}{
		{alert.Alert{}, "crm is behaving unlike itself"},
		{alert.Alert{Triggers: []string{alert.NewIPRange}, Country: "NL"}, "crm was used from a network in the Netherlands that is new to it"},
		{alert.Alert{Triggers: []string{alert.NewIPRange}}, "crm was used from a network that is new to it"},
		{alert.Alert{Triggers: []string{"odd_thing\r\n<b>"}}, "crm: odd thingb"},
	} {
		if got := Headline("crm", &tt.a); got != tt.want {
			t.Errorf("Headline() = %q, want %q", got, tt.want)
		}
	}
}
