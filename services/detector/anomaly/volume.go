package anomaly

import (
	"fmt"
	"math"
	"time"
)

// volumeState is what of a key's volume every event touches.
type volumeState struct {
	// Hour is the current hour (Unix time / 3600), Count the requests in it so far;
	// Bin and BinCount the same in slots of ten minutes.
	Hour     int64
	Bin      int64
	Count    uint32
	BinCount uint32
	// Starts are the hour's requests that came a minute or more after the one before,
	// Grain the usual part of such among all in quiet hours: where requests come in
	// batches, batches are what is random.
	Starts uint32
	Grain  float32
	// CountAlarm, BinAlarm and StartsAlarm are the counts at which they become an alarm.
	CountAlarm  uint32
	BinAlarm    uint32
	StartsAlarm uint32
	// Alarmed is 1 once this hour's volume was an alarm.
	Alarmed uint32
	// Lambda is what the current hour is expected to hold. Need is the evidence that an
	// alarm takes in it, 0 while there is none; Floor the count below which nothing is one.
	Lambda, Need, Floor float32
	// Late counts the events that came after their hour.
	Late uint32
	// BinTail are the daily maxima of a ten-minute count.
	BinTail tail
}

// volumeLimits came with version 2 of a baseline.
type volumeLimits struct {
	// Pending is a Burst of the hours just past, while their evidence lasts: what may
	// yet become an alarm is no habit.
	Pending float32
	// Record is the count that no hour comes near, an alarm whatever the evidence.
	Record float32
}

// volumeSurge came with version 3 of a baseline: how the key's surges last, and its usual days.
type volumeSurge struct {
	// Surge is the logarithm of how far the latest hours stood above their expectation.
	Surge float32
	// SurgeLag and SurgeSquare are the means of an hour's surge times the one before
	// and of the square of the latter; their quotient is what the next hour keeps of a surge.
	SurgeLag, SurgeSquare float32
	// UsualTop is the usual count of a day's largest hour.
	UsualTop float32
}

// volumeProfile is how much a key is used, by hour of the week.
type volumeProfile struct {
	// Week are the mean requests of the 168 hours of the week (Monday 00:00 UTC
	// first), coded by packCount; Day those of the 24 hours of the day; Level of any hour.
	Week  [168]uint16
	Day   [24]float32
	Level float32
	// Hours is the number of hours learned from, Active the share of them with a request.
	Hours  float32
	Active float32
	// Actual and Expected are decayed sums over the latest hours: their ratio is
	// how far the key now stands above its profile.
	Actual, Expected float32
	// Batch is the variance per mean of quiet hours, Spread the squared coefficient
	// of variation of busy ones: variance = Batch·mean + Spread·mean².
	Batch, Spread float32
	// Excess is the evidence of a higher rate carried over from earlier hours.
	Excess float32
	// Burst is the largest count of an hour that its slot did not lead to expect.
	Burst float32
	// ExcessTail and HourTail are the daily maxima of the evidence and of an hour's count.
	ExcessTail, HourTail tail
}

const (
	// riseRatio is the rise that the volume trigger looks for. Evidence grows only
	// when the rate exceeds (riseRatio-1)/ln(riseRatio) = 3.4 times the expected one, so
	// growth and a step to 2.5 times never add up to an alarm.
	riseRatio = 8
	// volumeLearning is how long a key is watched before its volume can alarm: half
	// a month and a bit, so that what happens twice a month is known.
	volumeLearning = 16 * 24 * time.Hour
	// baseEvidence is the least evidence in nats for an alarm in an hour that only chance
	// moves: about 1e-5 an hour for a Poisson count of 0.3 to 1.5, which is where 8 times as
	// much comes nearest to chance. unevenEvidence comes to it where the variance is twice
	// the mean: without it such hours raised half of all false alarms and found nothing more.
	baseEvidence, unevenEvidence = 6, 2.5
	// newsEvidence is what makes a burst of an hour's count, which is learned by its size;
	// as evidence it counts mostEvidence at most, so that one burst does not raise all others' need.
	newsEvidence, mostEvidence = 16, 32
	// volumeSettled is the number of hours before a profile tells what is unusual.
	volumeSettled = 120
	// burstSettled is the number of hours after which a burst stays one.
	burstSettled = 288
	batchPause   = int64(time.Minute)
	// leastRatio is how many times the expected count any alarm takes at least, for a
	// key of even rates; ratioSpread times the coefficient of variation comes to it.
	leastRatio, ratioSpread, mostRatio = 5, 5, 7.5
	// volumeMature is the age in days from which a profile is trusted in full.
	volumeMature = 30.0
	// mostTaught is how many times the expected count an hour teaches at most: a step to
	// 2.5 times is learned whole, a burst is not.
	mostTaught = 2.5
	// quietPrior is the weight of the hour of the day, in weeks, against the hour of the
	// week where a request an hour is usual: five weeks of so small counts tell little.
	quietPrior = 2
	// What follows is by how much a budget larger than the default lowers limits that no
	// probability is part of: the power of the budgets' quotient. A burst hides most, so it yields first.
	burstEase, recordEase, ratioEase = 0.4, 0.3, 0.1
)

