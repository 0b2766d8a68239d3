package anomaly

const (
	prefixSlots  = 12
	coarseSlots  = 8
	opSlots      = 10
	countrySlots = 8
	routeSlots   = 20
	areaSlots    = 12
	recentEvents = 16
	pastEpisodes = 2
)

// state is the part of a baseline that has a fixed size; it is encoded as it
// stands (encoding/binary), so every field is of a fixed-size type and exported.
type state struct {
	// First, Newest and Previous are Unix nanoseconds: the first event's time, the
	// newest, and that of the event before the one in hand. Leap is what Newest
	// was before it last jumped by more than a day.
	First, Newest, Previous, Leap int64
	Events                        uint64

	// Recent are hashes of the ids and times of the latest events.
	Recent   [recentEvents]uint32
	RecentAt uint32

	// What every event touches comes first, so that it lies in few cache lines.
	volumeState
	dormantState
	routeState
	networkState
	volumeProfile
	denyState

	// Past are the latest episodes, for verdicts.
	Past   [pastEpisodes]pastEpisode
	PastAt uint32
	// Muted holds, per trigger, until when (Unix seconds) a verdict quiets it.
	Muted [triggerCount]uint32
	// Weak is each trigger's latest score worth remembering, and when it was (Unix seconds).
	Weak   [triggerCount]float32
	WeakAt [triggerCount]uint32

	// What later versions brought comes last, so that an older state is a beginning of this one.
	volumeLimits
	volumeSurge
}

type pastEpisode struct {
	ID       uint64
	Start    int64
	Triggers uint32
}

// slot is one remembered value with its decayed weight and the day it was last seen.
type slot struct {
	Key    uint64
	Weight float32
	Day    uint32
}

// novelty counts, with a memory of noveltyMemory trials, how often a trial
// brought a value that the key had never shown: the Good-Turing estimate of what
// is still unseen, in a form that needs no list of what was seen.
type novelty struct {
	Trials float32
	News   float32
}

const noveltyMemory = 512

func (n *novelty) trial(isNew bool) {
	n.fade(1.0/noveltyMemory, 1.0/noveltyMemory)
	n.Trials++
	if isNew && n.Trials > 1 {
		n.News++
	}
}

// fade forgets a part of the trials and of the news.
func (n *novelty) fade(trials, news float32) {
	n.Trials -= n.Trials * trials
	n.News -= n.News * news
}

// rate is the probability that the next trial brings news: the missing mass with
// the population's pseudo-count theta of news per trial (Good 1953; the Pitman-Yor
// predictive of Sanna Passino & Heard 2019 with its discount folded into News).
func (n *novelty) rate(theta float64) float64 {
	return (theta + float64(n.News)) / (float64(n.Trials) + 1)
}

// touch adds weight to a value and reports whether it was known. A full set
// forgets its lightest value, the one longest unseen among equals.
func touch(set []slot, key uint64, day uint32) (known bool) {
	for i := range set {
		if set[i].Key == key && set[i].Weight > 0 {
			set[i].Weight++
			set[i].Day = day
			return true
		}
	}
	put(set, slot{Key: key, Weight: 1, Day: day})
	return false
}

func put(set []slot, s slot) {
	at := 0
	for i := range set {
		if set[i].Weight == 0 {
			at = i
			break
		}
		if set[i].worth(s.Day) < set[at].worth(s.Day) {
			at = i
		}
	}
	set[at] = s
}

// worth orders values for forgetting: weight halved with every 15 days unseen.
func (s *slot) worth(today uint32) float32 {
	age := float32(0)
	if today > s.Day {
		age = float32(today - s.Day)
	}
	return s.Weight / (1 + age*age/225)
}

func has(set []slot, key uint64) bool {
	for i := range set {
		if set[i].Key == key && set[i].Weight > 0 {
			return true
		}
	}
	return false
}

func count(set []slot) int {
	n := 0
	for i := range set {
		if set[i].Weight > 0 {
			n++
		}
	}
	return n
}

func drop(set []slot, key uint64) {
	for i := range set {
		if set[i].Key == key {
			set[i] = slot{}
		}
	}
}
