// Command latchkey is all of Latchkey in one binary: one service, or everything
// in one place with `latchkey up`.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
)

// version is set by the linker in a release build.
var version = "dev"

func main() {
	if engine.IsChild() {
		os.Exit(engine.ChildMain())
	}
	os.Exit(execute())
}

func execute() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := newRootCmd().ExecuteContext(ctx); err != nil {
		var exit exitError
		if errors.As(err, &exit) {
			return exit.code
		}
		fmt.Fprintln(os.Stderr, "latchkey:", err)
		return 1
	}
	return 0
}

// exitError ends the process with a code after the command has said why itself.
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

func newRootCmd() *cobra.Command {
	root := &cobra.Command{
		Use:           "latchkey",
		Short:         "Scopes, rotation and anomaly alerts for API keys",
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(
		newUpCmd(),
		newBenchCmd(),
		newCollectorCmd(),
		newDeadCmd(),
		newMigrateCmd(),
		newQueryCmd(),
		newStatusCmd(),
		newConsoleCmd(),
		newEdgeCmd(),
		newBacktestCmd(),
		newDetectorCmd(),
		newEngineCmd(),
		newGeoCmd(),
		newHealthCmd(),
		newKeysCmd(), newOrgCmd(), newKeyCmd(), newAlertCmd(), newAuditCmd(), newWebhookCmd(),
		newImportCmd(),
		newNotifierCmd(),
		newSimulateCmd(),
	)
	return root
}
