package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/spf13/cobra"
)

func newHealthCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "health URL",
		Short: "Ask a service whether it is ready; exit code 1 if not",
		Long: `Asks URL/-/ready and prints its answer, which names each check. For container
health checks: the image has no shell and no curl.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return checkHealth(cmd.Context(), cmd.OutOrStdout(), args[0])
		},
	}
}

func checkHealth(ctx context.Context, out io.Writer, base string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/-/ready", nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("ask %s: %w", base, err)
	}
	defer func() { _ = res.Body.Close() }()
	if _, err := io.Copy(out, io.LimitReader(res.Body, 64<<10)); err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s is not ready: %s", base, res.Status)
	}
	return nil
}
