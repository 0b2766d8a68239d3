package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/internal/store"
)

func newMigrateCmd() *cobra.Command {
	var t target
	var out output
	cmd := &cobra.Command{Use: "migrate", Short: "Bring the ClickHouse schema up to date, or show where it is"}
	t.flags(cmd)
	out.flags(cmd)
	cmd.AddCommand(
		&cobra.Command{
			Use: "up", Short: "Create the database and apply what is missing; may run twice, or at once", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return migrate(cmd.Context(), cmd.OutOrStdout(), &t, &out, (*store.Store).Migrate, "The schema was up to date.")
			},
		},
		&cobra.Command{
			Use: "status", Short: "List the steps and which were applied", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return migrate(cmd.Context(), cmd.OutOrStdout(), &t, &out, (*store.Store).Migrations, "There are no migrations.")
			},
		},
	)
	return cmd
}

func migrate(ctx context.Context, w io.Writer, t *target, out *output,
	do func(*store.Store, context.Context) ([]store.Migration, error), none string,
) error {
	if err := out.check(); err != nil {
		return err
	}
	db, err := openStore(t)
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	list, err := do(db, ctx)
	if err != nil {
		return err
	}
	if list == nil {
		list = []store.Migration{}
	}
	return out.print(w, list, func(w io.Writer) {
		if len(list) == 0 {
			fmt.Fprintln(w, none)
			return
		}
		fmt.Fprintln(w, "VERSION\tNAME\tAPPLIED")
		for _, m := range list {
			applied := "no"
			if m.Applied {
				applied = m.At.UTC().Format("2006-01-02 15:04:05")
			}
			fmt.Fprintf(w, "%d\t%s\t%s\n", m.Version, m.Name, applied)
		}
	})
}

// openStore is the configured ClickHouse, or that of a running `latchkey up`.
func openStore(t *target) (*store.Store, error) {
	url, err := t.clickhouseURL()
	if err != nil {
		return nil, err
	}
	return store.OpenConfig(store.Config{URL: url, Cluster: os.Getenv("LATCHKEY_CLICKHOUSE_CLUSTER")})
}
