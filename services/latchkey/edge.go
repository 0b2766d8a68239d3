package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/edge"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

func newEdgeCmd() *cobra.Command {
	var addr, grpcAddr, policy string
	var proxies []string
	cmd := &cobra.Command{
		Use:   "edge",
		Short: "Run an edge: forward-auth for gateways, ext_authz for Envoy, POST /v1/usage",
		Long: `Answers gateways whether a request's key may do what it asks, from memory, and
publishes a usage event for each. Needs NATS ($LATCHKEY_NATS_URL), not ClickHouse.

Client addresses are taken from X-Forwarded-For only if the gateway is named in
--trusted-proxies, also if it runs on this machine. Set $LATCHKEY_EDGE_SPOOL to a
directory, so that events survive an outage of NATS and the end of the process.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var cfg edge.Config
			if err := run.Load(&cfg); err != nil {
				return err
			}
			if cmd.Flags().Changed("edge-addr") {
				cfg.Addr = addr
			}
			if cmd.Flags().Changed("edge-grpc-addr") {
				cfg.GRPCAddr = grpcAddr
			}
			if cmd.Flags().Changed("policy") {
				cfg.Policy = policy
			}
			if cmd.Flags().Changed("trusted-proxies") {
				cfg.TrustedProxies = proxies
			}
			return run.Service(cmd.Context(), "edge", func(ctx context.Context, deps run.Deps) (run.Runner, error) {
				return edge.New(ctx, cfg, deps)
			})
		},
	}
	cmd.Flags().StringVar(&addr, "edge-addr", "127.0.0.1:8081", "forward-auth and POST /v1/usage ($LATCHKEY_EDGE_ADDR)")
	cmd.Flags().StringVar(&grpcAddr, "edge-grpc-addr", "127.0.0.1:8082", "Envoy ext_authz, empty for none ($LATCHKEY_EDGE_GRPC_ADDR)")
	cmd.Flags().StringVar(&policy, "policy", "", "policy `FILE`, reloaded when it changes ($LATCHKEY_EDGE_POLICY)")
	cmd.Flags().StringSliceVar(&proxies, "trusted-proxies", nil, "addresses and prefixes whose X-Forwarded-For is believed ($LATCHKEY_EDGE_TRUSTED_PROXIES)")
	return cmd
}
