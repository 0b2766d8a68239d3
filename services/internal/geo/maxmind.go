package geo

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"github.com/oschwald/maxminddb-golang/v2"
)

// maxmind reads any MaxMind-format file that holds countries or autonomous
// systems. A file has few distinct records, so each is decoded once and found
// again by its offset.
type maxmind struct {
	db      *maxminddb.Reader
	mu      sync.RWMutex
	records map[uintptr]Location
}

func openMaxmind(path string) (*maxmind, error) {
	db, err := maxminddb.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return &maxmind{db: db, records: map[uintptr]Location{}}, nil
}

func (m *maxmind) close() error {
	if m == nil {
		return nil
	}
	return m.db.Close()
}

func (m *maxmind) lookup(addr netip.Addr) Location {
	if m == nil || (addr.Is6() && m.db.Metadata.IPVersion == 4) {
		return Location{}
	}
	r := m.db.Lookup(addr)
	if !r.Found() {
		return Location{}
	}
	offset := r.Offset()
	m.mu.RLock()
	loc, known := m.records[offset]
	m.mu.RUnlock()
	if known {
		return loc
	}
	loc = decode(r)
	m.mu.Lock()
	m.records[offset] = loc
	m.mu.Unlock()
	return loc
}

// decode tries the names that MaxMind and DB-IP, IPinfo and ip-location-db use.
func decode(r maxminddb.Result) Location {
	var loc Location
	for _, path := range [][]any{{"country", "iso_code"}, {"country_code"}, {"country"}, {"registered_country", "iso_code"}} {
		if s := decodeString(r, path...); len(s) == 2 {
			loc.Country = strings.ToUpper(s)
			break
		}
	}
	var number uint32
	if err := r.DecodePath(&number, "autonomous_system_number"); err == nil && number != 0 {
		loc.ASN = number
	} else if n, err := strconv.ParseUint(strings.TrimPrefix(decodeString(r, "asn"), "AS"), 10, 32); err == nil {
		loc.ASN = uint32(n)
	}
	for _, field := range []string{"autonomous_system_organization", "as_name", "name"} {
		if loc.ASName = decodeString(r, field); loc.ASName != "" {
			break
		}
	}
	loc.Hosting = hosting(loc.ASN, loc.ASName)
	return loc
}

// decodeString is empty where the file has something else under the path.
func decodeString(r maxminddb.Result, path ...any) string {
	var s string
	if err := r.DecodePath(&s, path...); err != nil {
		return ""
	}
	return s
}
