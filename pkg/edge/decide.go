package edge

import (
	"encoding/binary"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
	"unsafe"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Unavailable is the reason of a denial that says nothing about the key: the
// keys are not loaded yet, or they are older than [Options.FailClosedAfter]. It
// is answered 503 and makes no usage event, because nobody did anything wrong.
const Unavailable = "unavailable"

// Unknown is the key_id and org_id of an event about a secret that belongs to no
// key. One name for all of them keeps the detector's state and the tables small
// however many keys somebody tries; the guesser is known by the source address.
const Unknown = "unknown"

// Need is what a request requires: every scope of it. The zero value requires
// nothing but a valid key.
type Need struct {
	scopes []string
	text   string
}

// Require makes a Need of scopes; empty ones and repetitions are left out. Make
// it once, not per request.
func Require(scopes ...string) Need {
	var n Need
	// A client may have written them, and as many as a header holds.
	seen := make(map[string]bool, len(scopes))
	for _, s := range scopes {
		if s != "" && !seen[s] {
			seen[s] = true
			n.scopes = append(n.scopes, s)
		}
	}
	n.text = readable(strings.Join(n.scopes, " "))
	return n
}

// And is the need for the scopes of both.
func (n Need) And(scopes ...string) Need {
	all := make([]string, 0, len(n.scopes)+len(scopes))
	return Require(append(append(all, n.scopes...), scopes...)...)
}

// Scopes are the scopes required; the caller must not change them.
func (n Need) Scopes() []string { return n.scopes }

// String is the blank-delimited list of the scopes required.
func (n Need) String() string { return n.text }

// Verdict is the edge's answer to one attempt.
type Verdict struct {
	// Key is the key that was shown, nil if it is unknown. It is set on most
	// denials too.
	Key *Key
	// Reason is empty if the request is allowed, [Unavailable], or one of the deny
	// reasons of package usage.
	Reason string
}

// Allowed reports whether the request may pass.
func (v Verdict) Allowed() bool { return v.Reason == "" }

// Options of an Edge; the zero value is good.
type Options struct {
	// Recorder takes the usage events; nil records none.
	Recorder Recorder
	// Hasher hashes the secrets as the keys service did; set it if there are peppers.
	Hasher apikey.Hasher
	// Header may name one more header that carries the key, beside Authorization
	// and X-API-Key.
	Header string
	// TrustedProxies are the peers whose X-Forwarded-For is believed; none by
	// default. See [ClientIP].
	TrustedProxies []netip.Prefix
	// Gateway names this edge in the events.
	Gateway string
	// Realm is that of WWW-Authenticate, "latchkey" by default.
	Realm string
	// FailClosedAfter refuses every request once the keys have not been proven
	// fresh for so long; 0 goes on with what is known, whatever its age.
	FailClosedAfter time.Duration
	// Denials limits how many denied attempts are recorded; see [DenialLimit].
	Denials DenialLimit
	// Clock is the time, time.Now by default.
	Clock func() time.Time
}

// Recorder takes usage events without ever waiting; *usage.Publisher is one.
type Recorder interface {
	// Enqueue copies the event and reports true, or counts it and reports false if
	// there is no room.
	Enqueue(e *usage.Event) bool
}

// Edge decides requests from memory.
type Edge struct {
	keys    *Keyset
	opts    Options
	denials *limiter
	header  string // Options.Header in canonical form
	plain   bool   // there are no peppers
}

// New makes an edge that decides by keys. [Keyset.Watch] must be running, or
// have run, for it to know any.
func New(keys *Keyset, opts Options) *Edge {
	if opts.Clock == nil {
		opts.Clock = time.Now
	}
	if opts.Realm == "" {
		opts.Realm = "latchkey"
	}
	const probe = "any text"
	return &Edge{
		keys: keys, opts: opts, denials: newLimiter(opts.Denials), header: http.CanonicalHeaderKey(opts.Header),
		plain: opts.Hasher.Len() == 1 && opts.Hasher.Sum(probe) == apikey.Sum(probe),
	}
}

// Decide judges a secret that came from source against what the request needs.
// It takes no lock and allocates nothing.
func (e *Edge) Decide(secret string, source netip.Addr, need Need) Verdict {
	return e.DecideAt(e.opts.Clock(), secret, source, need)
}

// DecideAt is [Edge.Decide] at a given time.
func (e *Edge) DecideAt(now time.Time, secret string, source netip.Addr, need Need) Verdict {
	if secret == "" {
		return Verdict{Reason: usage.DenyMissingKey}
	}
	// Mistyped and made-up keys go no further. The rest of the form needs no
	// check: a hash that is found was made from a key.
	if !apikey.HasChecksum(secret) {
		return Verdict{Reason: usage.DenyInvalidKey}
	}
	if e.opts.FailClosedAfter > 0 && e.Stale(now) > e.opts.FailClosedAfter {
		return Verdict{Reason: Unavailable}
	}
	k := e.find(secret)
	if k == nil {
		if e.keys.feed.synced.Load() == 0 {
			return Verdict{Reason: Unavailable}
		}
		return Verdict{Reason: usage.DenyInvalidKey}
	}
	return Verdict{Key: k, Reason: k.judge(now, source, need)}
}

func (e *Edge) find(secret string) *Key {
	if e.plain {
		return e.keys.Lookup(apikey.Sum(secret))
	}
	for i := range e.opts.Hasher.Len() {
		if k := e.keys.Lookup(e.opts.Hasher.At(i, secret)); k != nil {
			return k
		}
	}
	return nil
}

func (k *Key) judge(now time.Time, source netip.Addr, need Need) string {
	switch {
	case k.state != stateActive:
		return usage.DenyRevokedKey
	case k.expires != 0 && now.UnixNano() >= k.expires:
		return usage.DenyExpiredKey
	case !k.admits(source):
		return usage.DenyIPNotAllowed
	}
	for _, s := range need.scopes {
		if !k.scopes.set.Covers(s) {
			return usage.DenyInsufficientScope
		}
	}
	return ""
}

// Stale is how old the last proof is that the keys are complete. Before the
// first load it is the time since 1970.
func (e *Edge) Stale(now time.Time) time.Duration {
	return time.Duration(now.UnixNano() - e.keys.feed.synced.Load())
}

// Record sends the usage event of a verdict. What the verdict knows is filled in
// here: key, organization, decision and scope; the rest is the caller's. Denied
// attempts beyond [Options.Denials] are counted and not recorded. The event is
// copied and left as it was.
func (e *Edge) Record(v Verdict, need Need, ev *usage.Event) {
	if e.opts.Recorder == nil || v.Reason == Unavailable {
		return
	}
	if v.Reason != "" && !e.denials.allow(ev.SourceIP, ev.Time) {
		return
	}
	// The compiler cannot know that a Recorder keeps no pointer, and would put
	// every event on the heap.
	slot := events.Get().(*usage.Event)
	*slot = *ev
	slot.OrgID, slot.KeyID = Unknown, Unknown
	if v.Key != nil {
		slot.OrgID, slot.KeyID = v.Key.orgID, v.Key.ID()
	}
	slot.Decision, slot.DenyReason = usage.Allow, v.Reason
	if v.Reason != "" {
		slot.Decision = usage.Deny
	}
	slot.Scope = need.text
	slot.Gateway = e.opts.Gateway
	// These a client writes. An event that nobody could read would be a way to
	// stay unseen.
	slot.Method, slot.Route, slot.UserAgent = readable(slot.Method), readable(slot.Route), readable(slot.UserAgent)
	slot.Normalize()
	e.opts.Recorder.Enqueue(slot)
	events.Put(slot)
}

func readable(s string) string {
	if isASCII(s) || utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// isASCII is what nearly every text passes, at a third of the price of utf8.ValidString.
func isASCII(s string) bool {
	b := bytesOf(s)
	const high = 0x8080808080808080
	if len(b) < 8 {
		var or byte
		for _, c := range b {
			or |= c
		}
		return or < utf8.RuneSelf
	}
	or := binary.LittleEndian.Uint64(b[len(b)-8:]) // overlaps
	for ; len(b) > 8; b = b[8:] {
		or |= binary.LittleEndian.Uint64(b)
	}
	return or&high == 0
}

func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

var events = sync.Pool{New: func() any { return new(usage.Event) }}

// Suppressed is how many denied attempts were not recorded, because their source
// or all sources together had used up [Options.Denials].
func (e *Edge) Suppressed() uint64 { return e.denials.suppressed.Load() }
