package keys

import (
	"crypto/rand"
	"encoding/binary"
	"sync"
	"time"
)

// ids makes identifiers whose order is that of their making: ULIDs
// (github.com/ulid/spec), 48 bits of milliseconds and 80 random bits that count
// up within a millisecond, with the kind in front: "key_01J…".
type ids struct {
	mu   sync.Mutex
	last uint64
	high uint16
	low  uint64
}

const crockford = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

func (g *ids) next(kind string, now time.Time) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if ms := uint64(max(now.UnixMilli(), 0)); ms > g.last {
		var b [10]byte
		rand.Read(b[:])
		// Half of the space stays free above, to count into.
		g.last, g.high, g.low = ms, binary.BigEndian.Uint16(b[:2])>>1, binary.BigEndian.Uint64(b[2:])
	} else if g.low++; g.low == 0 {
		g.high++
	}
	// 26 digits of 5 bits: the first holds the top 3 bits of 128.
	hi := g.last<<16 | uint64(g.high)
	var out [26]byte
	lo := g.low
	for i := len(out) - 1; i >= 0; i-- {
		out[i] = crockford[lo&31]
		lo = lo>>5 | hi<<59
		hi >>= 5
	}
	return kind + "_" + string(out[:])
}