// Surges are logarithms of counts of which surgeBase was added, so that the noise of
// small ones is none; they are averaged over three weeks of hours, against a prior of
// surgePrior: the square of 0.3, the noise of ordinary keys from hour to hour.
const (
	surgeBase   = 4
	surgeMemory = 1.0 / 500
	surgePrior  = 0.1
)

var logRise = math.Log(riseRatio)

func (p *profile) initVolume() {
	p.Batch, p.Spread, p.Grain = 1.3, 0.05, 1
}

// weekHour is the hour of the week, 0 = Monday 00:00 UTC (1 January 1970 was a Thursday).
func weekHour(hour int64) int { return int(((hour+72)%168 + 168) % 168) }

// expected is the mean count of an hour: the hour of the week shrunk to the hour
// of the day shrunk to the key's level.
func (p *profile) expected(hour int64) float64 {
	days, weeks := p.learned()
	return p.expectedAt(weekHour(hour), days, weeks)
}

// learned is how many days and weeks count in what is expected.
func (p *profile) learned() (days, weeks float64) {
	hours := float64(p.Hours)
	return min(hours/24, 14), min(hours/168, 5)
}

func (p *profile) expectedAt(w int, days, weeks float64) float64 {
	daily := (float64(p.Day[w%24])*days + 0.15*float64(p.Level)) / (days + 0.15)
	prior := 1 + quietPrior/(daily+0.3)
	return (unpackCount(p.Week[w])*weeks + daily*prior) / (weeks + prior)
}

// slotRate is what an hour may hold without being news: its own expectation or
// most of a neighbour's (cron jobs jitter and clocks change), raised when the key as a
// whole has risen.
func (p *profile) slotRate(hour int64) float64 {
	beside := 0.25
	if !p.even() {
		beside = 0.7
	}
	days, weeks := p.learned()
	w := weekHour(hour)
	x := max(p.expectedAt(w, days, weeks), beside*p.expectedAt((w+167)%168, days, weeks), beside*p.expectedAt((w+1)%168, days, weeks))
	rise := (float64(p.Actual) + 5) / (float64(p.Expected) + 5)
	return x * min(max(0.8*rise, 1), 4) // a little more than usual is noise
}

// even reports whether the key spreads its requests over the hour.
func (p *profile) even() bool { return p.BinTail.Top[0] < 0.5*p.HourTail.Top[0] }

// advance moves the key's clock to an event's time, closing the hours between.
func (p *profile) advance(now int64) {
	if now-p.Newest > int64(24*time.Hour) {
		p.Leap = p.Newest
	} else if p.Leap != 0 && now-p.Leap > int64(72*time.Hour) {
		p.Leap = 0
	}
	hour := hourOf(now)
	if hour == p.Hour {
		return
	}
	ago := hour - p.Hour
	const longest = 24 * 28 // hours of silence that are learned from one by one
	if hour-p.Hour > longest {
		p.closeHour()
		p.Hour, p.Count, p.Starts = hour-longest, 0, 0
	}
	for p.Hour < hour {
		p.closeHour()
		p.Hour++
		p.Count, p.Starts = 0, 0
	}
	p.closeRoutes(ago)
	p.Bin = now / int64(10*time.Minute)
	p.BinCount = 0
	p.plan()
}

