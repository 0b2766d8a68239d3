package edge

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// DenialLimit bounds the events about denied attempts, so that a guessing attack
// is seen and cannot fill a disk. Each source (an IPv4 address, an IPv6 /64) has
// a bucket of Burst events that refills at PerSecond; all sources together have
// one of Total events a second.
type DenialLimit struct {
	PerSecond float64 // 5 by default
	Burst     float64 // 200 by default
	Total     float64 // 1000 by default, also the burst of all together
}

// limiterSlots is the number of source buckets. Sources whose hashes collide
// share one, so memory is fixed however many addresses an attacker has.
const limiterSlots = 4096

// limiter is only asked about denied attempts, so its locks are not on the way
// of a request that is allowed.
type limiter struct {
	limit      DenialLimit
	seed       maphash.Seed
	slots      [limiterSlots]bucket
	total      bucket
	suppressed atomic.Uint64
}

type bucket struct {
	mu    sync.Mutex
	spent float64 // events taken and not yet refilled
	last  int64   // unix nanoseconds
}

func newLimiter(l DenialLimit) *limiter {
	if l.PerSecond <= 0 {
		l.PerSecond = 5
	}
	if l.Burst <= 0 {
		l.Burst = 200
	}
	if l.Total <= 0 {
		l.Total = 1000
	}
	return &limiter{limit: l, seed: maphash.MakeSeed()}
}

// allow takes one event of the source, if there is one left.
func (l *limiter) allow(source netip.Addr, now time.Time) bool {
	h := l.hash(source)
	ns := now.UnixNano()
	if l.slots[h%limiterSlots].take(ns, l.limit.PerSecond, l.limit.Burst) && l.total.take(ns, l.limit.Total, l.limit.Total) {
		return true
	}
	l.suppressed.Add(1)
	return false
}

func (l *limiter) hash(source netip.Addr) uint64 {
	b := source.As16()
	if !source.Is4() && !source.Is4In6() {
		clear(b[8:]) // one subscriber has a /64
	}
	return maphash.Bytes(l.seed, b[:])
}

func (b *bucket) take(now int64, perSecond, burst float64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if elapsed := now - b.last; elapsed > 0 {
		b.spent = max(0, b.spent-float64(elapsed)/1e9*perSecond)
		b.last = now
	}
	if b.spent+1 > burst {
		return false
	}
	b.spent++
	return true
}
