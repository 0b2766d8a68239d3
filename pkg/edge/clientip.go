package edge

import (
	"net/netip"
	"strings"
)

// ClientIP is the address that a request came from: peer, the other end of the
// socket, unless that is a trusted proxy. Then X-Forwarded-For (its header lines
// in order) is walked from the right, and the first address that is not a trusted
// proxy is the client. What stands left of it was written by the client and is
// not believed. An entry that is no address ends the walk at the last good one.
//
// IPv4-mapped IPv6 addresses are read as IPv4, zones and ports are left out.
func ClientIP(peer netip.Addr, forwardedFor []string, trusted []netip.Prefix) netip.Addr {
	client := fold(peer)
	for i := len(forwardedFor) - 1; i >= 0; i-- {
		rest := forwardedFor[i]
		for {
			if !contains(trusted, client) {
				return client
			}
			entry := rest
			comma := strings.LastIndexByte(rest, ',')
			if comma >= 0 {
				entry, rest = rest[comma+1:], rest[:comma]
			}
			addr, ok := parseHop(strings.TrimSpace(entry))
			if !ok {
				return client
			}
			client = addr
			if comma < 0 {
				break
			}
		}
	}
	return client
}

func contains(prefixes []netip.Prefix, ip netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(ip) {
			return true
		}
	}
	return false
}

func fold(ip netip.Addr) netip.Addr { return ip.Unmap().WithZone("") }

// parseHop reads "203.0.113.7", "203.0.113.7:1234", "2001:db8::1" and "[2001:db8::1]:1234".
func parseHop(s string) (netip.Addr, bool) {
	if s == "" {
		return netip.Addr{}, false
	}
	if s[0] == '[' || (strings.Count(s, ":") == 1) {
		ap, err := netip.ParseAddrPort(s)
		if err == nil {
			return fold(ap.Addr()), true
		}
		if s[0] != '[' || s[len(s)-1] != ']' {
			return netip.Addr{}, false
		}
		s = s[1 : len(s)-1]
	}
	ip, err := netip.ParseAddr(s)
	return fold(ip), err == nil
}

// ParseProxies reads a list of trusted proxies: addresses and prefixes.
func ParseProxies(list []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range list {
		s = strings.TrimSpace(s)
		if s == "" {
			continue
		}
		if ip, err := netip.ParseAddr(s); err == nil {
			ip = fold(ip)
			out = append(out, netip.PrefixFrom(ip, ip.BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, err
		}
		out = append(out, foldPrefix(p))
	}
	return out, nil
}