// closeHour learns the finished hour.
func (p *profile) closeHour() {
	c, h := float64(p.Count), p.Hour
	raw := p.expected(h)
	lambda := float64(p.Lambda)
	if p.Count == 0 {
		lambda = p.slotRate(h) // plan was not asked about an hour without requests
	}
	if p.Hours > 168 {
		p.learnSpread(c, lambda)
	}
	p.learnSurge(c, raw)
	p.Excess = float32(max(0, min(p.evidence(c, lambda), 1e4)) * 0.9)
	if p.Hours < volumeSettled {
		p.Excess = 0
	}
	if p.Alarmed != 0 {
		p.Excess, p.Alarmed = 0, 0 // what was told once is no evidence for a second alert
	}
	p.HourTail.see(c)
	p.learnExcess(c, lambda)
	if p.Excess < 1 {
		p.Burst, p.Pending = max(p.Burst, p.Pending), 0
	}
	if p.Hours > 336 {
		c = min(c, mostTaught*lambda+10) // a burst teaches a little, not all
	}
	w := weekHour(h)
	p.Hours++
	weeks, days, hours := min(math.Floor(float64(p.Hours-1)/168)+1, 5), min(math.Floor(float64(p.Hours-1)/24)+1, 14), min(float64(p.Hours), 168)
	cell := unpackCount(p.Week[w])
	p.Week[w] = packCount(cell + (c-cell)/weeks)
	p.Day[w%24] += float32((c - float64(p.Day[w%24])) / days)
	p.Level += float32((c - float64(p.Level)) / hours)
	used := float32(0)
	if p.Count > 0 {
		used = 1
	}
	p.Active += (used - p.Active) / float32(min(float64(p.Hours), 336))
	p.Actual = p.Actual*0.96 + float32(c)
	p.Expected = p.Expected*0.96 + float32(raw)
	if h%24 == 23 {
		p.ExcessTail.close()
		p.learnUsual()
		p.HourTail.close()
		p.BinTail.close()
		p.MixTail.close()
		p.Burst *= 0.996
		if usual := p.HourTail.Top[3]; p.Burst < 0.7*usual || p.Hours <= burstSettled && p.Burst < 1.3*usual {
			p.Burst = 0 // what four days held is no burst: the first days knew no hours yet
		}
	}
}

// learnExcess keeps what was unusual but no alarm: small excesses by their
// evidence, bursts by their size.
func (p *profile) learnExcess(c, lambda float64) {
	if c == 0 {
		return // silence is no evidence, and most hours of most keys are silent
	}
	if p.Hours < volumeSettled {
		lambda = max(lambda, 3*float64(p.Level))
	}
	switch x := p.evidenceAlone(c, lambda); {
	case x >= newsEvidence && p.Hours >= 6 && float32(c) > 1.3*p.HourTail.Top[3]:
		p.Pending = max(p.Pending, float32(c))
		if p.Hours >= volumeSettled {
			p.ExcessTail.see(min(x, mostEvidence))
		}
	case p.Hours >= volumeSettled:
		p.ExcessTail.see(max(x, p.startsEvidence(float64(p.Starts), lambda)))
	}
}

// learnUsual learns from the maximum of the day that ends, over two weeks; from an
// unusual one little.
func (p *profile) learnUsual() {
	x, days := p.HourTail.Now, p.HourTail.Days
	if days > 2 {
		x = min(x, 1.5*p.UsualTop+1)
	}
	p.UsualTop += (x - p.UsualTop) / (min(days, 13) + 1)
}

// learnSurge learns how far above its expectation an hour was, and how much of
// such a surge the next hour keeps: first-order autoregression of the logarithm.
func (p *profile) learnSurge(c, raw float64) {
	y := 0.0
	if c > raw {
		y = math.Log((c + surgeBase) / (raw + surgeBase))
	}
	if x := float64(p.Surge); p.Hours > 168 {
		p.SurgeLag += float32(surgeMemory * (y*x - float64(p.SurgeLag)))
		p.SurgeSquare += float32(surgeMemory * (x*x - float64(p.SurgeSquare)))
	}
	if p.Surge = float32(max(y, 0.5*float64(p.Surge))); p.Surge < 1e-3 {
		p.Surge = 0
	}
}

// persistence is the part of a surge, in logarithms, that the next hour is expected
// to keep. Only keys whose surges are large have shown that they last.
func (p *profile) persistence() float64 {
	return min(max(float64(p.SurgeLag), 0)/(float64(p.SurgeSquare)+surgePrior), 0.9)
}

