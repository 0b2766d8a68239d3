package anomaly

// Regions of the address space, for when no data name a country: which of the
// five registries an IPv4 /8 was given to (IANA IPv4 Address Space Registry). It
// is coarse and old blocks have moved, but a key that never left one region and
// turns up in another is news that a prefix alone cannot tell.
//
// N ARIN and US legacy, E RIPE, A APNIC, L LACNIC, F AFRINIC, - none of them.
const regions4 = "" +
	"-ANNNENNNN-NNNA-" + // 0
	"NNNNNNNNNEAANNNA" + // 16
	"NNNNEEA-NFA-NNEN" + // 32
	"NAANNENNNNA-AAAA" + // 48
	"NNNNNNNNNNNNNNEE" + // 64
	"EEEEEEEEEEEENNNN" + // 80
	"NNNNNAFEN EN" // 96, unused beyond: see region4

// region4 is the region of an IPv4 address by its first byte.
func region4(first byte) byte {
	switch {
	case first < 96:
		return regions4[first]
	case first <= 100, first == 104, first == 107, first == 108:
		return 'N'
	case first == 101, first == 103, first == 106, first >= 110 && first <= 126:
		return 'A'
	case first == 102, first == 105, first == 154, first == 196, first == 197:
		return 'F'
	case first == 109, first == 141, first == 145, first == 151, first == 176, first == 178, first == 185, first == 188,
		first >= 193 && first <= 195, first == 212, first == 213, first == 217:
		return 'E'
	case first == 133, first == 150, first == 153, first == 163, first == 171, first == 175, first == 180, first == 182, first == 183,
		first == 202, first == 203, first == 210, first == 211, first >= 218 && first <= 223:
		return 'A'
	case first == 177, first == 179, first == 181, first >= 186 && first <= 187, first >= 189 && first <= 191, first == 200, first == 201:
		return 'L'
	case first == 127, first >= 224:
		return '-'
	}
	return 'N'
}

// region6 is the registry of an IPv6 prefix by its first twelve bits.
func region6(prefix uint64) byte {
	switch top := prefix >> 52; {
	case top >= 0x240 && top <= 0x24f:
		return 'A'
	case top >= 0x260 && top <= 0x26f:
		return 'N'
	case top >= 0x280 && top <= 0x28f:
		return 'L'
	case top >= 0x2a0 && top <= 0x2af:
		return 'E'
	case top >= 0x2c0 && top <= 0x2cf:
		return 'F'
	}
	return '-'
}
