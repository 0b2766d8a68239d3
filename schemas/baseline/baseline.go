// Package baseline is the contract of the baseline: what the detector has
// learned of a key, in the form that analysts read from ClickHouse table
// key_baselines.
package baseline

import "time"

// Stream is the JetStream stream that carries rows to the collector.
const Stream = "BASELINES"

// SubjectPrefix takes a partition number: "baselines.<partition>". A message is
// a JSON array of [Row].
const SubjectPrefix = "baselines."

// Row is the baseline of one key at one moment, a row of key_baselines. A newer
// row (by UpdatedAt, then Sequence) replaces an older one of the same key.
type Row struct {
	KeyID string `json:"key_id"`
	OrgID string `json:"org_id"`
	// UpdatedAt is the time of the latest event that the row includes.
	UpdatedAt time.Time `json:"updated_at"`
	// Partition and Sequence say how far in stream USAGE the row has read;
	// both are 0 in a row that was rebuilt from ClickHouse.
	Partition int    `json:"partition"`
	Sequence  uint64 `json:"sequence"`

	FirstSeen time.Time `json:"first_seen"`
	LastSeen  time.Time `json:"last_seen"`
	// Events counts every event learned from, undecayed.
	Events uint64 `json:"events"`
	// Maturity runs from 0 (nothing known, priors stand in) to 1 (settled).
	Maturity float64 `json:"maturity"`
	// ParentKeyID is the key that this one inherited its baseline from.
	ParentKeyID string `json:"parent_key_id,omitempty"`

	// Networks are the usual prefixes ("203.0.113.0/24"), ASNs ("AS64500 Example")
	// and Countries (ISO 3166-1 alpha-2), each with the largest share first.
	Networks  []Share `json:"networks"`
	ASNs      []Share `json:"asns"`
	Countries []Share `json:"countries"`
	// Routes are "METHOD /route", the largest share first.
	Routes []Share `json:"routes"`
	// HourOfWeek is the usual number of events in each hour of the week,
	// beginning with Monday 00:00 UTC; 168 values, or none while unknown.
	HourOfWeek []float64 `json:"hour_of_week"`
	// EventsPerHour is the usual number of events in an hour.
	EventsPerHour float64 `json:"events_per_hour"`
	// GapSecondsMedian and GapSecondsMax are the usual and the longest known
	// pause between two events.
	GapSecondsMedian float64 `json:"gap_seconds_median"`
	GapSecondsMax    float64 `json:"gap_seconds_max"`
}

// Share is a value and its part of the key's events, 0 to 1.
type Share struct {
	Value string  `json:"value"`
	Share float64 `json:"share"`
}
