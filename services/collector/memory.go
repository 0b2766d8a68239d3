package collector

import (
	"os"
	"runtime/debug"
)

// memoryLimit is what the Go runtime of a collector may hold, in bytes. What it needs
// is about 100 MB: 5 MB a partition to know what is stored, and the blocks in hand.
const memoryLimit = 224 << 20

// LimitMemory is for a process that is nothing but a collector: it has the garbage
// collector work before a burst of blocks grows the heap, so that the process stays
// below 300 MB. GOMEMLIMIT goes before it.
func LimitMemory() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
}
