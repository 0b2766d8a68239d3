package geo

import (
	"bytes"
	"context"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const sample = `1.0.0.0,1.0.0.255,13335,"Cloudflare, Inc."
16778240,16779263,38803,Gtelecom Pty Ltd
203.0.112.0,203.0.113.255,64500,Example Access
2001:db8::,2001:db8:ffff:ffff:ffff:ffff:ffff:ffff,64501,Example VPS
42540488161975842760550356425300246528,42540488241204005274814694018844196863,6939,Hurricane Electric LLC
`

func sampleTable(t testing.TB) *table {
	t.Helper()
	spans, err := readCSV(t.Context(), strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	return buildTable(spans)
}

func TestTableLookup(t *testing.T) {
	t.Parallel()
	table := sampleTable(t)
	for addr, want := range map[string]Location{
		"1.0.0.0":      {ASN: 13335, ASName: "Cloudflare, Inc.", Hosting: true},
		"1.0.0.255":    {ASN: 13335, ASName: "Cloudflare, Inc.", Hosting: true},
		"1.0.1.0":      {},
		"0.255.255.1":  {},
		"1.0.7.255":    {ASN: 38803, ASName: "Gtelecom Pty Ltd"},
		"203.0.113.77": {ASN: 64500, ASName: "Example Access"},
		"203.0.114.0":  {},
		"2001:db8::1":  {ASN: 64501, ASName: "Example VPS", Hosting: true},
		"2001:db9::1":  {},
		"2001::1":      {ASN: 6939, ASName: "Hurricane Electric LLC"},
		"::1":          {},
	} {
		if got := table.lookup(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: got %+v, want %+v", addr, got, want)
		}
	}
}

func TestTableSurvivesItsFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "table.bin")
	if err := sampleTable(t).write(path); err != nil {
		t.Fatal(err)
	}
	back, err := readTable(path)
	if err != nil {
		t.Fatal(err)
	}
	want := Location{ASN: 64501, ASName: "Example VPS", Hosting: true}
	if got := back.lookup(netip.MustParseAddr("2001:db8:1::1")); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, damaged := range [][]byte{nil, data[:len(data)/2], bytes.Replace(data, []byte("VPS"), []byte("VPX"), 1)} {
		if _, err := decodeTable(damaged); err == nil {
			t.Errorf("a damaged table of %d bytes was read", len(damaged))
		}
	}
}

func TestOverlapsKeepTheFirst(t *testing.T) {
	t.Parallel()
	spans, err := readCSV(t.Context(), strings.NewReader("10,20,1,a\n15,30,2,b\n16,18,3,c\n"))
	if err != nil {
		t.Fatal(err)
	}
	table := buildTable(spans)
	for n, want := range map[byte]uint32{10: 1, 20: 1, 21: 2, 30: 2, 31: 0} {
		if got := table.lookup(netip.AddrFrom4([4]byte{3: n})).ASN; got != want {
			t.Errorf("%d: AS%d, want AS%d", n, got, want)
		}
	}
}

func TestCSVErrorsNameTheLine(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"1.0.0.0,1.0.0.255\n":                       "line 1: 2 columns",
		"1.0.0.0,1.0.0.255,13335,x\n9,banana,1,y\n": "line 2: \"banana\"",
		"5,4,1,x\n":         "line 1: 5 to 4",
		"1.0.0.0,::1,1,x\n": "is no range",
		"1,999999999999999999999999999999999999999999,1,x\n":  "more than 128 bits",
		"first,last,asn,name\n1,2,3,x\nfirst,last,asn,name\n": "line 3",
	} {
		if _, err := readCSV(t.Context(), strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want an error with %q", text, err, want)
		}
	}
}

func TestHosting(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"Hetzner Online GmbH": true, "Amazon.com, Inc.": true, "FooCloud Ltd": false, "Foo Cloud Ltd": true, "Example Data Center": true,
		"Deutsche Telekom AG": false, "Observers Telecom": false, "KPN B.V.": false, "": false,
	} {
		if got := hosting(1, name); got != want {
			t.Errorf("%q: hosting %v, want %v", name, got, want)
		}
	}
	if !hosting(8075, "") {
		t.Error("a listed number counts whatever its name")
	}
}

func TestNowhere(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"10.1.2.3", "192.168.0.1", "127.0.0.1", "::", "0.0.0.0", "fe80::1", "fd00::1", "224.0.0.1", "100.64.1.1", "::ffff:10.0.0.1"} {
		if Public(netip.MustParseAddr(s)) {
			t.Errorf("%s is no place", s)
		}
	}
	if Public(netip.Addr{}) {
		t.Error("the zero address is no place")
	}
	var l *Locator
	if got := l.Lookup(netip.MustParseAddr("8.8.8.8")); got != (Location{}) {
		t.Errorf("a nil locator knows %+v", got)
	}
}

