package apikey

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
)

// Hash is what is stored of a key and what a gateway looks up: SHA-256 of the
// whole secret, or its HMAC-SHA-256 under a pepper. A slow password hash would
// gain nothing, since the 178 random bits cannot be guessed.
type Hash [sha256.Size]byte

// Sum is the SHA-256 of a secret. It allocates nothing.
func Sum(secret string) Hash { return sha256.Sum256(bytesOf(secret)) }

// ParseHash reads the 64 hex digits that [Hash.String] writes.
func ParseHash(s string) (Hash, error) {
	var h Hash
	if len(s) != hex.EncodedLen(len(h)) {
		return h, fmt.Errorf("hash has %d characters, not %d", len(s), hex.EncodedLen(len(h)))
	}
	if _, err := hex.Decode(h[:], []byte(s)); err != nil {
		return h, fmt.Errorf("decode hash: %w", err)
	}
	return h, nil
}

// String is the hash in hex.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MinPepper is the least length of a pepper in bytes.
const MinPepper = 16

// Hasher hashes keys, with peppers or without. A pepper is a secret outside the
// store, so that a stolen store cannot even confirm a key that was found
// elsewhere. The zero value hashes with SHA-256.
//
// Peppers rotate like this: put the new one first and keep the old ones behind
// it. New keys are hashed under the first; a gateway looks a key up under each
// in turn ([Hasher.Len], [Hasher.At]); once the keys of an old pepper were
// rotated, it can go. A store begun without a pepper keeps the plain hash as the
// last resort: [NewHasher] with plain true.
type Hasher struct {
	pads  []pads
	plain bool
}

// pads are a pepper XORed with the two paddings of HMAC (RFC 2104), made once.
type pads struct{ inner, outer [sha256.BlockSize]byte }

// NewHasher returns a hasher of peppers, newest first. plain says that keys
// from before the first pepper are still about; without peppers it is implied.
func NewHasher(peppers [][]byte, plain bool) (Hasher, error) {
	h := Hasher{plain: plain}
	for i, p := range peppers {
		if len(p) < MinPepper {
			return Hasher{}, fmt.Errorf("pepper %d has %d bytes, at least %d are needed", i+1, len(p), MinPepper)
		}
		if len(p) > sha256.BlockSize {
			sum := sha256.Sum256(p)
			p = sum[:]
		}
		var pad pads
		copy(pad.inner[:], p)
		pad.outer = pad.inner
		for j := range pad.inner {
			pad.inner[j] ^= 0x36
			pad.outer[j] ^= 0x5c
		}
		h.pads = append(h.pads, pad)
	}
	return h, nil
}

// Len is under how many hashes a key may have been stored.
func (h Hasher) Len() int {
	if h.plain || len(h.pads) == 0 {
		return len(h.pads) + 1
	}
	return len(h.pads)
}

// Sum is the hash under which a new key is stored: that of the newest pepper.
func (h Hasher) Sum(secret string) Hash { return h.At(0, secret) }

// At is the i-th hash under which the key may have been stored, 0 the newest.
// It allocates nothing for secrets up to [MaxLen].
func (h Hasher) At(i int, secret string) Hash {
	if i >= len(h.pads) {
		return Sum(secret)
	}
	p := &h.pads[i]
	var stack [sha256.BlockSize + MaxLen]byte
	inner := sha256.Sum256(append(append(stack[:0], p.inner[:]...), secret...))
	var outer [sha256.BlockSize + sha256.Size]byte
	copy(outer[:], p.outer[:])
	copy(outer[sha256.BlockSize:], inner[:])
	return sha256.Sum256(outer[:])
}

// DecodePeppers reads peppers as configuration carries them: hex, one or more,
// newest first.
func DecodePeppers(texts []string) ([][]byte, error) {
	var out [][]byte
	var errs []error
	for i, t := range texts {
		p, err := hex.DecodeString(t)
		if err != nil {
			// The text is a secret: the error must not repeat it.
			errs = append(errs, fmt.Errorf("pepper %d is not in hex", i+1))
			continue
		}
		out = append(out, p)
	}
	return out, errors.Join(errs...)
}
