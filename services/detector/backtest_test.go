package detector

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

func ndjson(events []usage.Event) []byte {
	var text []byte
	for i := range events {
		text = append(events[i].AppendJSON(text), '\n')
	}
	return text
}

func backtested(t testing.TB, text []byte) (string, *Report) {
	t.Helper()
	rep, err := Backtest(t.Context(), bytes.NewReader(text), BacktestOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := rep.WriteAlerts(&out); err != nil {
		t.Fatal(err)
	}
	return out.String(), rep
}

func TestBacktestIsTheSameEveryTimeAndInEveryForm(t *testing.T) {
	t.Parallel()
	events := traffic(9, 21)
	text := ndjson(events)
	want, rep := backtested(t, text)
	if rep.Events != int64(len(events)) || len(rep.Alerts) == 0 || rep.Rejected != 0 {
		t.Fatalf("%d of %d events, %d alerts, %d rejected", rep.Events, len(events), len(rep.Alerts), rep.Rejected)
	}
	if !slices.IsSortedFunc(rep.Alerts, func(a, b alert.Alert) int { return a.Time.Compare(b.Time) }) {
		t.Error("alerts are out of order")
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, _ = z.Write(text)
	_ = z.Close()
	array, err := json.Marshal(events)
	if err != nil {
		t.Fatal(err)
	}
	for name, other := range map[string][]byte{
		"again": text, "gzip": packed.Bytes(), "array": array, "no last newline": bytes.TrimSpace(text), "CRLF": bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n")),
	} {
		if got, _ := backtested(t, other); got != want {
			t.Errorf("%s: the alerts differ", name)
		}
	}
}

func TestBacktestNamesRejectedLines(t *testing.T) {
	t.Parallel()
	good := string(ndjson(traffic(1, 1)[:1]))
	long := strings.Repeat(good, 3000) // more than one batch
	_, rep := backtested(t, []byte(good+"\n{\"x\":1}\n"+long+"nonsense\n{\"x\":1}\n"))
	if rep.Events != 3001 || rep.Rejected != 3 || len(rep.Reasons) != 2 {
		t.Fatalf("%d events, %d rejected: %+v", rep.Events, rep.Rejected, rep.Reasons)
	}
	if r := rep.Reasons[0]; r.Count != 2 || r.First != 3 {
		t.Errorf("%+v", r)
	}
	if r := rep.Reasons[1]; r.First != 3004 {
		t.Errorf("%+v", r)
	}
}

// TestServiceRaisesWhatBacktestRaises compares the two callers of the engine.
func TestServiceRaisesWhatBacktestRaises(t *testing.T) {
	t.Parallel()
	events := slices.DeleteFunc(traffic(12, 21), func(ev usage.Event) bool {
		return ev.Decision == usage.Deny // guessing is seen by partition
	})
	_, rep := backtested(t, ndjson(events))
	var want []string
	for _, a := range rep.Alerts {
		want = append(want, fmt.Sprint(a.ID, a.Revision))
	}
	last := map[string]int{}
	eachAlert(t, undisturbed(t, events, 1), func(id string, revision int) { last[id] = max(last[id], revision) })
	var got []string
	for id, revision := range last {
		got = append(got, fmt.Sprint(id, revision))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) || len(want) == 0 {
		t.Errorf("service: %v\nbacktest: %v", got, want)
	}
}

func BenchmarkBacktest(b *testing.B) {
	events := traffic(100, 60)
	text := ndjson(events)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, err := Backtest(b.Context(), bytes.NewReader(text), BacktestOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(events)*b.N)/b.Elapsed().Seconds(), "events/s")
}

func FuzzBacktest(f *testing.F) {
	f.Add(ndjson(traffic(1, 1)[:2]))
	f.Add([]byte("[{\"time\":1}]"))
	f.Add([]byte("\x1f\x8b"))
	f.Fuzz(func(t *testing.T, text []byte) {
		first, err := Backtest(t.Context(), bytes.NewReader(text), BacktestOptions{})
		if err != nil {
			return
		}
		second, err := Backtest(t.Context(), bytes.NewReader(text), BacktestOptions{})
		if err != nil || fmt.Sprint(first) != fmt.Sprint(second) {
			t.Fatalf("the second run differs: %v", err)
		}
	})
}
