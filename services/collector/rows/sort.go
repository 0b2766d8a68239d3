package rows

import (
	"bytes"
	"cmp"
	"slices"
	"sync"

	"github.com/ClickHouse/ch-go/proto"
)

// Sort puts the rows into the order of the table: by organization, key and time.
// ClickHouse looks whether a block is sorted and is spared a quarter of an insert's
// work: it compares texts, where here each text is compared once and then counted.
func (r *Block) Sort() {
	if r.Len() == 0 {
		return
	}
	s := sorters.Get().(*sorter)
	defer sorters.Put(s)
	s.arrange(r)
	s.apply(r)
}

var sorters = sync.Pool{New: func() any { return new(sorter) }}

// sorter is the memory of one sort.
type sorter struct {
	order, spare, ranks, counts []uint32

	texts []proto.Position
	times []proto.DateTime64
	ips   []proto.IPv6
	bools []bool
	u16   []uint16
	u32   []uint32
	u64   []uint64
}

// arrange makes s.order: the row that comes first, the row that comes second, …
func (s *sorter) arrange(r *Block) {
	n := r.Len()
	s.order, s.spare = resize(s.order, n), resize(s.spare, n)
	for i := range s.order {
		s.order[i] = uint32(i)
	}
	s.pass(&r.keyID)
	s.pass(&r.orgID)
	same := func(a, b uint32) bool {
		return r.keyID.keys[a] == r.keyID.keys[b] && r.orgID.keys[a] == r.orgID.keys[b]
	}
	byTime := func(a, b uint32) int { return cmp.Or(cmp.Compare(r.time.Data[a], r.time.Data[b]), cmp.Compare(a, b)) }
	for from := 0; from < n; {
		to := from + 1
		for to < n && same(s.order[from], s.order[to]) {
			to++
		}
		if run := s.order[from:to]; !slices.IsSortedFunc(run, byTime) { // events of a key mostly come in time order
			slices.SortFunc(run, byTime)
		}
		from = to
	}
}

// pass orders the rows by the texts of a column and leaves rows of the same text
// as they are: a counting sort over the ranks of the texts.
func (s *sorter) pass(d *dict) {
	words := d.index.Rows()
	s.ranks, s.counts = resize(s.ranks, words), resize(s.counts, words+1)
	for i := range words {
		s.counts[i] = uint32(i)
	}
	slices.SortFunc(s.counts[:words], func(a, b uint32) int {
		return bytes.Compare(d.index.RowBytes(int(a)), d.index.RowBytes(int(b)))
	})
	for rank, word := range s.counts[:words] {
		s.ranks[word] = uint32(rank)
	}
	clear(s.counts)
	for _, k := range d.keys {
		s.counts[s.ranks[k]+1]++
	}
	for i := range words {
		s.counts[i+1] += s.counts[i]
	}
	for _, row := range s.order {
		at := &s.counts[s.ranks[d.keys[row]]]
		s.spare[*at] = row
		*at++
	}
	s.order, s.spare = s.spare, s.order
}

// apply brings every column into s.order.
func (s *sorter) apply(r *Block) {
	permute(&r.id.Pos, &s.texts, s.order)
	permute(&r.time.Data, &s.times, s.order)
	permute(&r.ingestedAt.Data, &s.times, s.order)
	permute((*[]proto.IPv6)(&r.sourceIP), &s.ips, s.order)
	permute((*[]bool)(&r.history), &s.bools, s.order)
	for _, c := range []*proto.ColUInt16{&r.status, &r.partition} {
		permute((*[]uint16)(c), &s.u16, s.order)
	}
	for _, c := range []*proto.ColUInt32{&r.latencyUS, &r.index} {
		permute((*[]uint32)(c), &s.u32, s.order)
	}
	for _, c := range []*proto.ColUInt64{&r.requestBytes, &r.responseBytes, &r.sequence} {
		permute((*[]uint64)(c), &s.u64, s.order)
	}
	for _, d := range r.dicts() {
		if d.index.Rows() > 1 {
			permute(&d.keys, &s.u32, s.order)
		}
	}
}

// permute brings a column into order by way of the spare memory. It is copied back,
// since exchanging the two would give a small block the memory of a large one.
func permute[T any](column, spare *[]T, order []uint32) {
	*spare = resize(*spare, len(order))
	for i, from := range order {
		(*spare)[i] = (*column)[from]
	}
	copy(*column, *spare)
}

// resize is a slice of n elements, whatever they hold.
func resize[T any](s []T, n int) []T {
	if cap(s) < n {
		return make([]T, n)
	}
	return s[:n]
}
