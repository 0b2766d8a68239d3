package geo

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sort"
)

// u128 is an address as a number; IPv4 addresses have hi = 0.
type u128 struct{ hi, lo uint64 }

func (a u128) cmp(b u128) int {
	if c := cmp.Compare(a.hi, b.hi); c != 0 {
		return c
	}
	return cmp.Compare(a.lo, b.lo)
}

func (a u128) next() u128 {
	lo, carry := bits.Add64(a.lo, 1, 0)
	return u128{a.hi + carry, lo}
}

// span is one row of the source: an inclusive range of addresses of one system.
type span struct {
	first, last u128
	v4          bool
	asn         uint32
	name        string
}

// system is an autonomous system.
type system struct {
	asn     uint32
	name    string
	hosting bool
}

// table is sorted, disjoint ranges in flat arrays: about 12 bytes for a range of
// IPv4, 36 for one of IPv6.
type table struct {
	first4, last4, of4 []uint32
	first6, last6      []u128
	of6                []uint32
	systems            []system
	// by16 is where the ranges of each IPv4 /16 begin in first4.
	by16 []uint32
}

// buildTable sorts the spans. Where two overlap, the one that begins first keeps
// its addresses.
func buildTable(spans []span) *table {
	slices.SortStableFunc(spans, func(a, b span) int {
		if a.v4 != b.v4 {
			if a.v4 {
				return -1
			}
			return 1
		}
		return a.first.cmp(b.first)
	})
	t := &table{}
	index := map[uint32]uint32{}
	var previous *span
	for i := range spans {
		s := &spans[i]
		if previous != nil && previous.v4 == s.v4 && s.first.cmp(previous.last) <= 0 {
			if s.last.cmp(previous.last) <= 0 {
				continue
			}
			s.first = previous.last.next()
		}
		previous = s
		at, known := index[s.asn]
		if !known {
			at = uint32(len(t.systems))
			index[s.asn] = at
			t.systems = append(t.systems, system{s.asn, s.name, hosting(s.asn, s.name)})
		}
		if s.v4 {
			t.first4, t.last4, t.of4 = append(t.first4, uint32(s.first.lo)), append(t.last4, uint32(s.last.lo)), append(t.of4, at)
		} else {
			t.first6, t.last6, t.of6 = append(t.first6, s.first), append(t.last6, s.last), append(t.of6, at)
		}
	}
	t.index()
	return t
}

func (t *table) index() {
	t.by16 = make([]uint32, 1<<16+1)
	at := 0
	for hi := range t.by16 {
		for at < len(t.first4) && int(t.first4[at]>>16) < hi {
			at++
		}
		t.by16[hi] = uint32(at)
	}
}

func (t *table) lookup(addr netip.Addr) Location {
	if t == nil {
		return Location{}
	}
	find := t.find6
	if addr.Is4() {
		find = t.find4
	}
	at, found := find(addr)
	if !found {
		return Location{}
	}
	s := &t.systems[at]
	return Location{ASN: s.asn, ASName: s.name, Hosting: s.hosting}
}

