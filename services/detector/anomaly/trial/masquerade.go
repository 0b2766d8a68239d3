package trial

import (
	"bufio"
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
)

// Masquerades is what a detector made of the masquerade data (Schonlau et al. 2001):
// blocks of 100 commands of 25 users, some typed by somebody else.
type Masquerades struct {
	Name string `json:"name"`
	// Found is the part of foreign blocks that were flagged, False that of the user's own.
	Found float64 `json:"found"`
	False float64 `json:"false_alarms"`
}

const (
	blockSize   = 100
	cleanBlocks = 50
)

type typist struct {
	blocks  [][]string
	foreign []bool // of the blocks after the clean ones
}

func loadMasquerade(dir string) ([]typist, error) {
	labels, err := readWords(filepath.Join(dir, "label.txt"))
	if err != nil {
		return nil, err
	}
	var users []typist
	for u := 1; u <= 25; u++ {
		lines, err := readWords(filepath.Join(dir, fmt.Sprintf("User%d", u)))
		if err != nil {
			return nil, err
		}
		t := typist{blocks: slices.Collect(slices.Chunk(lines, blockSize))}
		for b := range len(t.blocks) - cleanBlocks {
			at := b*25 + u - 1
			if at >= len(labels) {
				return nil, fmt.Errorf("read labels: %d values, want more", len(labels))
			}
			t.foreign = append(t.foreign, labels[at] == "1")
		}
		users = append(users, t)
	}
	return users, nil
}

func readWords(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open masquerade data: %w", err)
	}
	defer f.Close()
	var out []string
	for s := bufio.NewScanner(f); s.Scan(); {
		out = append(out, strings.Fields(s.Text())...)
	}
	return out, nil
}

// Masquerade runs the data through the engine (a command is a route, a block a
// day) at several budgets, and through the Dirichlet model at several false-alarm rates.
func Masquerade(dir string, budgets []float64) ([]Masquerades, error) {
	users, err := loadMasquerade(dir)
	if err != nil {
		return nil, err
	}
	var out []Masquerades
	for _, b := range budgets {
		out = append(out, masqueradeEngine(users, b))
	}
	return append(out, masqueradeDirichlet(users)...), nil
}

func masqueradeEngine(users []typist, budget float64) Masquerades {
	out := Masquerades{Name: fmt.Sprintf("Latchkey, budget %.2g", budget)}
	var c confusion
	start := time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)
	for _, u := range users {
		e := anomaly.New(anomaly.Options{Budget: budget})
		ev := usage.Event{
			OrgID: "org", KeyID: "user", SourceIP: netip.AddrFrom4([4]byte{192, 0, 2, 1}), Decision: usage.Allow,
		}
		for b, block := range u.blocks {
			flagged := false
			for i, command := range block {
				ev.Time = start.AddDate(0, 0, 2*b).Add(time.Duration(i) * 5 * time.Minute)
				ev.Route = "/" + strings.ReplaceAll(command, "/", "_")
				flagged = len(e.Observe(&ev, false)) > 0 || flagged
			}
			if b >= cleanBlocks {
				c.count(flagged, u.foreign[b-cleanBlocks])
			}
		}
	}
	return c.into(out)
}

type confusion struct{ hits, foreign, alarms, own int }

func (c *confusion) count(flagged, foreign bool) {
	switch {
	case foreign:
		c.foreign++
		if flagged {
			c.hits++
		}
	default:
		c.own++
		if flagged {
			c.alarms++
		}
	}
}

func (c *confusion) into(m Masquerades) Masquerades {
	m.Found = float64(c.hits) / float64(max(c.foreign, 1))
	m.False = float64(c.alarms) / float64(max(c.own, 1))
	return m
}

// masqueradeDirichlet is the Bayes factor per command of the user's own Dirichlet
// posterior, with the population as its prior, against the population's: naive Bayes
// with updating (Maxion & Townsend 2002) in the form of DESIGN's proposal. A
// block that is not flagged teaches.
func masqueradeDirichlet(users []typist) []Masquerades {
	var out []Masquerades
	for _, limit := range []float64{-0.4, -0.6, -0.8, -1, -1.2, -1.5, -2} {
		var c confusion
		for i, u := range users {
			others, total := population(users, i)
			own, n := map[string]float64{}, 0.0
			teach := func(block []string) {
				for _, w := range block {
					own[w]++
					n++
				}
			}
			for _, block := range u.blocks[:cleanBlocks] {
				teach(block)
			}
			for b, block := range u.blocks[cleanBlocks:] {
				x := foreignness(block, own, n, others, total)
				flagged := x > -limit
				c.count(flagged, u.foreign[b])
				if !flagged {
					teach(block)
				}
			}
		}
		out = append(out, c.into(Masquerades{Name: fmt.Sprintf("Dirichlet, at %.1f nats a command", -limit)}))
	}
	slices.SortStableFunc(out, func(a, b Masquerades) int { return cmp.Compare(a.False, b.False) })
	return out
}

func foreignness(block []string, own map[string]float64, n float64, others map[string]float64, total float64) float64 {
	const strength, vocabulary = 20.0, 900.0
	sum := 0.0
	for _, w := range block {
		base := (others[w] + 0.1) / (total + 0.1*vocabulary)
		sum += math.Log(base / ((own[w] + strength*base) / (n + strength)))
	}
	return sum / float64(len(block))
}

func population(users []typist, but int) (counts map[string]float64, total float64) {
	counts = map[string]float64{}
	for i, u := range users {
		if i == but {
			continue
		}
		for _, block := range u.blocks[:cleanBlocks] {
			for _, w := range block {
				counts[w]++
				total++
			}
		}
	}
	return counts, total
}
