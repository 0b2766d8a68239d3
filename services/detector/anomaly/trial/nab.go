package trial

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
)

// Spikes is what a detector made of real count series (Numenta Anomaly Benchmark,
// Lavin & Ahmad 2015) and of spikes of ten times an hour's count put into them.
type Spikes struct {
	Name string `json:"name"`
	// Low and High are the parts found of the spikes in the lowest and in the
	// highest quarter of a day's hours.
	Low  float64 `json:"recall_low_hours"`
	High float64 `json:"recall_high_hours"`
	// PerMonth is the alerts outside of the labelled windows per series-month.
	PerMonth float64 `json:"false_alerts_per_series_month"`
}

type series struct {
	name    string
	start   time.Time // of the first full hour
	hours   []float64
	windows [][2]time.Time
}

// nabLearn is the part of a series that only teaches, for every detector alike.
const nabLearn = 17 * 24

// NAB runs the count series of a directory through our engine at several budgets and
// through the rules.
func NAB(dir string, budgets []float64) ([]Spikes, error) {
	all, err := loadNAB(dir)
	if err != nil {
		return nil, err
	}
	var out []Spikes
	for _, b := range budgets {
		out = append(out, nabEngine(all, b))
	}
	for _, k := range []float64{3, 4, 5, 6, 8} {
		out = append(out, nabRule(all, fmt.Sprintf("%.0f sigma", k), sigma(k)))
	}
	for _, r := range Rules()[:4] {
		if r.Name != "6 sigma" {
			out = append(out, nabRule(all, r.Name, r.Spike))
		}
	}
	return out, nil
}

