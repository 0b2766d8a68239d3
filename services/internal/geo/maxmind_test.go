package geo

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// mmdb writes a small MaxMind-format file, version 2.0 of the format: a tree of
// IPv6 with IPv4 under ::/96, records of 24 bits.
func mmdb(t *testing.T, records map[string]map[string]any) string {
	t.Helper()
	nodes := [][2]int{{-1, -1}} // -1 is nothing, < -1 is data -(offset+2)
	var data []byte
	for _, prefix := range slices.Sorted(maps.Keys(records)) {
		p := netip.MustParsePrefix(prefix)
		addr, bits := p.Addr().As16(), p.Bits()
		if p.Addr().Is4() {
			addr, bits = [16]byte{}, 96+p.Bits()
			v4 := p.Addr().As4()
			copy(addr[12:], v4[:])
		}
		offset := len(data)
		data = appendData(data, records[prefix])
		at := 0
		for i := range bits {
			bit := addr[i/8] >> (7 - i%8) & 1
			if i == bits-1 {
				nodes[at][bit] = -(offset + 2)
				break
			}
			if nodes[at][bit] < 0 {
				nodes = append(nodes, [2]int{-1, -1})
				nodes[at][bit] = len(nodes) - 1
			}
			at = nodes[at][bit]
		}
	}
	var file []byte
	for _, n := range nodes {
		for _, v := range n {
			if v == -1 {
				v = len(nodes)
			} else if v < -1 {
				v = len(nodes) + 16 + (-v - 2)
			}
			file = append(file, byte(v>>16), byte(v>>8), byte(v))
		}
	}
	file = append(file, make([]byte, 16)...)
	file = append(append(file, data...), "\xab\xcd\xefMaxMind.com"...)
	file = appendData(file, map[string]any{
		"node_count": uint32(len(nodes)), "record_size": uint16(24), "ip_version": uint16(6), "database_type": "Test",
		"binary_format_major_version": uint16(2), "binary_format_minor_version": uint16(0), "build_epoch": uint64(1),
	})
	path := filepath.Join(t.TempDir(), "test.mmdb")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func appendData(b []byte, v any) []byte {
	switch v := v.(type) {
	case string:
		if len(v) >= 29 { // and shorter than 285 here
			return append(append(b, 2<<5|29, byte(len(v)-29)), v...)
		}
		return append(append(b, 2<<5|byte(len(v))), v...)
	case uint16:
		return binary.BigEndian.AppendUint16(append(b, 5<<5|2), v)
	case uint32:
		return binary.BigEndian.AppendUint32(append(b, 6<<5|4), v)
	case uint64:
		return binary.BigEndian.AppendUint64(append(b, 8, 2), v)
	case map[string]any:
		b = append(b, 7<<5|byte(len(v)))
		for _, name := range slices.Sorted(maps.Keys(v)) {
			b = appendData(appendData(b, name), v[name])
		}
		return b
	}
	panic("no such type here")
}

func TestAnyMaxMindFile(t *testing.T) {
	t.Parallel()
	countries := mmdb(t, map[string]map[string]any{
		"1.0.0.0/24":    {"country": map[string]any{"iso_code": "NL", "geoname_id": uint32(7)}, "city": map[string]any{"geoname_id": uint32(9)}}, // GeoLite2, DB-IP
		"2.0.0.0/8":     {"country_code": "de"},                                                                                                  // ip-location-db
		"2001:db0::/32": {"country": "FR", "asn": "AS64500"},                                                                                     // IPinfo
		"3.0.0.0/8":     {"registered_country": map[string]any{"iso_code": "US"}},
		"4.0.0.0/8":     {"continent": "EU"},
	})
	networks := mmdb(t, map[string]map[string]any{
		"1.0.0.0/24":    {"autonomous_system_number": uint32(13335), "autonomous_system_organization": "Cloudflare"},
		"2.0.0.0/8":     {"asn": "AS3320", "as_name": "Deutsche Telekom"},
		"2001:db0::/32": {"asn": "AS64500", "name": "Example Hosting", "country": "ZZ"},
	})
	l, err := Open(t.Context(), Config{CountryDB: countries, ASNDB: networks, CacheDir: t.TempDir()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	for addr, want := range map[string]Location{
		"1.0.0.9":        {Country: "NL", ASN: 13335, ASName: "Cloudflare", Hosting: true},
		"::ffff:1.0.0.9": {Country: "NL", ASN: 13335, ASName: "Cloudflare", Hosting: true},
		"2.9.9.9":        {Country: "DE", ASN: 3320, ASName: "Deutsche Telekom"},
		"2001:db0::1":    {Country: "FR", ASN: 64500, ASName: "Example Hosting", Hosting: true},
		"3.1.1.1":        {Country: "US"},
		"4.1.1.1":        {},
		"5.1.1.1":        {},
	} {
		for range 2 { // decoded, then remembered
			if got := l.Lookup(netip.MustParseAddr(addr)); got != want {
				t.Errorf("%s: got %+v, want %+v", addr, got, want)
			}
		}
	}
	broken := filepath.Join(t.TempDir(), "broken.mmdb")
	if err := os.WriteFile(broken, []byte("no such format"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Config{CountryDB: broken}, nil); err == nil {
		t.Error("a broken file is opened without an error")
	}
}
