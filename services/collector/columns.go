package collector

import (
	"slices"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/collector/rows"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// takeColumns takes a message as a whole, column by column. It leaves alone, and
// says so, where there is something to refuse, to reroute or to put into two months.
func (w *worker) takeColumns(m *bus.Message, at *rows.Place) bool {
	c, ok := m.Columns(&w.decoder)
	if !ok {
		return false
	}
	for _, key := range c.KeyID {
		if usage.Partition(key, w.p.Count) != w.p.Number {
			return false
		}
	}
	first := slices.Min(c.Time)
	if _, _, end := monthAt(first); slices.Max(c.Time) >= end {
		return false
	}
	w.hash(c)
	b := &w.batch
	b.events += c.Rows
	var block *rows.Block
	add := func(from, to int) {
		if from == to {
			return
		}
		if block == nil {
			block = b.block(first)
			block.Enter(c)
		}
		block.AddColumns(c, from, to, at)
		b.rows += to - from
	}
	from := 0
	for i, h := range w.hashes {
		if w.seen.testAndAddHash(h, c.Time[i]) {
			add(from, i)
			from = i + 1
			b.suspects = append(b.suspects, suspectAt(c, i, at))
		}
	}
	add(from, c.Rows)
	return true
}

// hash computes those of all events first: then the memory accesses of the filter
// do not wait for each other.
func (w *worker) hash(c *usage.Columns) {
	w.hashes = w.hashes[:0]
	for i, ns := range c.Time {
		w.hashes = append(w.hashes, w.seen.hash(c.Key(i), c.ID(i), ns))
	}
}

func suspectAt(c *usage.Columns, i int, at *rows.Place) suspect {
	s := suspect{at: *at}
	s.at.Index = uint32(i)
	_ = c.Event(i, &s.ev) // it is valid
	return s
}
