package trial

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/services/internal/simulate"
)

func TestSummaryWithoutAlertsIsJSON(t *testing.T) {
	t.Parallel()
	s := Summarize([]Outcome{{Cases: []Case{{Label: simulate.Label{Attack: simulate.Guessing}}}, KeyMonths: map[simulate.Kind]float64{"server": 2}}})
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), `"events_to_alert_median":null`) {
		t.Errorf("%s", text)
	}
}

func TestBadSeriesAreRefused(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"empty": "", "header only": "timestamp,value\n", "one column": "timestamp\n2026-01-01 00:00:00\n",
		"backwards": "timestamp,value\n2026-01-02 00:00:00,1\n2026-01-01 00:00:00,1\n", "no number": "timestamp,value\n2026-01-01 00:00:00,NaN\n",
		"too short": "timestamp,value\n2026-01-01 00:00:00,1\n",
	} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "windows.json"), `{"x/series.csv":[]}`)
		write(t, filepath.Join(dir, "series.csv"), content)
		if _, err := NAB(dir, nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestBadMasqueradesAreRefused(t *testing.T) {
	t.Parallel()
	block := strings.Repeat("ls\n", blockSize)
	for name, content := range map[string]struct{ user, label string }{
		"short users":   {strings.Repeat(block, cleanBlocks), "0\n"},
		"too few rows":  {strings.Repeat(block, cleanBlocks+2), strings.Repeat("0 ", 25)},
		"strange label": {strings.Repeat(block, cleanBlocks+1), strings.Repeat("x ", 25)},
	} {
		dir := t.TempDir()
		for u := range 25 {
			write(t, filepath.Join(dir, fmt.Sprintf("User%d", u+1)), content.user)
		}
		write(t, filepath.Join(dir, "label.txt"), content.label)
		if _, err := Masquerade(dir, nil); err == nil || strings.Contains(err.Error(), "no such file") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
