package edge

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
)

// Key is what an edge knows about one API key. It is immutable and safe for
// concurrent use: a change of the key makes a new Key.
type Key struct {
	// The first cache line is what a decision reads, the second what an event and
	// the identity headers do. There is no third: among many keys each line is a
	// wait for memory, which is as long as a hash.
	hash    apikey.Hash
	scopes  *grant
	expires int64  // unix nanoseconds, 0 is never
	seq     uint64 // stream sequence of the change that made it
	idLen   uint32
	state   state

	text  string // id and name
	orgID string
	env   string
	cidrs *[]netip.Prefix // nil allows every address
}

type state uint8

const (
	stateActive state = iota
	stateSuspended
	stateRevoked
	// stateUnreadable marks a key whose last record could not be read: it is
	// refused until a readable one comes.
	stateUnreadable
	// stateGone marks a hash that no key has any more, or that two keys claim.
	stateGone
)

// grant is a set of scopes, shared by all keys that hold the same.
type grant struct {
	set  apikey.Scopes
	list []string
	text string // blank-delimited
}

// ID is the key's id, "key_…".
func (k *Key) ID() string { return k.text[:k.idLen] }

// OrgID is the organization that the key belongs to.
func (k *Key) OrgID() string { return k.orgID }

// Name is the name that its owner gave the key.
func (k *Key) Name() string { return k.text[k.idLen:] }

// Environment is "live", "test" or what the key was created for.
func (k *Key) Environment() string { return k.env }

// Scopes are the scopes that the key holds; the caller must not change them.
func (k *Key) Scopes() []string { return k.scopes.list }

// ScopeText is the blank-delimited list of the scopes that the key holds.
func (k *Key) ScopeText() string { return k.scopes.text }

// Allows reports whether the key holds scope, by name, as "resource:*" or as
// "full_access". It says nothing of the key's status or expiry.
func (k *Key) Allows(scope string) bool { return k.scopes.set.Covers(scope) }

// FullAccess reports whether the key holds "full_access".
func (k *Key) FullAccess() bool { return k.scopes.set.Full() }

// ExpiresAt is when the key stops working; the zero time is never.
func (k *Key) ExpiresAt() time.Time {
	if k.expires == 0 {
		return time.Time{}
	}
	return time.Unix(0, k.expires).UTC()
}

// Active reports whether the key is neither suspended, revoked nor expired at now.
func (k *Key) Active(now time.Time) bool {
	return k.state == stateActive && (k.expires == 0 || now.UnixNano() < k.expires)
}

// Sequence is the sequence in the KEYS stream of the change that made this Key.
func (k *Key) Sequence() uint64 { return k.seq }

func (k *Key) admits(ip netip.Addr) bool {
	return k.cidrs == nil || contains(*k.cidrs, ip)
}

// Keyset holds every key in memory, found by the hash of its secret.
//
// Look-ups take no lock and allocate nothing: they read an open-addressing table,
// which one writer at a time changes in place and replaces when it grows. A change
// is visible to every look-up that begins after [Keyset.Apply] has returned.
//
// What a Keyset holds only moves forward: a change with an older stream
// sequence than the one known for its key is ignored, and a key once seen
// revoked stays revoked whatever comes later, so that no order of watch, refresh
// and redelivery brings a key back.
type Keyset struct {
	table atomic.Pointer[table]

	mu     sync.Mutex // guards what follows, and writes to the table
	byID   map[string]*Key
	used   int // slots of the table in use
	grants map[string]*grant
	words  map[string]string // organizations and environments, each held once
	slab   *slab             // of the first load, nil after it

	feed feed
}

// table is a power of two of slots, at most three quarters of them in use, so
// that every probe ends at an empty one.
type table struct {
	mask  uint64
	slots []slot
}

// slot is one place of a table. Once it has a key it keeps its tag, the beginning
// of the hash, by which a look-up passes other keys without touching them.
type slot struct {
	tag atomic.Uint64 // set before key
	key atomic.Pointer[Key]
}

func tagOf(hash *apikey.Hash) uint64 { return binary.LittleEndian.Uint64(hash[:8]) }

