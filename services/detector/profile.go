package detector

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/klauspost/compress/s2"
)

// Names in bucket baselines are "<partition>.<token>". Those of keys are the key
// id with what a bucket cannot hold escaped; those of ours begin with "_".
const (
	nameCommit  = "_commit"
	nameSources = "_sources"
	nameJournal = "_journal" // _journal.<owner>.<n>
	nameRebuild = "_rebuild" // there while the partition is to be rebuilt
)

const hexDigits = "0123456789ABCDEF"

// keyToken is a key id as one token of a bucket's key: '.', ':' and a leading '_'
// become "=XX". Unlike usage.SubjectToken it keeps any two ids apart.
func keyToken(keyID string) string {
	if keyID == "" || keyID[0] != '_' && !strings.ContainsAny(keyID, ".:") {
		return keyID
	}
	var b strings.Builder
	for i := range len(keyID) {
		switch c := keyID[i]; {
		case c == '.', c == ':', c == '_' && i == 0:
			b.WriteByte('=')
			b.WriteByte(hexDigits[c>>4])
			b.WriteByte(hexDigits[c&15])
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// keyOfToken is the inverse of keyToken.
func keyOfToken(token string) string {
	for _, c := range []string{".", ":", "_"} {
		token = strings.ReplaceAll(token, fmt.Sprintf("=%X", c[0]), c)
	}
	return token
}

// profile is what bucket baselines holds of a key besides the engine's state.
type profile struct {
	// sequence is that of the last message which had an event of the key.
	sequence uint64
	// row is the sequence of the last row published for analysts.
	row uint64
	// alerts are the latest of the key, oldest first, with the verdict that the
	// engine was told.
	alerts []told
}

type told struct{ id, verdict string }

// maxAlerts is how many alerts of a key a verdict can still be given on.
const maxAlerts = 8

// raised remembers an alert once.
func (p *profile) raised(id string) {
	for _, a := range p.alerts {
		if a.id == id {
			return
		}
	}
	p.alerts = append(p.alerts, told{id: id})
	if len(p.alerts) > maxAlerts {
		p.alerts = append(p.alerts[:0], p.alerts[len(p.alerts)-maxAlerts:]...)
	}
}

const profileVersion = 1

// encodeProfile is a profile and the engine's state of the key, to be packed with s2.
func encodeProfile(p *profile, state []byte) []byte {
	b := make([]byte, 0, len(state)+64)
	b = append(b, profileVersion)
	b = binary.AppendUvarint(b, p.sequence)
	b = binary.AppendUvarint(b, p.row)
	b = binary.AppendUvarint(b, uint64(len(p.alerts)))
	for _, a := range p.alerts {
		b = appendText(b, a.id)
		b = appendText(b, a.verdict)
	}
	return append(b, state...)
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

var errProfile = errors.New("decode profile: cut short or of another version")

// maxProfile bounds what a damaged length can make us allocate.
const maxProfile = 1 << 20

func decodeProfile(packed []byte) (profile, []byte, error) {
	if n, err := s2.DecodedLen(packed); err != nil || n > maxProfile {
		return profile{}, nil, errProfile
	}
	b, err := s2.Decode(nil, packed)
	if err != nil {
		return profile{}, nil, fmt.Errorf("decode profile: %w", err)
	}
	if len(b) == 0 || b[0] != profileVersion {
		return profile{}, nil, errProfile
	}
	r := reader{data: b[1:]}
	p := profile{sequence: r.number(), row: r.number()}
	for n := r.number(); n > 0 && !r.bad; n-- {
		p.alerts = append(p.alerts, told{r.text(), r.text()})
	}
	if r.bad {
		return profile{}, nil, errProfile
	}
	return p, r.data, nil
}

// reader takes numbers and texts from the front of data.
type reader struct {
	data []byte
	bad  bool
}

func (r *reader) number() uint64 {
	n, used := binary.Uvarint(r.data)
	if used <= 0 {
		r.bad, r.data = true, nil
		return 0
	}
	r.data = r.data[used:]
	return n
}

func (r *reader) bytes() []byte {
	n := r.number()
	if n > uint64(len(r.data)) {
		r.bad, r.data = true, nil
		return nil
	}
	b := r.data[:n]
	r.data = r.data[n:]
	return b
}

func (r *reader) text() string { return string(r.bytes()) }
