// Package apikey is the form of a key and of the scopes it holds.
//
// A key reads
//
//	lk_live_4fGhJ2…30 characters…Xy0A1b2C
//	│  │    │                      └ checksum: CRC-32 (IEEE) of the random part, 6 base62 digits
//	│  │    └ random part: 30 base62 digits, 178 bits from crypto/rand
//	│  └ environment: live, test, or a name of one's own
//	└ prefix, the product's or one's own
//
// The checksum lets a gateway refuse a mistyped or made-up key without asking
// anybody, and lets a secret scanner tell keys from look-alikes offline. It is
// computed as GitHub computes that of its tokens: over the random part alone,
// with the digits 0–9, A–Z, a–z, most significant first, padded with 0. Secret
// scanners find keys by [Pattern].
package apikey

import (
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"unsafe"
)

// Lengths in characters.
const (
	// RandomLen is the length of the random part.
	RandomLen = 30
	// ChecksumLen is the length of the checksum.
	ChecksumLen = 6
	// MaxNameLen is the most that a prefix or an environment may have.
	MaxNameLen = 16
	// MaxLen is the most that a whole key can have.
	MaxLen = 2*(MaxNameLen+1) + RandomLen + ChecksumLen
	// ShownLen is how much of the random part a masked key shows.
	ShownLen = 4
)

// DefaultPrefix begins every key unless a [Format] says otherwise.
const DefaultPrefix = "lk"

// Pattern is the one regular expression (RE2, also valid in PCRE) that finds
// keys with the default prefix in text. A match is a key only if [Parse]
// accepts it: the checksum leaves one look-alike in four thousand million.
const Pattern = `\blk_[a-z][a-z0-9]{0,15}_[0-9A-Za-z]{36}\b`

// Environments by convention. Any name of [a-z][a-z0-9]*, up to [MaxNameLen], will do.
const (
	Live = "live"
	Test = "test"
)

// Reasons for which [Parse] refuses a text.
var (
	// ErrMalformed says that the text does not have the form of a key.
	ErrMalformed = errors.New("not of the form of a key")
	// ErrChecksum says that the text has the form but was mistyped, cut or made up.
	ErrChecksum = errors.New("checksum of the key does not match")
)

// Key is a text that has the form of a key and the right checksum. Whether it
// was ever issued is another question. Print it through [Key.Masked].
type Key struct {
	secret string
	random int // where the random part begins
	env    int // where the environment begins
}

// Secret is the whole key, as the client sends it.
func (k Key) Secret() string { return k.secret }

// Environment is the name between the prefix and the random part.
func (k Key) Environment() string {
	if k.random == 0 {
		return ""
	}
	return k.secret[k.env : k.random-1]
}

// Masked is what may be shown, logged and mailed: "lk_live_4fGh".
func (k Key) Masked() string {
	if k.random == 0 {
		return ""
	}
	return k.secret[:k.random+ShownLen]
}

// String is [Key.Masked], so that a key printed by mistake stays a secret.
func (k Key) String() string { return k.Masked() }

// GoString is [Key.Masked] too, for %#v.
func (k Key) GoString() string { return "apikey.Key(" + k.Masked() + ")" }

// Format makes and reads the keys of one prefix. The zero value has [DefaultPrefix].
type Format struct{ prefix string }

// NewFormat returns the format of a prefix: [a-z][a-z0-9]*, up to [MaxNameLen].
func NewFormat(prefix string) (Format, error) {
	if err := checkName(prefix); err != nil {
		return Format{}, fmt.Errorf("prefix %w", err)
	}
	return Format{prefix: prefix}, nil
}

// Prefix is the text before the first underscore.
func (f Format) Prefix() string {
	if f.prefix == "" {
		return DefaultPrefix
	}
	return f.prefix
}

// Pattern is [Pattern] for this prefix.
func (f Format) Pattern() string {
	return strings.Replace(Pattern, DefaultPrefix, f.Prefix(), 1)
}

