package anomaly

// Regions of the address space, for when no data name a country: where most
// addresses of an IPv4 /8 are used. It is coarse, but a key that never left one
// region and turns up in another is news that a prefix alone cannot tell.
//
// N North America, E Europe and the Middle East, A Asia and the Pacific, L Latin
// America, F Africa, - mixed or none. Sampled from the country data that
// Latchkey fetches (public domain), 256 addresses a /8, 70 % of them for a region.
const regions4 = "" +
	"-AENNENNNN-NNNANNNN-NNNNN-NANNNE" + // 0
	"NNNNAENANFAAN-E-NANNNENNNNAAAAEN" + // 32
	"NNNNNNNNNNNNNEEEEEEEEEEEEEEEEEEE" + // 64
	"NNNNNAFANFANNEAAAAAAAAAAAAAAAAA-" + // 96
	"NN-NNA-NNN----NN-E---------N----" + // 128
	"--N-N-NNNNNANNNAELELALAANELLELLL" + // 160
	"NEEEFFNNLLAANNNNNNAAEENNNEAAAAAA" + // 192
	"--------------------------------" // 224

const mixedRegion = '-'

// region4 is the region of an IPv4 address by its first byte.
func region4(first byte) byte { return regions4[first] }

// region6 is the registry of an IPv6 prefix by its first twelve bits (IANA IPv6
// Global Unicast Address Assignments), in the letters of regions4.
func region6(prefix uint64) byte {
	switch top := prefix >> 52; {
	case top >= 0x240 && top <= 0x24f:
		return 'A'
	case top >= 0x260 && top <= 0x26f:
		return 'N'
	case top >= 0x280 && top <= 0x28f:
		return 'L'
	case top >= 0x2a0 && top <= 0x2af, top == 0x200 && prefix>>48 == 0x2003:
		return 'E'
	case top >= 0x2c0 && top <= 0x2cf:
		return 'F'
	}
	return mixedRegion
}