// learnSpread learns how much the counts vary: by batches, which show in quiet
// hours, and by the rate's own ups and downs, which show in busy ones.
func (p *profile) learnSpread(c, lambda float64) {
	d := (c - lambda) * (c - lambda)
	if lambda < 20 && c > 0 {
		p.Grain += float32(0.01 * min(c, 10) * (float64(p.Starts)/c - float64(p.Grain)))
	}
	if lambda < 4 {
		x := (d - float64(p.Spread)*lambda*lambda) / (lambda + 0.3)
		p.Batch += float32(0.01 * (min(x, 40) - float64(p.Batch)))
		return
	}
	x := (d - float64(p.Batch)*lambda) / (lambda * lambda)
	p.Spread = max(0, p.Spread+float32(0.01*(min(x, 2)-float64(p.Spread))))
}

// inflation is the variance of a count with the given mean, over the mean.
func (p *profile) inflation(lambda float64) float64 {
	return max(1, float64(p.Batch), 1/max(float64(p.Grain), 0.1)) + float64(p.Spread)*lambda
}

// evidence is Page's cumulative sum (1954) for a Poisson rate of riseRatio times
// the expected one, in nats, over the hours so far; an hour's whole expectation is
// taken off at its beginning, so a running count can be compared at any moment. It is
// divided by the inflation of the variance (quasi-likelihood, Wedderburn 1974).
func (p *profile) evidence(c, lambda float64) float64 {
	if c == 0 && p.Excess == 0 {
		return 0
	}
	return float64(p.Excess) + p.evidenceAlone(c, lambda)
}

func (p *profile) startsEvidence(n, lambda float64) float64 {
	return (n*logRise - (riseRatio-1)*(lambda*float64(p.Grain)+0.15)) / 1.1
}

func (p *profile) evidenceAlone(c, lambda float64) float64 {
	lambda += 0.1
	return (c*logRise - (riseRatio-1)*lambda) / p.inflation(lambda)
}

// plan computes what the hour that begins may hold.
func (p *profile) plan() {
	p.planMix()
	lambda := p.slotRate(p.Hour) * math.Exp(p.persistence()*float64(p.Surge))
	p.Lambda, p.Need = float32(lambda), 0
	p.CountAlarm, p.BinAlarm, p.StartsAlarm = math.MaxUint32, math.MaxUint32, math.MaxUint32
	age := p.Newest - p.First
	if age < int64(volumeLearning)/4 || p.Hours < volumeSettled {
		return
	}
	young, perDay := 1.0, 5e-4*math.Exp(-p.strict)
	if age < int64(volumeLearning) {
		young = 40
	}
	most := float64(p.HourTail.Top[0])
	burst, ease := p.burstFloor(), p.ease(recordEase)
	if p.Active < 0.25 {
		burst = max(burst, 2.5*most*ease) // a job that runs at another hour is no news
	}
	if young > 1 {
		burst = max(burst, young*most, 500)
	}
	doubt := 1 + 0.2*max(0, volumeMature-float64(age)/float64(24*time.Hour))/14
	p.Floor = float32(burst)
	base := baseEvidence + unevenEvidence*min(p.inflation(lambda)-1, 1)
	p.Need = float32(max(base+p.strict, p.ExcessTail.light(perDay, 1, ease), 1) * min(young, 4) * doubt)
	p.Record = float32(max(25, p.HourTail.heavy(perDay, 0.2), 2.5*most*ease, burst))
	bin := max(25, p.BinTail.heavy(perDay, 0.2), 2.5*float64(p.BinTail.Top[0]), 15+5*lambda/6, burst)
	p.BinAlarm = countOf(bin)
	p.planSoFar()
}

// planSoFar computes, for the ten minutes that begin, at which count the hour so
// far is an alarm. Where a key spreads its requests over the hour, only the part
// that can have come by then is expected.
func (p *profile) planSoFar() {
	if p.Need == 0 {
		return
	}
	lambda, burst := float64(p.Lambda), float64(p.Floor)
	if so := float64(p.Bin%6+2) / 6; so < 1 && p.even() {
		lambda *= so
		if lambda > 2 {
			burst = max(burst, 1.5*float64(p.BinTail.Top[0])) // ten busy minutes at the beginning are none
		}
	}
	room := float64(p.Need) - float64(p.Excess)
	c := (room*p.inflation(lambda+0.1) + (riseRatio-1)*(lambda+0.1)) / logRise
	ratio := p.leastRise()
	p.CountAlarm = countOf(max(min(c, float64(p.Record)), 6, ratio*lambda, burst))
	p.StartsAlarm = math.MaxUint32
	grain := float64(p.Grain)
	c = max(5, (room*1.1+(riseRatio-1)*(lambda*grain+0.15))/logRise, ratio*lambda*grain)
	if p.Lambda < 20 && c >= burst*grain {
		p.StartsAlarm = countOf(c)
	}
}

