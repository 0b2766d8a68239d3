package simulate

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"

	"github.com/latchkey-dev/latchkey/services/internal/geo"
)

// use is what a network is for.
type use int

const (
	access  use = iota // homes and offices
	mobile             // carriers
	hosting            // data centres
)

// network is one operator in one country. The prefixes are the operators' own
// as far as publicly known, so that real GeoIP data tell them apart too.
type network struct {
	country  string
	asn      uint32
	name     string
	use      use
	prefixes []netip.Prefix
}

func net(country string, asn uint32, name string, u use, prefixes ...string) network {
	n := network{country: country, asn: asn, name: name, use: u}
	for _, p := range prefixes {
		n.prefixes = append(n.prefixes, netip.MustParsePrefix(p))
	}
	return n
}

// plan is the Internet of the simulation.
var plan = []network{
	net("DE", 3320, "Deutsche Telekom AG", access, "84.128.0.0/11", "79.192.0.0/11", "2003::/20"),
	net("DE", 3209, "Vodafone GmbH", access, "88.64.0.0/13", "178.200.0.0/14", "2a02:8108::/32"),
	net("DE", 8881, "1&1 Versatel GmbH", access, //nolint:misspell // its name
		"89.244.0.0/15", "94.134.0.0/15"),
	net("DE", 6805, "Telefonica Germany GmbH", mobile, "46.114.0.0/15", "176.0.0.0/14", "2.240.0.0/13"),
	net("DE", 24940, "Hetzner Online GmbH", hosting, "78.46.0.0/15", "88.198.0.0/16", "49.12.0.0/15", "2a01:4f8::/32"),
	net("DE", 51167, "Contabo GmbH", hosting, "62.171.128.0/18", "167.86.64.0/18"),
	net("DE", 197540, "netcup GmbH", hosting, "37.120.160.0/19", "46.38.224.0/19"),
	net("FR", 3215, "Orange S.A.", access, "90.0.0.0/11", "86.192.0.0/11", "2a01:c000::/20"),
	net("FR", 12322, "Free SAS", access, "82.64.0.0/14", "88.160.0.0/12", "2a01:e00::/26"),
	net("FR", 5410, "Bouygues Telecom SA", mobile, "176.128.0.0/11", "89.80.0.0/13"),
	net("FR", 16276, "OVH SAS", hosting, "51.68.0.0/16", "54.36.0.0/16", "51.254.0.0/16", "2001:41d0::/32"),
	net("FR", 12876, "Scaleway S.a.s.", hosting, "51.15.0.0/17", "163.172.0.0/17"),
	net("NL", 1136, "KPN B.V.", access, "77.160.0.0/13", "145.132.0.0/15", "2a02:a400::/25"),
	net("NL", 33915, "Vodafone Libertel B.V.", access, "84.24.0.0/13", "213.93.0.0/16"),
	net("NL", 60781, "LeaseWeb Netherlands B.V.", hosting, "85.17.0.0/16", "95.211.0.0/16"),
	net("GB", 2856, "British Telecommunications PLC", access, "86.128.0.0/11", "81.128.0.0/12", "2a00:23c0::/26"),
	net("GB", 5607, "Sky UK Limited", access, "90.192.0.0/11", "2.216.0.0/13", "2a02:c7c::/31"),
	net("GB", 12576, "EE Limited", mobile, "31.64.0.0/13", "92.40.0.0/14"),
	net("GB", 20860, "Iomart Cloud Services Limited", hosting, "78.129.128.0/17", "87.117.192.0/18"),
	net("US", 7922, "Comcast Cable Communications, LLC", access, "73.0.0.0/10", "24.0.0.0/13", "2601::/20"),
	net("US", 701, "Verizon Business", access, "71.160.0.0/12", "108.0.0.0/11"),
	net("US", 21928, "T-Mobile USA, Inc.", mobile, "172.56.0.0/14", "208.54.0.0/17", "2607:fb90::/32"),
	net("US", 20057, "AT&T Mobility LLC", mobile, "107.64.0.0/11", "166.128.0.0/11"),
	net("US", 14618, "Amazon.com, Inc.", hosting, "3.208.0.0/12", "44.192.0.0/11", "54.144.0.0/12", "52.0.0.0/12", "34.224.0.0/12", "100.24.0.0/13"),
	net("US", 8075, "Microsoft Corporation", hosting, "20.36.0.0/14", "20.96.0.0/12", "40.64.0.0/12", "13.64.0.0/12", "52.224.0.0/13", "104.40.0.0/14", "172.168.0.0/13"),
	net("US", 14061, "DigitalOcean, LLC", hosting, "138.197.0.0/17", "159.203.0.0/17", "167.99.0.0/17"),
	net("US", 63949, "Akamai Connected Cloud", hosting, "45.33.0.0/17", "50.116.0.0/18"),
	net("IN", 55836, "Reliance Jio Infocomm Limited", mobile, "49.32.0.0/12", "157.32.0.0/12", "2409:4000::/22"),
	net("IN", 24560, "Bharti Airtel Ltd.", access, "122.160.0.0/12", "182.64.0.0/12"),
	net("BR", 18881, "TELEFONICA BRASIL S.A", access, "177.32.0.0/14", "189.32.0.0/14", "2804:431::/32"),
	net("BR", 26615, "TIM SA", mobile, "177.192.0.0/14", "191.224.0.0/13"),
	net("JP", 4713, "NTT Communications Corporation", access, "114.160.0.0/12", "153.128.0.0/11", "2400:4050::/28"),
	net("JP", 2516, "KDDI CORPORATION", mobile, "106.128.0.0/12", "111.96.0.0/13"),
	net("AU", 1221, "Telstra Limited", access, "1.120.0.0/13", "120.144.0.0/12"),
	net("PL", 5617, "Orange Polska Spolka Akcyjna", access, "83.0.0.0/11", "79.184.0.0/14"),
	net("PL", 8374, "Polkomtel Sp. z o.o.", mobile, "31.60.0.0/14", "77.112.0.0/14"),
	net("ES", 3352, "Telefonica de Espana", access, "80.24.0.0/13", "88.0.0.0/11"),
	net("IT", 3269, "Telecom Italia S.p.A.", access, "79.0.0.0/10", "87.0.0.0/12"),
	net("IT", 30722, "Vodafone Italia S.p.A.", mobile, "2.32.0.0/12", "5.88.0.0/13"),
	net("CH", 3303, "Swisscom (Schweiz) AG", access, "85.0.0.0/13", "178.192.0.0/13"),
	net("CN", 4134, "CHINANET-BACKBONE", access, "113.64.0.0/11", "59.32.0.0/12", "183.0.0.0/10"),
	net("VN", 7552, "Viettel Group", access, "171.224.0.0/12", "27.64.0.0/12", "2402:800::/32"),
	net("RU", 12389, "Rostelecom", access, "95.24.0.0/13", "178.64.0.0/13"),
	net("UA", 15895, "Kyivstar PJSC", mobile, "46.211.0.0/16", "188.163.0.0/16"),
	net("NG", 29465, "MTN NIGERIA Communication limited", mobile, "102.88.0.0/13", "105.112.0.0/12"),
	net("ID", 7713, "PT Telekomunikasi Indonesia", access, "36.64.0.0/11", "125.160.0.0/12"),
	net("TR", 9121, "Turk Telekom", access, "78.160.0.0/11", "88.224.0.0/11"),
	net("RO", 9009, "M247 Europe SRL", hosting, "37.120.192.0/18", "89.238.160.0/19"),
	net("ZA", 5713, "SAIX-NET", access, "105.224.0.0/12", "41.144.0.0/12"),
	net("JP", 9371, "SAKURA Internet Inc.", hosting, "49.212.0.0/16", "153.120.0.0/17"),
	net("AU", 38719, "Dreamscape Networks Limited", hosting, "175.107.128.0/18", "203.170.80.0/21"),
	net("ES", 42612, "DinaHosting S.L.", hosting, "82.98.128.0/18"),
	net("IT", 31034, "Aruba S.p.A.", hosting, "62.149.128.0/17", "80.211.0.0/17"),
	net("PL", 12824, "home.pl S.A.", hosting, "46.242.192.0/18", "79.96.0.0/16"),
	net("CH", 29222, "Infomaniak Network SA", hosting, "84.16.64.0/19", "128.65.192.0/19"),
	net("IN", 132420, "E2E Networks Limited", hosting, "164.52.192.0/19"),
	net("BR", 27715, "Locaweb Servicos de Internet S/A", hosting, "186.202.0.0/16", "189.126.96.0/19"),
	net("CN", 37963, "Hangzhou Alibaba Advertising Co.,Ltd.", hosting, "47.92.0.0/14", "39.96.0.0/13"),
	net("MX", 8151, "UNINET", access, "187.128.0.0/11", "201.96.0.0/11"),
}

