package collector

import (
	"math"

	"github.com/cespare/xxhash/v2"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// seen remembers which events of a partition were stored, so that the usual
// event, which is new, needs no question to ClickHouse. It may take a new event
// for one that it knows (once in a billion), never the other way round, for
// events whose time is not before complete.
//
// It keeps 31 bits of a hash in tables with linear probing, each twice as large
// as the one before; when there are too many events the oldest table is dropped.
// The latest event time in it tells up to where something may be missing: as
// events come about in the order of their times, new ones are later than that.
type seen struct {
	tables []table // the newest is the last
	n      int
	// complete is the time from which on every stored event is known, in Unix
	// nanoseconds; the smallest number if all are.
	complete int64
	scratch  []byte
}

// table is an open hash table of marks; 0 is a free slot.
type table struct {
	slots []uint32
	n     int
	// latest is the greatest time of its events, in Unix nanoseconds.
	latest int64
}

const (
	minSlots = 1 << 14
	maxSlots = 1 << 19 // 2 MB
	// maxSeen is how many events of a partition are known at least: about 5 MB.
	maxSeen = 800_000
)

// mix spreads what SQL can compute too, see backfillSQL.
func mix(h uint64) uint64 {
	h *= 0x9E3779B97F4A7C15
	h ^= h >> 32
	h *= 0xD6E8FEB86659FD93
	return h ^ h>>32
}

func (s *seen) hash(key, id string, ns int64) uint64 {
	s.scratch = append(s.scratch[:0], key...)
	s.scratch = append(s.scratch, '/')
	s.scratch = append(s.scratch, id...)
	return mix(xxhash.Sum64(s.scratch) ^ uint64(ns))
}

// testAndAdd tells whether an event may be there already, and notes it.
func (s *seen) testAndAdd(ev *usage.Event) bool {
	ns := ev.Time.UnixNano()
	return s.testAndAddHash(s.hash(ev.KeyID, ev.ID, ns), ns)
}

func (s *seen) testAndAddHash(h uint64, ns int64) bool {
	known := !s.add(h, ns)
	return known || ns < s.complete
}

// add notes the hash of an event of a time, or says false if it was there.
func (s *seen) add(h uint64, ns int64) bool {
	for i := range s.tables {
		if t := &s.tables[i]; t.has(h) {
			t.latest = max(t.latest, ns)
			return false
		}
	}
	if last := len(s.tables) - 1; last < 0 || s.tables[last].full() {
		s.extend()
	}
	t := &s.tables[len(s.tables)-1]
	t.latest = max(t.latest, ns)
	t.add(h)
	s.n++
	return true
}

func (s *seen) extend() {
	size := minSlots
	if last := len(s.tables) - 1; last >= 0 {
		size = min(2*len(s.tables[last].slots), maxSlots)
	}
	for len(s.tables) > 0 && s.n-s.tables[0].n >= maxSeen {
		s.complete = max(s.complete, s.tables[0].latest+1)
		s.n -= s.tables[0].n
		s.tables = append(s.tables[:0], s.tables[1:]...)
	}
	s.tables = append(s.tables, table{slots: make([]uint32, size), latest: math.MinInt64})
}

func (t *table) full() bool { return t.n >= len(t.slots)/4*3 }

func (t *table) has(h uint64) bool {
	mark, mask := uint32(h>>32)|1, uint32(len(t.slots)-1)
	for i := uint32(h) & mask; t.slots[i] != 0; i = (i + 1) & mask {
		if t.slots[i] == mark {
			return true
		}
	}
	return false
}

func (t *table) add(h uint64) {
	mask := uint32(len(t.slots) - 1)
	i := uint32(h) & mask
	for t.slots[i] != 0 {
		i = (i + 1) & mask
	}
	t.slots[i] = uint32(h>>32) | 1
	t.n++
}