// leastRise is how many times the expected count this hour's must be.
func (p *profile) leastRise() float64 {
	if p.Excess > p.Need/3 {
		return leastRatio - 1 // it has begun in the hour before
	}
	return min(leastRatio+ratioSpread*math.Sqrt(float64(p.Spread)), mostRatio) * p.ease(ratioEase)
}

// ease is what a limit is multiplied by at a budget larger than the default.
func (p *profile) ease(power float64) float64 { return math.Exp(power * min(p.strict, 0)) }

// burstFloor is the count that a burst on record makes no news. One that stands alone, as
// a backfill does, may be twice as large the next time. Where the next largest
// days come in all sizes below it there is no such burst but a long tail, which
// the evidence has learned; only less than it is no news then.
func (p *profile) burstFloor() float64 {
	tail := true
	for _, x := range p.HourTail.Top[1:] {
		tail = tail && x > 1.5*p.UsualTop && x > 0.2*p.Burst && x < 0.65*p.Burst
	}
	most := math.Exp(0.8*p.strict) * p.ease(burstEase) * float64(p.Burst)
	if tail {
		return most
	}
	return 2 * most
}

func countOf(x float64) uint32 { return uint32(min(math.Ceil(x), math.MaxUint32-1)) }

// judgeVolume counts the event and alarms the moment the running count passes
// what the whole hour, or ten minutes of it, may hold.
func (e *Engine) judgeVolume(p *profile, now int64, j *judgement) {
	if bin := now / int64(10*time.Minute); bin != p.Bin {
		p.Bin, p.BinCount = bin, 0
		if p.Alarmed == 0 {
			p.planSoFar()
		}
	}
	p.Count++
	p.BinCount++
	if now-p.Previous >= batchPause || p.Count == 1 {
		p.Starts++
	}
	p.BinTail.see(float64(p.BinCount))
	byHour, byBin := p.Count >= p.CountAlarm || p.Starts >= p.StartsAlarm, p.BinCount >= p.BinAlarm
	if !byHour && !byBin {
		return
	}
	// The level is adopted at once: only twice as much again is further news.
	ratio := 1.0
	if byHour {
		ratio = max(ratio, float64(p.Count)/(float64(p.Lambda)+1))
		p.CountAlarm, p.StartsAlarm = countOf(2*float64(p.Count)), countOf(2*float64(p.Starts))
	}
	if byBin {
		ratio = max(ratio, 6*float64(p.BinCount)/(float64(p.Lambda)+1))
		p.BinAlarm = countOf(2 * float64(p.BinCount))
	}
	p.Alarmed = 1
	j.add(triggerVolume, alarm+math.Log10(ratio))
}

// teachLate adds an event to the hour of the week that it belongs to.
func (p *profile) teachLate(now int64) {
	p.Late++
	behind := p.Hour - hourOf(now)
	if behind > 24*28 || p.Hours < 1 {
		return
	}
	w := weekHour(hourOf(now))
	weeks, days := min(float64(p.Hours)/168+1, 5), min(float64(p.Hours)/24+1, 14)
	limit := 4*p.expected(hourOf(now)) + 10
	if cell := unpackCount(p.Week[w]); cell < limit {
		p.Week[w] = packCount(cell + 1/weeks)
	}
	if float64(p.Day[w%24]) < limit {
		p.Day[w%24] += float32(1 / days)
	}
}

func (p *profile) volumeWords(now int64) (observed, usual string) {
	at := time.Unix(0, now).UTC()
	since := time.Unix(p.Hour*3600, 0).UTC()
	observed = fmt.Sprintf("%s requests since %s UTC", thousands(float64(p.Count)), since.Format("15:04"))
	if p.BinCount < p.Count {
		observed += fmt.Sprintf(", %s of them since %s", thousands(float64(p.BinCount)), at.Truncate(10*time.Minute).Format("15:04"))
	}
	usual = fmt.Sprintf("about %s in the hour from %s on a %s, at most %s in any hour on record",
		amount(p.expected(p.Hour)), since.Format("15:04"), since.Weekday(), thousands(float64(p.HourTail.Top[0])))
	return observed, usual
}