func loadNAB(dir string) ([]series, error) {
	content, err := os.ReadFile(filepath.Join(dir, "windows.json"))
	if err != nil {
		return nil, fmt.Errorf("read anomaly windows: %w", err)
	}
	windows := map[string][][2]string{}
	if err := json.Unmarshal(content, &windows); err != nil {
		return nil, fmt.Errorf("read anomaly windows: %w", err)
	}
	var out []series
	for _, name := range sortedNames(windows) {
		s, err := loadSeries(filepath.Join(dir, filepath.Base(name)))
		if err != nil {
			return nil, err
		}
		for _, w := range windows[name] {
			from, err1 := time.Parse(time.DateTime, strings.TrimSuffix(w[0], ".000000"))
			to, err2 := time.Parse(time.DateTime, strings.TrimSuffix(w[1], ".000000"))
			if err1 != nil || err2 != nil {
				return nil, fmt.Errorf("read anomaly window of %s: %v", name, w)
			}
			s.windows = append(s.windows, [2]time.Time{from, to})
		}
		if len(s.hours) > nabLearn+24 {
			out = append(out, s)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("read anomaly windows: none of %d series is longer than the %d days that are learned from", len(windows), nabLearn/24+1)
	}
	return out, nil
}

// What a series may hold: more would take for ever to play.
const (
	mostHours = 24 * 366 * 10
	mostCount = 1e6
)

func loadSeries(path string) (series, error) {
	f, err := os.Open(path)
	if err != nil {
		return series{}, fmt.Errorf("open series: %w", err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		return series{}, fmt.Errorf("read series %s: %w", path, err)
	}
	s := series{name: filepath.Base(path)}
	for i, row := range rows {
		if len(row) < 2 {
			return series{}, fmt.Errorf("read series %s: row %d has one column, want timestamp and value", path, i+1)
		}
		if i == 0 {
			continue // the header
		}
		at, err := time.Parse(time.DateTime, row[0])
		if err != nil {
			return series{}, fmt.Errorf("read series %s: %w", path, err)
		}
		v, err := strconv.ParseFloat(row[1], 64)
		if err != nil {
			return series{}, fmt.Errorf("read series %s: %w", path, err)
		}
		if s.start.IsZero() {
			s.start = at.Truncate(time.Hour)
		}
		h := int(at.Sub(s.start) / time.Hour)
		if at.Before(s.start) || h > mostHours || !(v >= 0 && v < mostCount) {
			return series{}, fmt.Errorf("read series %s: row %d: want counts in the order of time, within ten years", path, i+1)
		}
		for len(s.hours) <= h {
			s.hours = append(s.hours, 0)
		}
		s.hours[h] += v
	}
	return s, nil
}

func (s *series) labelled(h int) bool {
	at := s.start.Add(time.Duration(h) * time.Hour)
	for _, w := range s.windows {
		if at.Add(time.Hour).After(w[0]) && at.Before(w[1]) {
			return true
		}
	}
	return false
}

// spots are the hours for spikes: the lowest and the highest six of every third day.
func (s *series) spots() (low, high []int) {
	for d := nabLearn; d+24 <= len(s.hours); d += 72 {
		hours := make([]int, 24)
		for i := range hours {
			hours[i] = d + i
		}
		slices.SortStableFunc(hours, func(a, b int) int { return int(s.hours[a] - s.hours[b]) })
		for i := range 6 {
			if h := hours[i]; !s.labelled(h) {
				low = append(low, h)
			}
			if h := hours[18+i]; !s.labelled(h) {
				high = append(high, h)
			}
		}
	}
	return low, high
}

func nabEngine(all []series, budget float64) Spikes {
	out := Spikes{Name: fmt.Sprintf("Latchkey, budget %.2g", budget)}
	var t tally
	for i := range all {
		s := &all[i]
		low, high := s.spots()
		e := anomaly.New(anomaly.Options{Budget: budget})
		for h, n := range s.hours {
			if slices.Contains(low, h) {
				t.low(spikeFound(e, s, h, budget))
			}
			if slices.Contains(high, h) {
				t.high(spikeFound(e, s, h, budget))
			}
			raised := feedHour(e, s, h, n)
			if raised && h >= nabLearn && !s.labelled(h) {
				t.falses++
			}
		}
		t.months += float64(len(s.hours)-nabLearn) / 720
	}
	return t.into(out)
}

// spikeFound plays an hour with ten times its requests to a copy of the engine.
func spikeFound(e *anomaly.Engine, s *series, h int, budget float64) bool {
	twin := anomaly.New(anomaly.Options{Budget: budget})
	if err := twin.Decode("series", e.Encode("series")); err != nil {
		return false
	}
	return feedHour(twin, s, h, max(10*s.hours[h], 10))
}

// feedHour plays an hour's count as requests at even distances and reports
// whether a new alert came.
func feedHour(e *anomaly.Engine, s *series, h int, n float64) bool {
	ev := usage.Event{
		OrgID: "org", KeyID: "series", SourceIP: netip.AddrFrom4([4]byte{192, 0, 2, 1}),
		Method: "POST", Route: "/count", Decision: usage.Allow,
	}
	raised := false
	for i := range int(n) {
		ev.Time = s.start.Add(time.Duration(h)*time.Hour + time.Duration(float64(i)/n*float64(time.Hour)))
		for _, a := range e.Observe(&ev, false) {
			raised = raised || a.Revision == 1
		}
	}
	return raised
}

func nabRule(all []series, name string, spike func([]float64, float64) bool) Spikes {
	var t tally
	for i := range all {
		s := &all[i]
		low, high := s.spots()
		last := -100
		for h, n := range s.hours {
			past := s.hours[max(0, h-ruleHistory):h]
			if slices.Contains(low, h) {
				t.low(spike(past, max(10*n, 10)))
			}
			if slices.Contains(high, h) {
				t.high(spike(past, max(10*n, 10)))
			}
			if h >= nabLearn && spike(past, n) && !s.labelled(h) {
				if h-last > 24 { // an episode, as for our alerts
					t.falses++
				}
				last = h
			}
		}
		t.months += float64(len(s.hours)-nabLearn) / 720
	}
	return t.into(Spikes{Name: name})
}

type tally struct {
	lowFound, lowAll, highFound, highAll, falses int
	months                                       float64
}

func (t *tally) low(found bool) {
	t.lowAll++
	if found {
		t.lowFound++
	}
}

func (t *tally) high(found bool) {
	t.highAll++
	if found {
		t.highFound++
	}
}

func (t *tally) into(s Spikes) Spikes {
	s.Low = float64(t.lowFound) / float64(max(t.lowAll, 1))
	s.High = float64(t.highFound) / float64(max(t.highAll, 1))
	s.PerMonth = float64(t.falses) / max(t.months, 0.01)
	return s
}
