package anomaly

import "hash/maphash"

// table finds baselines by key id: open addressing with linear probing. A map of
// Go does the same; this one can be asked for many keys side by side (see
// [Engine.ObserveAll]), which is where the time goes with a million keys.
type table struct {
	seed  maphash.Seed // decides where a key lies, never what is found
	slots []tableSlot  // a power of two of them, at most three quarters taken
	count int
}

type tableSlot struct {
	hash    uint64
	profile *profile // nil if the slot is free
}

func newTable() table {
	return table{seed: maphash.MakeSeed(), slots: make([]tableSlot, 16)}
}

func (t *table) hash(keyID string) uint64 { return maphash.String(t.seed, keyID) }

// get is a key's baseline, nil if there is none.
func (t *table) get(keyID string) *profile {
	return t.slots[t.find(keyID, t.hash(keyID))].profile
}

// home is where the search for a hash begins.
func (t *table) home(hash uint64) *tableSlot { return &t.slots[hash&uint64(len(t.slots)-1)] }

// candidate is most probably the baseline of the key with a hash, and costs no look
// at the baseline itself.
func (t *table) candidate(hash uint64) *profile {
	mask := uint64(len(t.slots) - 1)
	for i := hash & mask; ; i = (i + 1) & mask {
		if s := &t.slots[i]; s.hash == hash || s.profile == nil {
			return s.profile
		}
	}
}

// find is the slot that holds a key, or the free one where it belongs.
func (t *table) find(keyID string, hash uint64) uint64 {
	mask := uint64(len(t.slots) - 1)
	for i := hash & mask; ; i = (i + 1) & mask {
		if s := &t.slots[i]; s.profile == nil || s.hash == hash && s.profile.keyID == keyID {
			return i
		}
	}
}

// put sets a key's baseline.
func (t *table) put(keyID string, p *profile) {
	p.keyID = keyID
	if 4*(t.count+1) > 3*len(t.slots) {
		t.grow()
	}
	h := t.hash(keyID)
	s := &t.slots[t.find(keyID, h)]
	if s.profile == nil {
		t.count++
	}
	*s = tableSlot{h, p}
}

func (t *table) grow() {
	old := t.slots
	t.slots = make([]tableSlot, 2*len(old))
	for _, s := range old {
		if s.profile != nil {
			t.slots[t.find(s.profile.keyID, s.hash)] = s
		}
	}
}

// remove forgets a key, and moves up what would not be found any more behind the
// gap (Knuth, TAOCP 3, 6.4, algorithm R).
func (t *table) remove(keyID string) {
	mask := uint64(len(t.slots) - 1)
	gap := t.find(keyID, t.hash(keyID))
	if t.slots[gap].profile == nil {
		return
	}
	t.count--
	for i := (gap + 1) & mask; t.slots[i].profile != nil; i = (i + 1) & mask {
		if home := t.slots[i].hash & mask; (i-home)&mask >= (i-gap)&mask {
			t.slots[gap] = t.slots[i]
			gap = i
		}
	}
	t.slots[gap] = tableSlot{}
}
