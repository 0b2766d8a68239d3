package ingest

import (
	"container/heap"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// orderWindow is how many events an Orderer holds back, about 50 MB of them.
const orderWindow = 100_000

// Orderer puts events into the order of time as far as a bounded memory allows:
// files of CloudTrail and of several hosts overlap, and a baseline learns less
// from events that come late. Events of equal time keep their order.
type Orderer struct {
	next func(*usage.Event) error
	held byTime
	seq  uint64
}

// NewOrderer hands events on to next.
func NewOrderer(next func(*usage.Event) error) *Orderer { return &Orderer{next: next} }

// Add takes an event and keeps a copy of it.
func (o *Orderer) Add(ev *usage.Event) error {
	o.seq++
	heap.Push(&o.held, heldEvent{*ev, o.seq})
	if len(o.held) <= orderWindow {
		return nil
	}
	return o.pop()
}

// Flush hands on what is still held.
func (o *Orderer) Flush() error {
	for len(o.held) > 0 {
		if err := o.pop(); err != nil {
			return err
		}
	}
	return nil
}

func (o *Orderer) pop() error {
	first := heap.Pop(&o.held).(heldEvent)
	return o.next(&first.Event)
}

type heldEvent struct {
	usage.Event
	seq uint64
}

// byTime is a container/heap.
type byTime []heldEvent

func (h byTime) Len() int { return len(h) }
func (h byTime) Less(i, j int) bool {
	if c := h[i].Time.Compare(h[j].Time); c != 0 {
		return c < 0
	}
	return h[i].seq < h[j].seq
}
func (h byTime) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *byTime) Push(x any)   { *h = append(*h, x.(heldEvent)) }
func (h *byTime) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = heldEvent{}
	*h = old[:len(old)-1]
	return last
}
