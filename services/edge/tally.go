package edge

import "sync/atomic"

// counters are the events of this edge's life that a killed process must leave
// behind: those it took, and those that it wrote down or counted as dropped. What
// is missing between them was lost with the process.
type counters struct {
	taken   atomic.Uint64
	settled atomic.Uint64
}

// tally must not be touched after unmap, and unmap be called once: the address
// may belong to another by then.
type tally struct {
	*counters
	unmap func() error
}

func newTally() *tally {
	return &tally{counters: &counters{}, unmap: func() error { return nil }}
}

// lost is how many events the process before this one took along, and begins a
// new count.
func (t *tally) lost() uint64 {
	taken, settled := t.taken.Load(), t.settled.Load()
	t.taken.Store(0)
	t.settled.Store(0)
	if settled > taken {
		return 0
	}
	return taken - settled
}
