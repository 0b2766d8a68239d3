package geo

import "strings"

// hostingASNs are large networks of servers whose names do not tell, or that
// must be right whatever name a data set gives them. Numbers as registered; a
// cloud's office network counts as hosting too, which errs on the cautious side.
var hostingASNs = map[uint32]bool{
	16509: true, 14618: true, 8987: true, // Amazon
	15169: true, 396982: true, 19527: true, // Google
	8075: true, 8068: true, 8069: true, // Microsoft
	31898: true, 792: true, // Oracle
	36351: true,                            // IBM Cloud (SoftLayer)
	45102: true, 37963: true, 134963: true, // Alibaba
	132203: true, 45090: true, // Tencent
	136907: true, 55990: true, // Huawei Cloud
	14061: true,              // DigitalOcean
	63949: true,              // Linode, Akamai Connected Cloud
	20940: true, 16625: true, // Akamai
	13335: true, 209242: true, // Cloudflare
	54113: true,                             // Fastly
	20473: true,                             // Vultr
	24940: true, 213230: true, 212317: true, // Hetzner
	16276: true, 35540: true, // OVH
	12876: true,                            // Scaleway
	51167: true, 40021: true, 141995: true, // Contabo
	60781: true, 28753: true, 30633: true, 395954: true, 59253: true, 7203: true, // Leaseweb
	8560: true, 54548: true, // IONOS
	9009:   true,              // M247
	212238: true, 60068: true, // Datacamp, CDN77
	197540: true,               // netcup
	47583:  true,               // Hostinger
	26496:  true, 398101: true, // GoDaddy
	46606: true,              // Unified Layer
	22612: true,              // Namecheap
	36352: true,              // HostPapa, ColoCrossing
	8100:  true,              // QuadraNet
	53667: true,              // FranTech
	62904: true, 46664: true, // Eonix, VolumeDrive
	29802: true,              // HIVELOCITY
	32244: true, 53824: true, // Liquid Web
	19318: true,               // Interserver
	62240: true, 136787: true, // Clouvider, PacketHub
	202425: true, 204957: true, // IP Volume, Green Floid
	49505: true, 50340: true, // Selectel
	200350: true, 210656: true, // Yandex Cloud
	44477: true, 210644: true, // Stark Industries, Aeza
	54825:  true,              // Equinix Metal
	54290:  true,              // Hostwinds
	55286:  true,              // ServerMania
	394380: true,              // Leaseweb Dallas
	396356: true, 25820: true, // Latitude.sh, IT7
}

// hostingWords mark a network of servers where the operator's name has one of
// them as a word or, ending in "*", as the beginning of one.
var hostingWords = []string{
	"hosting*", "hoster*", "webhost*", "cloud*", "datacenter*", "datacentre*", "vps", "server", "servers", "serverel",
	"dedicated", "colo", "colocation", "colocrossing", "rackspace", "amazon*", "digitalocean*", "hetzner*", "ovh*", "linode*",
	"vultr", "choopa", "contabo", "leaseweb*", "scaleway", "hostinger", "hostwinds", "upcloud", "equinix", "packethub",
	"ionos", "netcup", "m247", "datacamp", "aeza", "selectel", "aws", "azure", "baremetal", "vpn", "proxy",
}

// hosting tells networks of servers from those of people, by number and name.
// An unknown network counts as one of people: that claims less.
func hosting(asn uint32, name string) bool {
	if hostingASNs[asn] {
		return true
	}
	lower := strings.ToLower(name)
	if strings.Contains(lower, "data center") || strings.Contains(lower, "data centre") {
		return true
	}
	for word := range strings.FieldsFuncSeq(lower, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') }) {
		for _, w := range hostingWords {
			stem, open := strings.CutSuffix(w, "*")
			if word == stem || open && strings.HasPrefix(word, stem) {
				return true
			}
		}
	}
	return false
}
