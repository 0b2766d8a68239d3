package trial

import (
	"bufio"
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
		if len(t.blocks) <= cleanBlocks {
			return nil, fmt.Errorf("read User%d: %d commands, want more than %d", u, len(lines), cleanBlocks*blockSize)
		}
		for b := range len(t.blocks) - cleanBlocks {
			at := b*25 + u - 1
			if at >= len(labels) {
				return nil, fmt.Errorf("read label.txt: %d values, want one for each of 25 users and for each block after the %dth", len(labels), cleanBlocks)
			}
			if labels[at] != "0" && labels[at] != "1" {
				return nil, fmt.Errorf("read label.txt: value %d is %.20q, want 0 or 1", at+1, labels[at])
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
	s := bufio.NewScanner(f)
	for s.Scan() {
		out = append(out, strings.Fields(s.Text())...)
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("read masquerade data %s: %w", filepath.Base(path), err)
	}
	return out, nil
}

// Masquerade runs the data through the engine (a command is a route, a block a
// day) at several budgets, and through the Dirichlet model at several thresholds.
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
// block that is not flagged teaches. The threshold comes from the clean blocks alone: it
// is what the given part of the second half of them exceeds, each judged by those before.
func masqueradeDirichlet(users []typist) []Masquerades {
	var clean []float64
	for i, u := range users {
		m := newShell(users, i)
		for b, block := range u.blocks[:cleanBlocks] {
			if b >= cleanBlocks/2 {
				clean = append(clean, m.foreignness(block))
			}
			m.teach(block)
		}
	}
	slices.Sort(clean)
	var out []Masquerades
	for _, part := range []float64{0.001, 0.002, 0.005, 0.01, 0.013, 0.02} {
		limit := clean[len(clean)-1-int(part*float64(len(clean)))]
		var c confusion
		for i, u := range users {
			m := newShell(users, i)
			for _, block := range u.blocks[:cleanBlocks] {
				m.teach(block)
			}
			for b, block := range u.blocks[cleanBlocks:] {
				flagged := m.foreignness(block) > limit
				c.count(flagged, u.foreign[b])
				if !flagged {
					m.teach(block)
				}
			}
		}
		out = append(out, c.into(Masquerades{Name: fmt.Sprintf("Dirichlet, threshold of %.1f %% of the clean blocks", 100*part)}))
	}
	return out
}

// shell is what is known of a user's commands and of all others'.
type shell struct {
	own, others map[string]float64
	n, total    float64
}

func newShell(users []typist, user int) *shell {
	m := &shell{own: map[string]float64{}}
	m.others, m.total = population(users, user)
	return m
}

func (m *shell) teach(block []string) {
	for _, w := range block {
		m.own[w]++
		m.n++
	}
}

// foreignness is the mean log Bayes factor of a block's commands against the user.
func (m *shell) foreignness(block []string) float64 {
	const strength, vocabulary = 20.0, 900.0
	sum := 0.0
	for _, w := range block {
		base := (m.others[w] + 0.1) / (m.total + 0.1*vocabulary)
		sum += math.Log(base / ((m.own[w] + strength*base) / (m.n + strength)))
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
