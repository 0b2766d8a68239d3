// Package geo tells the country and the network operator of an address, from
// files on disk and without a request to anyone.
package geo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/latchkey-dev/latchkey/services/internal/npm"
)

// Location is what is known of an address; zero fields are unknown.
type Location struct {
	// Country is ISO 3166-1 alpha-2.
	Country string
	// ASN is the number of the autonomous system that announces the address.
	ASN    uint32
	ASName string
	// Hosting tells networks of servers from those of people.
	Hosting bool
}

// Config says which data to use.
type Config struct {
	// CountryDB is a MaxMind-format file with countries (GeoLite2-Country or -City,
	// DB-IP, IPinfo, …); empty uses the fetched one.
	CountryDB string `env:"GEOIP_COUNTRY_DB"`
	// ASNDB is a MaxMind-format file with autonomous systems, or a CSV of
	// "first address, last address, AS number, name"; empty uses the fetched one.
	ASNDB string `env:"GEOIP_ASN_DB"`
	// CacheDir holds what is fetched and compiled; empty is the user's cache folder.
	CacheDir string `env:"CACHE_DIR"`
	// Registry is where to fetch from without an npm client, see npm.Config.
	Registry string `env:"NPM_REGISTRY"`
}

// Locator answers [Locator.Lookup]. It is safe for concurrent use, and nil
// knows nothing of any address.
type Locator struct {
	country *maxmind
	asnFile *maxmind
	asns    *table
	sources []string
}

// Open opens whatever data there is and downloads nothing. Data that were never
// fetched are no error: the locator then knows less, and says so once to log.
// A file that the configuration names and that cannot be read is an error.
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*Locator, error) {
	l := &Locator{}
	if err := errors.Join(l.openCountry(cfg), l.openASN(ctx, cfg)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if log != nil {
		l.report(log)
	}
	return l, nil
}

// Close releases the files.
func (l *Locator) Close() error {
	if l == nil {
		return nil
	}
	return errors.Join(l.country.close(), l.asnFile.close())
}

// Sources names the data in use, for people.
func (l *Locator) Sources() []string {
	if l == nil {
		return nil
	}
	return l.sources
}

// Lookup tells what is known of an address. Private, loopback, link-local,
// multicast and unspecified addresses are nowhere.
func (l *Locator) Lookup(addr netip.Addr) Location {
	if l == nil || !Public(addr) {
		return Location{}
	}
	addr = addr.Unmap()
	var loc Location
	if l.asnFile != nil {
		loc = l.asnFile.lookup(addr)
		loc.Country = ""
	} else {
		loc = l.asns.lookup(addr)
	}
	loc.Country = l.country.lookup(addr).Country
	return loc
}

// Public reports whether an address can stand for a place on the Internet.
func Public(addr netip.Addr) bool {
	addr = addr.Unmap()
	return addr.IsValid() && addr.IsGlobalUnicast() && !addr.IsPrivate() && !shared.Contains(addr)
}

// shared is carrier-grade NAT, RFC 6598.
var shared = netip.MustParsePrefix("100.64.0.0/10")

func (l *Locator) openCountry(cfg Config) error {
	path := cfg.CountryDB
	if path == "" {
		dir, err := countryPackage.Dir(cfg.options(nil, nil, ""))
		if err != nil {
			return err
		}
		path = filepath.Join(dir, countryPackage.Files[0])
	}
	db, err := openMaxmind(path)
	if cfg.CountryDB == "" && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open country data: %w", err)
	}
	l.country = db
	l.sources = append(l.sources, "countries from "+cfg.source(cfg.CountryDB, countryPackage))
	return nil
}

func (l *Locator) openASN(ctx context.Context, cfg Config) error {
	var err error
	switch {
	case cfg.ASNDB == "":
		l.asns, err = openPackage(ctx, cfg.options(nil, nil, ""))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	case strings.HasSuffix(cfg.ASNDB, ".mmdb"):
		l.asnFile, err = openMaxmind(cfg.ASNDB)
	default:
		l.asns, err = openCSV(ctx, cfg.ASNDB, cfg.CacheDir)
	}
	if err != nil {
		return fmt.Errorf("open network data: %w", err)
	}
	l.sources = append(l.sources, "networks from "+cfg.source(cfg.ASNDB, asnPackage))
	return nil
}

func (Config) source(path string, p npm.Package) string {
	if path == "" {
		return p.Name + " " + p.Version
	}
	return path
}

func (l *Locator) report(log *slog.Logger) {
	if l.country == nil || (l.asns == nil && l.asnFile == nil) {
		log.Info("addresses are told apart by prefix only: fetch the data with `latchkey geo fetch`",
			"countries", l.country != nil, "networks", l.asns != nil || l.asnFile != nil)
		return
	}
	log.Info("geo data opened", "sources", l.sources)
}
