package usage

import (
	"hash/fnv"
	"strconv"
	"strings"
)

// Subjects of the USAGE stream.
const (
	// RawSubject takes one key id token; the server puts the message on its partition.
	RawSubject = "usage.raw."
	// PartitionSubject takes a partition number.
	PartitionSubject = "usage.v1."
)

// Content types of a message on the USAGE stream and of POST /v1/usage.
const (
	ContentTypeJSON     = "application/json"
	ContentTypeNDJSON   = "application/x-ndjson"
	ContentTypeProtobuf = "application/x-protobuf"
)

// HeaderMode marks messages that are not live traffic: with [ModeHistory] they
// are stored and learned from, and their alerts mail nobody.
const (
	HeaderMode  = "Latchkey-Mode"
	ModeHistory = "history"
)

// SubjectToken is a key id as one NATS subject token: '.', '*', '>' and blanks
// become '_'.
func SubjectToken(keyID string) string {
	return strings.Map(func(r rune) rune {
		switch r {
		case '.', '*', '>', ' ', '\t', '\r', '\n':
			return '_'
		}
		return r
	}, keyID)
}

// Partition is the partition of a key among n: FNV-1a 32 over its subject token
// modulo n, which is what NATS's own partition() subject mapping computes.
func Partition(keyID string, n int) int {
	h := fnv.New32a()
	h.Write([]byte(SubjectToken(keyID)))
	return int(h.Sum32() % uint32(n))
}

// Subject is the subject of a partition.
func Subject(partition int) string { return PartitionSubject + strconv.Itoa(partition) }