// NewKeyset returns an empty set. Fill it with [Keyset.Watch].
func NewKeyset() *Keyset {
	s := &Keyset{
		byID:   map[string]*Key{},
		grants: map[string]*grant{},
		words:  map[string]string{},
	}
	s.table.Store(newTable(64))
	s.feed.init()
	return s
}

func newTable(slots int) *table {
	return &table{mask: uint64(slots - 1), slots: make([]slot, slots)}
}

// place finds the slot of a hash, or the empty one where it belongs.
func (t *table) place(hash *apikey.Hash) (*slot, *Key) {
	tag := tagOf(hash)
	for i := tag & t.mask; ; i = (i + 1) & t.mask {
		s := &t.slots[i]
		k := s.key.Load()
		if k == nil || s.tag.Load() == tag && sameHash(&k.hash, hash) {
			return s, k
		}
	}
}

func (s *slot) set(k *Key) {
	s.tag.Store(tagOf(&k.hash))
	s.key.Store(k)
}

// Lookup finds the key whose secret has this hash, nil if there is none. The
// key may be revoked, suspended or expired: [Edge.Decide] judges it.
func (s *Keyset) Lookup(hash apikey.Hash) *Key {
	_, k := s.table.Load().place(&hash)
	if k == nil || k.state == stateGone {
		return nil
	}
	return k
}

// sameHash compares in constant time, as subtle.ConstantTimeCompare does, in words.
func sameHash(a, b *apikey.Hash) bool {
	var diff uint64
	for i := 0; i < len(a); i += 8 {
		diff |= binary.LittleEndian.Uint64(a[i:i+8]) ^ binary.LittleEndian.Uint64(b[i:i+8])
	}
	return diff == 0
}

// ByID finds a key by its id, nil if there is none.
func (s *Keyset) ByID(id string) *Key {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byID[id]
}

// Len is the number of keys known, whatever their status.
func (s *Keyset) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.byID)
}