// Locate is the geography of the simulated Internet, for tests and for
// benchmarks on machines without GeoIP data.
func Locate(a netip.Addr) geo.Location {
	a = a.Unmap()
	for i := range plan {
		for _, p := range plan[i].prefixes {
			if p.Contains(a) {
				n := &plan[i]
				return geo.Location{Country: n.country, ASN: n.asn, ASName: n.name, Hosting: n.use == hosting}
			}
		}
	}
	return geo.Location{}
}

// pick draws a network that is allowed.
func pick(r *rand.Rand, ok func(*network) bool) *network {
	var from []*network
	for i := range plan {
		if ok(&plan[i]) {
			from = append(from, &plan[i])
		}
	}
	return from[r.IntN(len(from))]
}

// address draws an address of the network, uniformly over its IPv4 or IPv6 prefixes.
func (n *network) address(r *rand.Rand, six bool) netip.Addr {
	var from []netip.Prefix
	for _, p := range n.prefixes {
		if p.Addr().Is6() == six {
			from = append(from, p)
		}
	}
	return within(r, from[r.IntN(len(from))])
}

func (n *network) hasSix() bool {
	for _, p := range n.prefixes {
		if p.Addr().Is6() {
			return true
		}
	}
	return false
}

// within draws an address of a prefix.
func within(r *rand.Rand, p netip.Prefix) netip.Addr {
	if p.Addr().Is4() {
		b := p.Addr().As4()
		v := binary.BigEndian.Uint32(b[:])
		host := r.Uint32()
		if p.Bits() > 0 {
			host &= 1<<(32-p.Bits()) - 1
		}
		binary.BigEndian.PutUint32(b[:], v|host)
		if b[3] == 0 || b[3] == 255 {
			b[3] = 7
		}
		return netip.AddrFrom4(b)
	}
	b := p.Addr().As16()
	var random [16]byte
	binary.BigEndian.PutUint64(random[:8], r.Uint64())
	binary.BigEndian.PutUint64(random[8:], r.Uint64())
	for i := p.Bits(); i < 128; i++ {
		b[i/8] |= random[i/8] & (0x80 >> (i % 8))
	}
	return netip.AddrFrom16(b)
}

// in narrows an address to a prefix of it.
func in(a netip.Addr, bits int) netip.Prefix {
	p, err := a.Prefix(bits)
	if err != nil {
		panic(err)
	}
	return p
}
