package usage

import (
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
		if r < 0x80 {
			return rune(tokenByte(byte(r)))
		}
		return r
	}, keyID)
}

func tokenByte(c byte) byte {
	switch c {
	case '.', '*', '>', ' ', '\t', '\r', '\n':
		return '_'
	}
	return c
}

// Partition is the partition of a key among n: FNV-1a 32 over its subject token
// modulo n, which is what NATS's own partition() subject mapping computes.
func Partition(keyID string, n int) int {
	h := uint32(2166136261)
	for i := range len(keyID) {
		h = (h ^ uint32(tokenByte(keyID[i]))) * 16777619
	}
	return int(h % uint32(n))
}

// Subject is the subject of a partition.
func Subject(partition int) string { return PartitionSubject + strconv.Itoa(partition) }
