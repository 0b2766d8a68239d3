package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/npm"
)

func newEngineCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "engine",
		Short: "The embedded ClickHouse that `latchkey up` runs",
	}
	cmd.AddCommand(newEngineFetchCmd(), newEngineRunCmd())
	return cmd
}

func newEngineFetchCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "fetch",
		Short: "Download the ClickHouse engine into the cache, so that the first start needs no network",
		Long: `Downloads the ClickHouse engine with the registry that npm is set up with, checks it
against the integrity pinned in this binary and prints where it lies. Does nothing if it
is there. LATCHKEY_CACHE_DIR moves the cache; LATCHKEY_NPM_REGISTRY names a registry for
machines without Node.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := engine.Fetch(cmd.Context(), npm.Options{
				Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
			})
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), path)
			return err
		},
	}
}

// newEngineRunCmd is what ps shows of the engine's process. It is started by
// engine.Start alone, which main notices before it reads any command.
func newEngineRunCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "run",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("this command is started by `latchkey up` itself")
		},
	}
}