// Apply takes a record into the set; seq is the stream sequence of the change
// that made it. It reports whether the record was news; an older one than the
// set has seen is not, and changes nothing.
func (s *Keyset) Apply(rec *key.Record, seq uint64) (bool, error) {
	hash, err := apikey.ParseHash(rec.Hash)
	if err != nil {
		return false, err
	}
	if rec.ID == "" {
		return false, errors.New("key record has no id")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.put(s.compact(rec, hash, seq)), nil
}

// quarantine refuses a key whose record at seq could not be read.
func (s *Keyset) quarantine(id string, seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cur := s.byID[id]; cur != nil && cur.seq < seq {
		k := *cur
		k.seq, k.state = seq, max(k.state, stateUnreadable)
		if cur.state == stateRevoked {
			k.state = stateRevoked
		}
		s.byID[id] = &k
		s.insert(&k)
	}
}

// compact makes a Key that holds on to none of the record's memory.
func (s *Keyset) compact(rec *key.Record, hash apikey.Hash, seq uint64) *Key {
	k := s.slab.key()
	*k = Key{
		hash: hash, seq: seq,
		text: s.slab.text(rec.ID, rec.Name), idLen: uint32(len(rec.ID)),
		orgID: s.word(rec.OrgID), env: s.word(rec.Environment),
		scopes: s.grant(rec.Scopes),
	}
	if rec.ExpiresAt != nil {
		k.expires = rec.ExpiresAt.UnixNano()
	}
	if len(rec.AllowedCIDRs) > 0 {
		cidrs := make([]netip.Prefix, len(rec.AllowedCIDRs))
		for i, p := range rec.AllowedCIDRs {
			cidrs[i] = foldPrefix(p)
		}
		k.cidrs = &cidrs
	}
	switch rec.Status {
	case key.Active:
		k.state = stateActive
	case key.Revoked:
		k.state = stateRevoked
	default: // suspended, or a status of a later version: refused
		k.state = stateSuspended
	}
	return k
}

// foldPrefix reads an IPv4-mapped prefix as the IPv4 prefix that it means.
func foldPrefix(p netip.Prefix) netip.Prefix {
	if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p.Masked()
}

// slab is the memory of the keys of a first load. Many in one piece are cheaper to
// allocate and, ever after, to look through for the garbage collector. A piece is
// held as long as one key of it is, so what changes later is allocated alone, and
// the most that can be wasted is what the first load took. A nil slab allocates alone.
type slab struct {
	keys  []Key
	bytes []byte
}

const (
	slabKeys  = 1024
	slabBytes = 64 << 10
)

func (s *slab) key() *Key {
	if s == nil {
		return new(Key)
	}
	if len(s.keys) == 0 {
		s.keys = make([]Key, slabKeys)
	}
	k := &s.keys[0]
	s.keys = s.keys[1:]
	return k
}

// text is a and b in one.
func (s *slab) text(a, b string) string {
	n := len(a) + len(b)
	if s == nil || n == 0 || n > slabBytes/64 {
		return a + b
	}
	if n > len(s.bytes) {
		s.bytes = make([]byte, slabBytes)
	}
	text := s.bytes[:n]
	s.bytes = s.bytes[n:]
	copy(text[copy(text, a):], b)
	return unsafe.String(&text[0], n)
}

func (s *Keyset) word(w string) string {
	if known, ok := s.words[w]; ok {
		return known
	}
	w = strings.Clone(w)
	s.words[w] = w
	return w
}

func (s *Keyset) grant(scopes []string) *grant {
	var buf [256]byte
	name := buf[:0]
	for _, sc := range scopes {
		// With its length, since a scope that nobody checked may hold any separator.
		name = append(binary.AppendUvarint(name, uint64(len(sc))), sc...)
	}
	if g, ok := s.grants[string(name)]; ok {
		return g
	}
	// A scope that this version cannot read grants nothing; the others still do.
	var list []string
	for _, sc := range scopes {
		if apikey.CheckScope(sc) == nil {
			list = append(list, strings.Clone(sc))
		}
	}
	set, err := apikey.CompileScopes(list)
	if err != nil {
		list, set = nil, apikey.Scopes{}
	}
	g := &grant{set: set, list: list, text: strings.Join(list, " ")}
	s.grants[string(name)] = g
	return g
}

// put makes k the state of its key unless a later change is known.
func (s *Keyset) put(k *Key) bool {
	id := k.ID()
	cur := s.byID[id]
	if cur != nil {
		if k.seq <= cur.seq {
			// A revocation counts even when it comes late: no later state can undo it.
			if k.state != stateRevoked || cur.state == stateRevoked {
				return false
			}
			late := *cur
			late.state = stateRevoked
			k = &late
		}
		if cur.state == stateRevoked {
			k.state = stateRevoked
		}
		if cur.hash != k.hash {
			gone := *cur
			gone.state = stateGone
			s.insert(&gone)
		}
	}
	if holder := s.Lookup(k.hash); holder != nil && holder.ID() != id {
		// Two keys claim one secret. Nobody can say whose request it would be, so
		// neither works; the API cannot make such a pair.
		k.state = stateGone
	}
	s.byID[id] = k
	s.insert(k)
	return true
}

// insert puts k into the slot of its hash.
func (s *Keyset) insert(k *Key) {
	slot, cur := s.table.Load().place(&k.hash)
	if cur == nil {
		s.used++
		if s.reserve(s.used) {
			slot, _ = s.table.Load().place(&k.hash)
		}
	}
	slot.set(k)
}

// reserve makes room for n keys in the table, and reports whether it had to.
func (s *Keyset) reserve(n int) bool {
	old := s.table.Load()
	size := len(old.slots)
	for 4*n > 3*size {
		size *= 2
	}
	if size == len(old.slots) {
		return false
	}
	t := newTable(size)
	for i := range old.slots {
		if k := old.slots[i].key.Load(); k != nil {
			slot, _ := t.place(&k.hash)
			slot.set(k)
		}
	}
	s.table.Store(t)
	return true
}

// expect prepares an empty set for a first load of as many keys.
func (s *Keyset) expect(keys uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := int(min(keys, maxExpected))
	if len(s.byID) == 0 && n > slabKeys {
		s.reserve(n)
		s.byID = make(map[string]*Key, n)
		s.slab = new(slab)
	}
}

// settle ends what [Keyset.expect] began.
func (s *Keyset) settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slab = nil
}

// maxExpected bounds what a stream's word for its size can make an edge allocate.
const maxExpected = 1 << 24