// Generate makes a new key for an environment. The error is about the
// environment's name: crypto/rand does not fail.
func (f Format) Generate(environment string) (Key, error) {
	if err := checkName(environment); err != nil {
		return Key{}, fmt.Errorf("environment %w", err)
	}
	prefix := f.Prefix()
	b := make([]byte, 0, MaxLen)
	b = append(b, prefix...)
	b = append(b, '_')
	b = append(b, environment...)
	b = append(b, '_')
	random := len(b)
	b = appendRandom(b, RandomLen)
	b = appendChecksum(b, crc32.ChecksumIEEE(b[random:]))
	return Key{secret: string(b), random: random, env: len(prefix) + 1}, nil
}

// Parse reads a key. It allocates nothing; the key shares the text's memory.
// The error is [ErrMalformed] or [ErrChecksum].
func (f Format) Parse(s string) (Key, error) {
	const tail = RandomLen + ChecksumLen
	prefix := f.Prefix()
	env := len(prefix) + 1
	random := len(s) - tail
	// At least one letter of environment and its underscore lie between.
	if random < env+2 || random > env+MaxNameLen+1 || s[:env-1] != prefix || s[env-1] != '_' || s[random-1] != '_' {
		return Key{}, ErrMalformed
	}
	if !validName(s[env : random-1]) {
		return Key{}, ErrMalformed
	}
	for i := random; i < len(s); i++ {
		if digitOf[s[i]] == noDigit {
			return Key{}, ErrMalformed
		}
	}
	var sum uint64
	for i := random + RandomLen; i < len(s); i++ {
		sum = sum*62 + uint64(digitOf[s[i]])
	}
	if sum != uint64(crc32.ChecksumIEEE(bytesOf(s[random:random+RandomLen]))) {
		return Key{}, ErrChecksum
	}
	return Key{secret: s, random: random, env: env}, nil
}

// HasChecksum reports whether s ends in the right checksum, whatever its prefix.
// It is less than [Parse] and costs a third: a gateway that goes on to look the
// key's hash up needs no more, for what it finds was made with the right form.
func HasChecksum(s string) bool {
	const tail = RandomLen + ChecksumLen
	if len(s) < tail || len(s) > MaxLen {
		return false
	}
	s = s[len(s)-tail:]
	var sum uint64
	for i := RandomLen; i < tail; i++ {
		d := digitOf[s[i]]
		if d == noDigit {
			return false
		}
		sum = sum*62 + uint64(d)
	}
	return sum == uint64(crc32.ChecksumIEEE(bytesOf(s[:RandomLen])))
}

// Generate makes a new key with the default prefix.
func Generate(environment string) (Key, error) { return Format{}.Generate(environment) }

// Parse reads a key with the default prefix; see [Format.Parse].
func Parse(s string) (Key, error) { return Format{}.Parse(s) }

const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

const noDigit = 0xFF

// digitOf is the value of a base62 digit, noDigit for any other byte.
var digitOf = func() (t [256]byte) {
	for i := range t {
		t[i] = noDigit
	}
	for i := range len(digits) {
		t[digits[i]] = byte(i)
	}
	return t
}()

// appendRandom appends n random base62 digits. Bytes from 248 on are thrown
// away, because 256 is no multiple of 62 and the first digits would be favoured.
func appendRandom(b []byte, n int) []byte {
	var pool [64]byte
	for n > 0 {
		rand.Read(pool[:])
		for _, c := range pool {
			if c < 248 && n > 0 {
				b = append(b, digits[c%62])
				n--
			}
		}
	}
	return b
}

func appendChecksum(b []byte, sum uint32) []byte {
	var out [ChecksumLen]byte
	for i := ChecksumLen - 1; i >= 0; i-- {
		out[i] = digits[sum%62]
		sum /= 62
	}
	return append(b, out[:]...)
}

func validName(s string) bool {
	if s == "" || len(s) > MaxNameLen || s[0] < 'a' || s[0] > 'z' {
		return false
	}
	for i := 1; i < len(s); i++ {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

func checkName(s string) error {
	if !validName(s) {
		return fmt.Errorf("%q must be 1 to %d of a–z and 0–9, beginning with a letter", s, MaxNameLen)
	}
	return nil
}

// bytesOf is the bytes of s without a copy: crc32 calls through a variable, so
// the compiler would put a copy on the heap. Nobody writes to them.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }
