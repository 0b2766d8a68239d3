package trial

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
)

// Speed is how fast one engine takes decoded events.
type Speed struct {
	Keys            int     `json:"keys"`
	EventsPerSecond float64 `json:"events_per_second"`
	// HeapBytes is the growth of the heap per key, EncodedBytes the size of a baseline.
	HeapBytes    float64 `json:"heap_bytes_per_key"`
	EncodedBytes float64 `json:"encoded_bytes_per_key"`
	// Allocations is per event, once all keys are known.
	Allocations float64 `json:"allocations_per_event"`
	Alerts      int     `json:"alerts"`
}

// speedRate is the requests a key and hour.
const speedRate = 12.0

// speedBatch is about what `backtest` reads, or a busy edge sends, at once.
const speedBatch = 1 << 10

// speedHabits is the number of different months that the keys have behind them.
const speedHabits = 64

// MeasureSpeed feeds events of the given number of keys, in random order of keys,
// through one engine on one core. Every key has a month behind it, so that all of
// its triggers are awake. Making the events is not counted; the rate is the median
// over batches of 1,024, so that a busy neighbour does not decide it.
func MeasureSpeed(keys, events int) Speed {
	r := rand.New(rand.NewPCG(1, 2))
	ids := make([]string, keys)
	for i := range ids {
		ids[i] = fmt.Sprintf("key_%08x", i)
	}
	routes := []string{"/v1/readings", "/v1/devices/{id}", "/v1/orders", "/v1/orders/{id}"}
	e := anomaly.New(anomaly.Options{})
	at := time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)
	out := Speed{Keys: keys}
	serial := 0
	event := func(k int, id string, among int) usage.Event {
		serial++
		at = at.Add(time.Duration(36e11 / (speedRate * float64(among))))
		return usage.Event{
			ID: fmt.Sprintf("e%d", serial), Time: at, OrgID: "org", KeyID: id,
			SourceIP: netip.AddrFrom4([4]byte{84, 0, byte(k % speedHabits), byte(k)}),
			Method:   "POST", Route: routes[min(r.IntN(8), 3)], Decision: usage.Allow,
		}
	}
	for range int(speedRate) * 24 * 30 {
		for k := range speedHabits {
			ev := event(k, fmt.Sprintf("habit_%d", k), speedHabits)
			e.Observe(&ev, false)
		}
	}
	before := heap()
	for i, id := range ids {
		e.Inherit(id, fmt.Sprintf("habit_%d", i%speedHabits))
	}
	out.HeapBytes = (heap() - before) / float64(keys)
	batch := make([]usage.Event, speedBatch)
	fill := func() {
		for i := range batch {
			k := r.IntN(keys)
			batch[i] = event(k, ids[k], keys)
		}
	}
	raised := func(alert.Alert) { out.Alerts++ }
	var rates []float64
	var allocated uint64
	var a, b runtime.MemStats
	done := 0
	for ; done < events; done += len(batch) {
		fill()
		runtime.ReadMemStats(&a)
		began := time.Now()
		e.ObserveAll(batch, false, raised)
		rates = append(rates, float64(len(batch))/time.Since(began).Seconds())
		runtime.ReadMemStats(&b)
		allocated += b.Mallocs - a.Mallocs
	}
	out.EventsPerSecond = *quantile(rates, 0.5)
	out.Allocations = float64(allocated) / float64(done)
	for i := range 1000 {
		out.EncodedBytes += float64(len(e.Encode(ids[i*keys/1000]))) / 1000
	}
	return out
}

func heap() float64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}
