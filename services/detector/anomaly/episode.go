package anomaly

import (
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// trigger numbers the triggers.
type trigger int

const (
	triggerNetwork trigger = iota
	triggerVolume
	triggerMix
	triggerDormant
	triggerGuess
	triggerRevoked
	triggerScope
	triggerCount = iota
)

var triggerNames = [triggerCount]string{
	alert.NewIPRange, alert.VolumeSpike, alert.EndpointMix, alert.DormantKey,
	alert.KeyGuessing, alert.RevokedKey, alert.ScopeProbing,
}

const (
	// alarm is the score at which a key alerts at the default budget.
	alarm = 3.0
	// noticed is the least score that is remembered to be combined with others.
	noticed = 1.3
	// combine is how long scores of different triggers add up.
	combine = time.Hour
	// episodeQuiet is how long an episode stays open after its last alarm.
	episodeQuiet = 48 * time.Hour
	// verdictTime is how long a verdict quiets the key.
	verdictTime = 30 * 24 * time.Hour
	planTime    = 7 * 24 * time.Hour
)

// judgement collects what the triggers say of one event.
type judgement struct {
	now    int64
	scores [triggerCount]float64
	best   float64
}

func (j *judgement) add(t trigger, score float64) {
	if score > j.scores[t] {
		j.scores[t] = score
	}
	if score > j.best {
		j.best = score
	}
}

// episode is an alert while it can still grow.
type episode struct {
	Alert alert.Alert `json:"alert"`
	// Last is when it last had an alarm, Unix nanoseconds.
	Last   int64                 `json:"last"`
	Scores [triggerCount]float64 `json:"scores"`
}

// decide combines the scores of the last hour and opens or grows an episode.
func (e *Engine) decide(p *profile, ev *usage.Event, j *judgement, history bool) []alert.Alert {
	var now [triggerCount]float64
	at, span := seconds(j.now), uint32(combine/time.Second)
	for t := range triggerCount {
		if j.scores[t] >= noticed {
			if at-p.WeakAt[t] > span || float32(j.scores[t]) > p.Weak[t] {
				p.Weak[t] = float32(j.scores[t])
			}
			p.WeakAt[t] = at
		}
		if p.Weak[t] > 0 && at-p.WeakAt[t] <= span && at >= p.WeakAt[t] {
			now[t] = float64(p.Weak[t])
		}
		if at < p.Muted[t] {
			now[t] = min(now[t], now[t]-alarm)
		}
	}
	need := alarm + p.strict/math.Ln10
	if combined(now[:]) < need || j.best < noticed {
		return nil
	}
	open := p.episode
	if open != nil && j.now-open.Last > int64(episodeQuiet) {
		open = nil
	}
	if open == nil {
		return []alert.Alert{e.raise(p, ev, now, history)}
	}
	open.Last = max(open.Last, j.now)
	if e.grow(p, open, ev, now) {
		return []alert.Alert{copyAlert(open.Alert)}
	}
	return nil
}

// seconds is Unix nanoseconds as Unix seconds, from 1970 to 2106.
func seconds(nanos int64) uint32 {
	return uint32(min(max(nanos/int64(time.Second), 0), math.MaxUint32))
}

// combined adds up scores: the strongest whole, the others by what they exceed
// the noise floor, so that two weak signals which agree count like a strong one.
func combined(scores []float64) float64 {
	best, sum := 0.0, 0.0
	for _, s := range scores {
		best = max(best, s)
		sum += max(0, s-0.5)
	}
	return max(best, best+sum-max(0, best-0.5)-0.3)
}

func (e *Engine) raise(p *profile, ev *usage.Event, scores [triggerCount]float64, history bool) alert.Alert {
	ep := &episode{Last: ev.Time.UnixNano(), Scores: scores}
	l := e.locate(ev.SourceIP)
	a := alert.Alert{
		Time: ev.Time, DetectedAt: ev.Time, OrgID: ev.OrgID, KeyID: ev.KeyID, SourceIP: ev.SourceIP,
		UserAgent: ev.UserAgent, Method: ev.Method, Route: ev.Route, EventID: ev.ID, Revision: 1, Historical: history,
	}
	if l.Known&countryKnown != 0 {
		a.Country = countryString(l.Country)
	}
	if l.Known&operatorKnown != 0 && e.opts.Locate != nil {
		at := e.opts.Locate(ev.SourceIP)
		a.ASN, a.ASName = at.ASN, at.ASName
	}
	ep.Alert = a
	for t := range triggerCount {
		if scores[t] >= noticed {
			e.witness(p, ep, trigger(t), ev)
		}
	}
	ep.finish(scores)
	ep.Alert.ID = alertID(&ep.Alert)
	p.episode = ep
	p.Past[p.PastAt%pastEpisodes] = pastEpisode{ID: hashString(ep.Alert.ID, 4), Start: ep.Last, Triggers: ep.mask()}
	p.PastAt = (p.PastAt + 1) % pastEpisodes
	return copyAlert(ep.Alert)
}

// grow adds to an open episode and reports whether that is worth telling.
func (e *Engine) grow(p *profile, ep *episode, ev *usage.Event, scores [triggerCount]float64) bool {
	severity, known := ep.Alert.Severity, len(ep.Alert.Triggers)
	for t := range triggerCount {
		if scores[t] < noticed {
			continue
		}
		if ep.Scores[t] < noticed {
			ep.Scores[t] = scores[t]
			e.witness(p, ep, trigger(t), ev)
		}
		ep.Scores[t] = max(ep.Scores[t], scores[t])
	}
	ep.finish(ep.Scores)
	if ep.Alert.Severity == severity && len(ep.Alert.Triggers) == known {
		return false
	}
	ep.Alert.Revision++
	return true
}

// witness adds a trigger and its evidence.
func (e *Engine) witness(p *profile, ep *episode, t trigger, ev *usage.Event) {
	var observed, usual string
	switch t {
	case triggerNetwork:
		observed, usual = p.networkWords(e, ev)
	case triggerVolume:
		observed, usual = p.volumeWords(ev.Time.UnixNano())
	case triggerMix:
		observed, usual = p.mixWords()
	case triggerDormant:
		observed, usual = p.dormantWords()
	case triggerGuess:
		observed, usual = p.guessWords(ev)
	case triggerRevoked:
		observed, usual = p.revokedWords(ev)
	case triggerScope:
		observed, usual = p.scopeWords()
	}
	ep.Alert.Triggers = append(ep.Alert.Triggers, triggerNames[t])
	ep.Alert.Evidence = append(ep.Alert.Evidence, alert.Evidence{
		Trigger: triggerNames[t], Observed: observed, Usual: usual, PValue: round(math.Pow(10, -ep.Scores[t]), 2),
	})
}

// finish sets what follows from the scores: score, severity and summary.
//
// Severities: low, one weak signal; medium, one trigger at its threshold; high, two
// triggers that agree, or one that is far beyond its threshold; critical, three
// triggers, a sleeping key that woke in a strange network, or a revoked key.
func (ep *episode) finish(scores [triggerCount]float64) {
	a := &ep.Alert
	score := combined(scores[:])
	a.Score = math.Round(score*10) / 10
	strange, dormant := scores[triggerNetwork] >= noticed, scores[triggerDormant] >= noticed
	switch n := len(a.Triggers); {
	case n >= 3, strange && dormant:
		a.Severity = alert.Critical
	case n == 2, score >= alarm+1.2, scores[triggerRevoked] > 0, scores[triggerGuess] > 0:
		a.Severity = alert.High
	case score >= alarm:
		a.Severity = alert.Medium
	default:
		a.Severity = alert.Low
	}
	for i, ev := range a.Evidence {
		if t := slices.Index(triggerNames[:], ev.Trigger); t >= 0 {
			a.Evidence[i].PValue = round(math.Pow(10, -scores[t]), 2)
		}
	}
	a.Summary = summary(a)
}

func (ep *episode) mask() uint32 {
	m := uint32(0)
	for t, name := range triggerNames {
		if slices.Contains(ep.Alert.Triggers, name) {
			m |= 1 << t
		}
	}
	return m
}

// summary is one sentence for the key's owner.
func summary(a *alert.Alert) string {
	if len(a.Evidence) == 0 {
		return fmt.Sprintf("Key %s behaves unlike itself.", a.KeyID)
	}
	parts := make([]string, 0, len(a.Evidence))
	for _, ev := range a.Evidence {
		parts = append(parts, clause(ev))
	}
	return fmt.Sprintf("Key %s %s.", a.KeyID, strings.Join(parts, ", and "))
}

func clause(ev alert.Evidence) string {
	switch ev.Trigger {
	case alert.NewIPRange:
		return fmt.Sprintf("was used from %s (usual: %s)", ev.Observed, ev.Usual)
	case alert.VolumeSpike:
		return fmt.Sprintf("made %s (usual: %s)", ev.Observed, ev.Usual)
	case alert.EndpointMix:
		return fmt.Sprintf("turned to %s (usual: %s)", ev.Observed, ev.Usual)
	case alert.DormantKey:
		return fmt.Sprintf("was %s (usual: %s)", ev.Observed, ev.Usual)
	case alert.KeyGuessing:
		return fmt.Sprintf("is among those tried by a source that guesses keys: %s", ev.Observed)
	case alert.RevokedKey:
		return "was used although it is revoked: " + ev.Observed
	default:
		return fmt.Sprintf("tried what it may not do: %s (usual: %s)", ev.Observed, ev.Usual)
	}
}

// alertID follows from the key, the triggers and the first event.
func alertID(a *alert.Alert) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\x00%s\x00%s\x00%d\x00%s\x00%s\x00%s", a.KeyID, strings.Join(a.Triggers, ","), a.EventID,
		a.Time.UnixNano(), a.SourceIP, a.Method, a.Route)
	return "alrt_" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(h.Sum(nil)[:15]))
}