func (t *table) find4(addr netip.Addr) (uint32, bool) {
	b := addr.As4()
	n := binary.BigEndian.Uint32(b[:])
	lo, hi := t.by16[n>>16], t.by16[n>>16+1]
	for lo < hi {
		if mid := (lo + hi) / 2; t.first4[mid] <= n {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 || t.last4[lo-1] < n {
		return 0, false
	}
	return t.of4[lo-1], true
}

func (t *table) find6(addr netip.Addr) (uint32, bool) {
	n := number(addr)
	i := sort.Search(len(t.first6), func(i int) bool { return t.first6[i].cmp(n) > 0 })
	if i == 0 || t.last6[i-1].cmp(n) < 0 {
		return 0, false
	}
	return t.of6[i-1], true
}

func number(addr netip.Addr) u128 {
	if addr.Is4() {
		b := addr.As4()
		return u128{0, uint64(binary.BigEndian.Uint32(b[:]))}
	}
	b := addr.As16()
	return u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

// The file: magic, four counts (IPv4 ranges, IPv6 ranges, systems, bytes of
// names), the arrays in the order of the struct, CRC-32 of all before; little-endian.
// The last byte of the magic is raised with the format and with hosting's rules,
// whose answer is stored.
const magic = "LKASN\x00\x00\x01"

// hostingBit marks a system in the word that holds the length of its name.
const hostingBit = 1 << 31

const headerSize = len(magic) + 4*4

// write stores the table under path in one step, so that a reader never sees a part.
func (t *table) write(path string) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make cache folder: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("create table: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	if err := t.encode(f); err != nil {
		return fmt.Errorf("write table: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("write table: %w", err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("keep table: %w", err)
	}
	return nil
}

func (t *table) encode(w io.Writer) error {
	sum := crc32.NewIEEE()
	out := bufio.NewWriterSize(io.MultiWriter(w, sum), 1<<20)
	names := 0
	for _, s := range t.systems {
		names += len(s.name)
	}
	buf := append([]byte(magic), make([]byte, 0, 16)...)
	for _, n := range []int{len(t.first4), len(t.first6), len(t.systems), names} {
		buf = binary.LittleEndian.AppendUint32(buf, uint32(n))
	}
	_, _ = out.Write(buf) // a bufio.Writer reports its first error at Flush
	put := func(n uint32) { _, _ = out.Write(binary.LittleEndian.AppendUint32(buf[:0], n)) }
	put6 := func(n u128) {
		_, _ = out.Write(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(buf[:0], n.hi), n.lo))
	}
	for _, list := range [][]uint32{t.first4, t.last4, t.of4} {
		for _, n := range list {
			put(n)
		}
	}
	for _, list := range [][]u128{t.first6, t.last6} {
		for _, n := range list {
			put6(n)
		}
	}
	for _, n := range t.of6 {
		put(n)
	}
	for _, s := range t.systems {
		length := uint32(len(s.name))
		if s.hosting {
			length |= hostingBit
		}
		put(s.asn)
		put(length)
	}
	for _, s := range t.systems {
		_, _ = out.WriteString(s.name)
	}
	if err := out.Flush(); err != nil {
		return err
	}
	_, err := w.Write(binary.LittleEndian.AppendUint32(nil, sum.Sum32()))
	return err
}

// readTable reads what write wrote.
func readTable(path string) (*table, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read table: %w", err)
	}
	t, err := decodeTable(data)
	if err != nil {
		return nil, fmt.Errorf("read table %s: %w", path, err)
	}
	return t, nil
}

func decodeTable(data []byte) (*table, error) {
	if len(data) < headerSize+4 || string(data[:len(magic)]) != magic {
		return nil, errors.New("not a table of networks")
	}
	body, sum := data[:len(data)-4], binary.LittleEndian.Uint32(data[len(data)-4:])
	if crc32.ChecksumIEEE(body) != sum {
		return nil, errors.New("damaged: checksum differs")
	}
	count := func(i int) int { return int(binary.LittleEndian.Uint32(body[len(magic)+4*i:])) }
	n4, n6, systems, names := count(0), count(1), count(2), count(3)
	if len(body) != headerSize+12*n4+36*n6+8*systems+names {
		return nil, errors.New("damaged: length differs")
	}
	rest := body[headerSize:]
	t := &table{}
	for _, list := range []*[]uint32{&t.first4, &t.last4, &t.of4} {
		*list, rest = take32(rest, n4)
	}
	t.first6, rest = take128(rest, n6)
	t.last6, rest = take128(rest, n6)
	t.of6, rest = take32(rest, n6)
	pairs, rest := take32(rest, 2*systems)
	all := string(rest)
	t.systems = make([]system, systems)
	for i := range t.systems {
		length := int(pairs[2*i+1] &^ hostingBit)
		if length > len(all) {
			return nil, errors.New("damaged: names are cut off")
		}
		t.systems[i] = system{pairs[2*i], all[:length], pairs[2*i+1]&hostingBit != 0}
		all = all[length:]
	}
	if outside(t.of4, systems) || outside(t.of6, systems) {
		return nil, errors.New("damaged: a range names no system")
	}
	t.index()
	return t, nil
}

func outside(list []uint32, n int) bool {
	return slices.ContainsFunc(list, func(i uint32) bool { return int(i) >= n })
}

func take32(data []byte, n int) ([]uint32, []byte) {
	list := make([]uint32, n)
	for i := range list {
		list[i] = binary.LittleEndian.Uint32(data[4*i:])
	}
	return list, data[4*n:]
}

func take128(data []byte, n int) ([]u128, []byte) {
	list := make([]u128, n)
	for i := range list {
		list[i] = u128{binary.LittleEndian.Uint64(data[16*i:]), binary.LittleEndian.Uint64(data[16*i+8:])}
	}
	return list, data[16*n:]
}