func TestOpenWithoutData(t *testing.T) {
	t.Parallel()
	l, err := Open(t.Context(), Config{CacheDir: t.TempDir()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := l.Lookup(netip.MustParseAddr("8.8.8.8")); got != (Location{}) || len(l.Sources()) != 0 {
		t.Errorf("knows %+v from %v", got, l.Sources())
	}
	if _, err := Open(t.Context(), Config{CountryDB: "no/such.mmdb"}, nil); err == nil {
		t.Error("a named file that is missing is an error")
	}
}

func TestOpenOwnCSV(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "own.csv")
	if err := os.WriteFile(path, []byte(sample), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // compiled, then from the compiled copy
		l, err := Open(t.Context(), Config{ASNDB: path, CacheDir: dir}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Lookup(netip.MustParseAddr("203.0.113.1")).ASN; got != 64500 {
			t.Errorf("AS%d", got)
		}
	}
	compiled, _ := fs.Glob(os.DirFS(dir), "asn-csv-*.bin")
	if len(compiled) != 1 {
		t.Errorf("compiled copies: %v", compiled)
	}
}

// real opens the published data, fetched once into the user's cache.
func real(t testing.TB) *Locator {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := Fetch(ctx, Config{}, nil, nil); err != nil {
		t.Skipf("geo data cannot be fetched here: %v", err)
	}
	l, err := Open(ctx, Config{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func TestPublishedData(t *testing.T) {
	t.Parallel()
	l := real(t)
	for addr, want := range map[string]Location{
		"8.8.8.8":            {Country: "US", ASN: 15169, Hosting: true},
		"193.0.6.139":        {Country: "NL", ASN: 3333},
		"88.198.0.1":         {Country: "DE", ASN: 24940, Hosting: true},
		"2a01:4f8::1":        {Country: "DE", ASN: 24940, Hosting: true},
		"87.128.0.1":         {Country: "DE", ASN: 3320},
		"::ffff:193.0.6.139": {Country: "NL", ASN: 3333},
		"2001:67c:2e8:22::1": {Country: "NL", ASN: 3333},
		"203.0.113.7":        {}, // documentation
		"fe80::1":            {},
	} {
		got := l.Lookup(netip.MustParseAddr(addr))
		if (want.ASN != 0) != (got.ASName != "") {
			t.Errorf("%s: name %q", addr, got.ASName)
		}
		got.ASName = ""
		if got != want {
			t.Errorf("%s: got %+v, want %+v", addr, got, want)
		}
	}
}

func TestLookupAllocatesNothing(t *testing.T) { // not parallel: it counts allocations
	l := real(t)
	addr := netip.MustParseAddr("87.128.0.1")
	if n := testing.AllocsPerRun(100, func() { l.Lookup(addr) }); n != 0 {
		t.Errorf("a lookup allocates %v times", n)
	}
}

func BenchmarkLookup(b *testing.B) {
	l := real(b)
	addrs := make([]netip.Addr, 1<<16)
	seed := uint32(1)
	for i := range addrs {
		seed = seed*1664525 + 1013904223
		addrs[i] = netip.AddrFrom4([4]byte{byte(seed >> 24), byte(seed >> 16), byte(seed >> 8), byte(i)})
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		l.Lookup(addrs[i&0xffff])
	}
}

func BenchmarkOpen(b *testing.B) {
	real(b)
	for b.Loop() {
		l, err := Open(b.Context(), Config{}, nil)
		if err != nil {
			b.Fatal(err)
		}
		_ = l.Close()
	}
}

func FuzzReadCSV(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte("first,last,asn,name\n\"1\",2,AS3,\"x\ny\"\n"))
	f.Add([]byte("0,340282366920938463463374607431768211455,1,all\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		spans, err := readCSV(t.Context(), bytes.NewReader(data))
		if err != nil {
			return
		}
		table := buildTable(spans)
		for i := range table.first4 {
			if table.last4[i] < table.first4[i] || i > 0 && table.first4[i] <= table.last4[i-1] {
				t.Fatalf("range %d is out of order", i)
			}
		}
		for i := range table.first6 {
			if table.last6[i].cmp(table.first6[i]) < 0 || i > 0 && table.first6[i].cmp(table.last6[i-1]) <= 0 {
				t.Fatalf("IPv6 range %d is out of order", i)
			}
		}
		var buf bytes.Buffer
		if err := table.encode(&buf); err != nil {
			t.Fatal(err)
		}
		if _, err := decodeTable(buf.Bytes()); err != nil {
			t.Fatalf("read back: %v", err)
		}
	})
}
