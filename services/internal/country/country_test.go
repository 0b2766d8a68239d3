package country

import "testing"

func TestNames(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]string{"NL": "the Netherlands", "DE": "Germany", "US": "the United States", "XX": "XX", "": "", "nonsense": "nonsense"} {
		if got := InSentence(code); got != want {
			t.Errorf("InSentence(%q) = %q, want %q", code, got, want)
		}
	}
}
