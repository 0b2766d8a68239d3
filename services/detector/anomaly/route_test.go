package anomaly

import (
	"fmt"
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestPeakIsKeptToATenth(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Uint32Range(0, 1e6).Draw(t, "n")
		if got := float64(peaks[packPeak(n)]); math.Abs(got-float64(n)) > 0.1*float64(n)+0.1 {
			t.Fatalf("%d is kept as %v", n, got)
		}
	})
}

// ordinary sends days of one request every other minute to the usual endpoint.
func (f *feed) ordinary(from time.Time, days int) time.Time {
	for i := range days * 24 * 30 {
		f.send("k", from.Add(time.Duration(i)*2*time.Minute), "84.128.1.9", "POST", "/v1/readings")
	}
	return from.AddDate(0, 0, days)
}

// A bulk of requests to one endpoint that an earlier day knew is no turn; three
// times as many are.
func TestABackfillThatComesAgainIsNoTurn(t *testing.T) {
	t.Parallel()
	f := &feed{Engine: New(Options{Locate: world})}
	end := f.month("k")
	bulk := func(at time.Time, n int) int {
		before := len(f.out)
		for i := range n {
			f.send("k", at.Add(time.Duration(i)*time.Second), "84.128.1.9", "POST", "/v1/readings/bulk")
		}
		return len(f.out) - before
	}
	// The first time it may be told (half an hour of the key's usual rate, all of it new).
	bulk(end, 60)
	at := f.ordinary(end.Add(5*time.Minute), 14)
	if n := bulk(at, 70); n != 0 {
		t.Errorf("the second time told %d times: %v", n, f.out[len(f.out)-1].Summary)
	}
	at = f.ordinary(at.Add(5*time.Minute), 7)
	for i := range 600 { // the rate of every day, and all of it turned
		f.send("k", at.Add(time.Duration(i)*2*time.Minute), "84.128.1.9", "GET", fmt.Sprint("/v1/users/", i+1000))
	}
	if last := f.out[len(f.out)-1]; last.Time.Before(at) || last.Time.After(at.Add(20*time.Minute)) {
		t.Errorf("a turn to another endpoint: %v", last)
	}
}

// One request to a new endpoint is a deployment's or a typing error; several to a
// foreign resource are told.
func TestOneRequestIsNoTurn(t *testing.T) {
	t.Parallel()
	f := &feed{Engine: New(Options{Locate: world})}
	end := f.month("k")
	for range 5 {
		f.send("k", end, "84.128.1.9", "GET", "/v1/invoices")
		end = f.ordinary(end.Add(time.Minute), 1)
	}
	if len(f.out) != 0 {
		t.Errorf("one request a day to a new endpoint is told: %v", f.out[0].Summary)
	}
	n := 0
	for len(f.out) == 0 && n < 20 {
		f.send("k", end.Add(time.Duration(n)*time.Second), "84.128.1.9", "GET", "/v1/users")
		n++
	}
	if n < mixFewest || n > 6 {
		t.Errorf("a foreign resource is told after %d requests", n)
	}
}
