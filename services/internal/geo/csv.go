package geo

import (
	"context"
	"crypto/sha256"
	"encoding/csv"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/latchkey-dev/latchkey/services/internal/npm"
)

// readCSV reads rows of "first address, last address, AS number, name", both
// addresses inclusive, as text or as a decimal number (one below 2^32 is IPv4).
// Rows of AS 0 stand for unannounced space and are left out, a header line too.
func readCSV(ctx context.Context, r io.Reader) ([]span, error) {
	records := csv.NewReader(r)
	records.ReuseRecord = true
	records.FieldsPerRecord = -1
	records.LazyQuotes = true
	var spans []span
	names := map[uint32]string{} // one copy of a name, however many ranges its system has
	for {
		record, err := records.Read()
		if errors.Is(err, io.EOF) {
			return spans, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read CSV: %w", err)
		}
		line, _ := records.FieldPos(0)
		if line%65536 == 0 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		s, err := parseRow(record)
		if err != nil {
			if line == 1 && len(spans) == 0 && len(record) >= 3 && !startsWithDigit(record[2]) {
				continue
			}
			return nil, fmt.Errorf("read CSV, line %d: %w", line, err)
		}
		if s.asn == 0 {
			continue
		}
		if name, known := names[s.asn]; known {
			s.name = name
		} else {
			s.name = strings.Clone(s.name)
			names[s.asn] = s.name
		}
		spans = append(spans, s)
	}
}

func startsWithDigit(s string) bool {
	s = strings.TrimSpace(strings.TrimPrefix(s, "AS"))
	return s != "" && s[0] >= '0' && s[0] <= '9'
}

func parseRow(record []string) (span, error) {
	if len(record) < 3 {
		return span{}, fmt.Errorf("%d columns, want at least first, last and AS number", len(record))
	}
	first, firstV4, err := parseAddress(record[0])
	if err != nil {
		return span{}, err
	}
	last, lastV4, err := parseAddress(record[1])
	if err != nil {
		return span{}, err
	}
	if firstV4 != lastV4 || last.cmp(first) < 0 {
		return span{}, fmt.Errorf("%s to %s is no range", record[0], record[1])
	}
	asn, err := strconv.ParseUint(strings.TrimPrefix(strings.TrimSpace(record[2]), "AS"), 10, 32)
	if err != nil {
		return span{}, fmt.Errorf("AS number %q: %w", record[2], err)
	}
	s := span{first: first, last: last, v4: firstV4, asn: uint32(asn)}
	if len(record) > 3 {
		s.name = strings.TrimSpace(strings.ToValidUTF8(record[3], "�"))
	}
	return s, nil
}

func parseAddress(text string) (n u128, v4 bool, err error) {
	text = strings.TrimSpace(text)
	if strings.ContainsAny(text, ".:") {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return u128{}, false, fmt.Errorf("address %q: %w", text, err)
		}
		addr = addr.Unmap().WithZone("")
		return number(addr), addr.Is4(), nil
	}
	if text == "" {
		return u128{}, false, errors.New("address is missing")
	}
	for _, c := range []byte(text) {
		if c < '0' || c > '9' {
			return u128{}, false, fmt.Errorf("%q is neither an address nor a number", text)
		}
		over, hi := bits.Mul64(n.hi, 10)
		carry, lo := bits.Mul64(n.lo, 10)
		lo, c1 := bits.Add64(lo, uint64(c-'0'), 0)
		hi, c2 := bits.Add64(hi, carry, c1)
		if over != 0 || c2 != 0 {
			return u128{}, false, fmt.Errorf("%q is more than 128 bits", text)
		}
		n = u128{hi, lo}
	}
	return n, n.hi == 0 && n.lo < 1<<32, nil
}

// openCSV reads a user's own CSV, through a compiled copy in the cache that is
// made anew when the file changes.
func openCSV(ctx context.Context, path, cacheDir string) (*table, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	key := sha256.Sum256(fmt.Appendf(nil, "%s %d %d", abs, info.Size(), info.ModTime().UnixNano()))
	compiled, err := compiledPath(npm.Options{Config: npm.Config{CacheDir: cacheDir}})
	if err != nil {
		return nil, err
	}
	compiled = filepath.Join(filepath.Dir(compiled), "asn-csv-"+hex.EncodeToString(key[:8])+".bin")
	if t, err := readTable(compiled); err == nil {
		return t, nil
	}
	t, err := compile(ctx, path)
	if err != nil {
		return nil, err
	}
	// A cache that cannot be written costs a second at the next start, no more.
	_ = t.write(compiled)
	return t, nil
}

// compile reads CSV files into one table.
func compile(ctx context.Context, paths ...string) (*table, error) {
	var spans []span
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		part, err := readCSV(ctx, f)
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		spans = append(spans, part...)
	}
	return buildTable(spans), nil
}
