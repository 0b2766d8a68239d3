package anomaly

import (
	"fmt"
	"math"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// denyState is how a key is refused.
type denyState struct {
	// Refused is the number of requests lacking a scope in DeniedHour, Habit the usual
	// number in an hour with any.
	DeniedHour int64
	Refused    uint32
	Revoked    uint32
	Habit      float32
	RefusedMax float32
	// RevokedAt is when a revoked key was last used.
	RevokedAt int64
	// GuessedKeys and GuessedTries are of the latest guessing alarm.
	GuessedKeys, GuessedTries uint32
}

const (
	probeFloor  = 5  // requests without the scope within an hour
	guessKeys   = 6  // different keys refused to one source within an hour
	guessTries  = 40 // refusals to one source within an hour, of however few keys
	sourceSlots = 1 << 13
	// scopeLearning is the age in days from which the refusals of a key are known.
	scopeLearning = 5.0
)

// judgeScope looks for a burst of requests that lacked a scope.
func (e *Engine) judgeScope(p *profile, ev *usage.Event, now int64, j *judgement) {
	if ev.DenyReason != usage.DenyInsufficientScope {
		return
	}
	if hour := hourOf(now); hour != p.DeniedHour {
		if p.Refused > 0 {
			p.RefusedMax = max(p.RefusedMax*0.98, float32(p.Refused))
			p.Habit += 0.1 * (float32(p.Refused) - p.Habit)
		}
		p.DeniedHour, p.Refused = hour, 0
	}
	p.Refused++
	// A backfill brings more of the refusals that the key always has.
	busy := max(float64(p.InHour-min(p.Refused, p.InHour))/max(float64(p.Level), 1), 1)
	limit := max(probeFloor, 3*float64(p.RefusedMax)*busy+3)
	if p.ageDays(now) < scopeLearning {
		limit = 6*limit + 20
	}
	if float64(p.Refused) >= limit/2 {
		j.add(triggerScope, alarm+math.Log2(float64(p.Refused)/limit))
	}
}

// observeStranger takes a refusal of a key that was never used: it counts for its
// source only, and the key gets a baseline when it comes to carry the alert.
func (e *Engine) observeStranger(ev *usage.Event, now int64, history bool) []alert.Alert {
	s, crossed := e.sources.refuse(ev, now)
	if !crossed {
		return nil
	}
	p := e.create(ev.OrgID, ev.KeyID, ev.Time)
	p.Events++
	return e.guessed(p, s, ev, now, history)
}

func (e *Engine) guessed(p *profile, s *source, ev *usage.Event, now int64, history bool) []alert.Alert {
	j := judgement{now: now}
	p.GuessedKeys, p.GuessedTries = uint32(s.keys()), s.Tries
	j.add(triggerGuess, alarm+math.Log2(float64(max(s.Tries, 2))/2)/2)
	return e.decide(p, ev, &j, history)
}

// observeDenied takes a request that was refused because of the key itself.
// It teaches nothing: it may not be the holder's.
func (e *Engine) observeDenied(p *profile, ev *usage.Event, now int64, history bool) []alert.Alert {
	if now < p.Newest-int64(time.Hour) {
		return nil
	}
	p.Events++
	if p.RevokedAt == 0 && now > p.Newest && p.Events == 1 {
		p.Newest = now
	}
	var j judgement
	j.now = now
	if ev.DenyReason == usage.DenyRevokedKey || ev.DenyReason == usage.DenyExpiredKey {
		fresh := now-p.RevokedAt > int64(7*24*time.Hour)
		p.RevokedAt = now
		p.Revoked++
		if ev.DenyReason == usage.DenyRevokedKey && fresh {
			p.Revoked = 1
			j.add(triggerRevoked, alarm+0.5)
		}
	}
	if s, crossed := e.sources.refuse(ev, now); crossed {
		p.GuessedKeys, p.GuessedTries = uint32(s.keys()), s.Tries
		j.add(triggerGuess, alarm+math.Log2(float64(max(s.Tries, 2))/2)/2)
	}
	if j.best < noticed {
		return nil
	}
	return e.decide(p, ev, &j, history)
}

// sources counts refusals per source, in a table of fixed size: a newcomer takes
// the place of an older source with the same hash.
type sources struct{ table []source }

// source is one /32 or /64 address and its refusals in the current hour.
type source struct {
	Key    uint64
	Hour   int64
	Tries  uint32
	Alarms uint32
	// Keys marks the refused keys by hash: its filling tells how many there were
	// (linear counting, Whang et al. 1990).
	Keys [2]uint64
}

func newSources() *sources { return &sources{} }

// refuse counts one refusal and reports whether the source has just become a guesser.
func (t *sources) refuse(ev *usage.Event, now int64) (*source, bool) {
	switch ev.DenyReason {
	case usage.DenyInvalidKey, usage.DenyExpiredKey, usage.DenyRevokedKey, usage.DenyMissingKey:
	default:
		return nil, false
	}
	if t.table == nil {
		t.table = make([]source, sourceSlots)
	}
	key := prefixOf(ev.SourceIP)
	if ev.SourceIP.Is4() {
		b := ev.SourceIP.As4()
		key = key<<8 | uint64(b[3]) | 5<<60
	}
	s := &t.table[mix(key)%sourceSlots]
	hour := hourOf(now)
	if s.Key != key || hour != s.Hour {
		alarms := uint32(0)
		if s.Key == key && hour == s.Hour+1 {
			alarms = s.Alarms
		}
		*s = source{Key: key, Hour: hour, Alarms: alarms}
	}
	s.Tries++
	h := hashString(ev.KeyID, 3)
	s.Keys[h>>6&1] |= 1 << (h & 63)
	if s.Alarms > 0 || s.keys() < guessKeys && (s.Tries < guessTries || ev.DenyReason != usage.DenyInvalidKey) {
		return s, false
	}
	s.Alarms++
	return s, true
}

// keys is the estimated number of different keys.
func (s *source) keys() int {
	free := 128 - popcount(s.Keys)
	return int(math.Round(128 * math.Log(128/float64(max(free, 1)))))
}

func (p *profile) revokedWords(ev *usage.Event) (observed, usual string) {
	return fmt.Sprintf("a request from %s with the key after it was revoked", ev.SourceIP), "a revoked key is not used"
}

func (p *profile) scopeWords() (observed, usual string) {
	return fmt.Sprintf("%d requests lacking a scope within the hour", p.Refused),
		fmt.Sprintf("at most %.0f in an hour", p.RefusedMax)
}

func (p *profile) guessWords(ev *usage.Event) (observed, usual string) {
	return fmt.Sprintf("%d refused requests from %s within the hour, with about %d different keys", p.GuessedTries, ev.SourceIP, p.GuessedKeys),
		"a client is refused a few times, with one key"
}
