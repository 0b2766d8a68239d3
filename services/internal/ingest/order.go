package ingest

import "github.com/latchkey-dev/latchkey/schemas/usage"

// orderWindow is how many events an Orderer holds back, about 30 MB of them.
const orderWindow = 100_000

// Orderer puts events into the order of time as far as a bounded memory allows:
// files of CloudTrail and of several hosts overlap, and a baseline learns less
// from events that come late. Events of equal time keep their order.
type Orderer struct {
	next func(*usage.Event) error
	heap []held // a binary heap, the earliest first
	free []*usage.Event
	seq  uint64
}

// held is an event that waits for earlier ones.
type held struct {
	at  int64 // Unix nanoseconds
	seq uint64
	ev  *usage.Event
}

func (a held) before(b held) bool { return a.at < b.at || a.at == b.at && a.seq < b.seq }

// NewOrderer hands events on to next, which must not keep them.
func NewOrderer(next func(*usage.Event) error) *Orderer { return &Orderer{next: next} }

// Add takes an event and keeps a copy of it.
func (o *Orderer) Add(ev *usage.Event) error {
	var own *usage.Event
	if n := len(o.free); n > 0 {
		own, o.free = o.free[n-1], o.free[:n-1]
	} else {
		own = new(usage.Event)
	}
	*own = *ev
	o.seq++
	o.push(held{ev.Time.UnixNano(), o.seq, own})
	if len(o.heap) <= orderWindow {
		return nil
	}
	return o.emit()
}

// Flush hands on what is still held.
func (o *Orderer) Flush() error {
	for len(o.heap) > 0 {
		if err := o.emit(); err != nil {
			return err
		}
	}
	return nil
}

func (o *Orderer) emit() error {
	first := o.pop()
	o.free = append(o.free, first.ev)
	return o.next(first.ev)
}

func (o *Orderer) push(h held) {
	o.heap = append(o.heap, h)
	i := len(o.heap) - 1
	for i > 0 {
		parent := (i - 1) / 2
		if !h.before(o.heap[parent]) {
			break
		}
		o.heap[i], i = o.heap[parent], parent
	}
	o.heap[i] = h
}

func (o *Orderer) pop() held {
	first := o.heap[0]
	n := len(o.heap) - 1
	last := o.heap[n]
	o.heap = o.heap[:n]
	if n == 0 {
		return first
	}
	i := 0
	for {
		child := 2*i + 1
		if child >= n {
			break
		}
		if child+1 < n && o.heap[child+1].before(o.heap[child]) {
			child++
		}
		if !o.heap[child].before(last) {
			break
		}
		o.heap[i], i = o.heap[child], child
	}
	o.heap[i] = last
	return first
}
