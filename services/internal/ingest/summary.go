package ingest

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
)

// Summary says what became of the records of one import.
type Summary struct {
	Files int `json:"files"`
	// Records is what was found: Imported and LeftOut together.
	Records  int64 `json:"records"`
	Imported int64 `json:"imported"`
	LeftOut  int64 `json:"left_out"`
	Keys     int   `json:"keys"`
	// Reasons for which records were left out, the most frequent first.
	Reasons []Reason `json:"reasons"`
	// Errors are the files that could not be read to their end.
	Errors []string `json:"errors"`
	// Stored says that every event is in ClickHouse, not only in JetStream.
	Stored bool `json:"stored"`

	reasons map[string]*Reason
	keys    map[string]struct{}
}

// Reason is why records were left out.
type Reason struct {
	Reason string `json:"reason"`
	Count  int64  `json:"count"`
	// Example is the first place: "access.log, line 7".
	Example string `json:"example"`
}

// maxReasons bounds the distinct reasons, since some quote what they refuse.
const maxReasons = 50

// Leave counts a record that was left out.
func (s *Summary) Leave(place, reason string) {
	s.Records++
	s.LeftOut++
	if s.reasons == nil {
		s.reasons = map[string]*Reason{}
	}
	if s.reasons[reason] == nil {
		if len(s.reasons) >= maxReasons {
			reason = "other reasons"
		}
		if s.reasons[reason] == nil {
			s.reasons[reason] = &Reason{Reason: reason, Example: place}
		}
	}
	s.reasons[reason].Count++
}

// Take counts an event.
func (s *Summary) Take(keyID string) {
	s.Records++
	s.Imported++
	if s.keys == nil {
		s.keys = map[string]struct{}{}
	}
	s.keys[keyID] = struct{}{}
}

// Finish fills in the sums.
func (s *Summary) Finish() {
	s.Keys = len(s.keys)
	s.Reasons = []Reason{}
	for _, r := range slices.SortedFunc(maps.Values(s.reasons), func(a, b *Reason) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Reason, b.Reason))
	}) {
		s.Reasons = append(s.Reasons, *r)
	}
	if s.Errors == nil {
		s.Errors = []string{}
	}
}

// Print writes the summary for people.
func (s *Summary) Print(w io.Writer) {
	fmt.Fprintf(w, "%d files, %d records: %d imported (%d keys), %d left out\n", s.Files, s.Records, s.Imported, s.Keys, s.LeftOut)
	for _, r := range s.Reasons {
		fmt.Fprintf(w, "  left out %d: %s (first: %s)\n", r.Count, r.Reason, r.Example)
	}
	for _, e := range s.Errors {
		fmt.Fprintf(w, "  error: %s\n", e)
	}
}