func copyAlert(a alert.Alert) alert.Alert {
	a.Triggers = slices.Clone(a.Triggers)
	a.Evidence = slices.Clone(a.Evidence)
	return a
}

// Verdicts of an owner.
const (
	Expected    = "expected"
	Planned     = "planned"
	Compromised = "compromised"
)

// Verdict takes an owner's word on an alert of a key. "expected" quiets the same
// triggers of the key for 30 days, "planned" for a week, both from the given time;
// "compromised" takes what the episode taught out of the baseline again, so that
// the thief's network and routes stay strange. A verdict on an alert that the key
// no longer remembers changes nothing.
func (e *Engine) Verdict(keyID, alertID, verdict string, at time.Time) {
	p := e.keys.get(keyID)
	if p == nil {
		return
	}
	id := hashString(alertID, 4)
	i := slices.IndexFunc(p.Past[:], func(x pastEpisode) bool { return x.ID == id && x.Start != 0 })
	if i < 0 {
		return
	}
	past := p.Past[i]
	switch verdict {
	case Expected, Planned:
		d := verdictTime
		if verdict == Planned {
			d = planTime
		}
		for t := range triggerCount {
			if past.Triggers>>t&1 == 1 {
				p.Muted[t] = max(p.Muted[t], seconds(at.Add(d).UnixNano()))
			}
		}
	case Compromised:
		p.unlearn(past)
	}
}

// unlearn forgets the networks and routes that came with an episode.
func (p *profile) unlearn(past pastEpisode) {
	if past.Triggers>>triggerNetwork&1 == 1 && p.Strange.Prefix != 0 {
		drop(p.Prefixes[:], p.Strange.Prefix)
		for _, level := range []struct {
			set []slot
			key uint64
		}{{p.Coarse[:], p.Strange.Coarse}, {p.Operators[:], p.Strange.Operator}, {p.Countries[:], p.Strange.Country}} {
			if weightOf(level.set, level.key) < 30 {
				drop(level.set, level.key)
			}
		}
		p.LastVisit = 0
	}
	if past.Triggers>>triggerMix&1 == 1 {
		p.Routes[p.Turned] = route{}
	}
	p.Muted = [triggerCount]uint32{}
}

func weightOf(set []slot, key uint64) float32 {
	for i := range set {
		if set[i].Key == key {
			return set[i].Weight
		}
	}
	return 0
}
