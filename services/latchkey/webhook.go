package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/spf13/cobra"
)

func newWebhookCmd() *cobra.Command {
	var a apiCommand
	cmd := &cobra.Command{Use: "webhook", Short: "Create, list, show and remove endpoints that hear of keys and alerts"}
	a.flags(cmd)
	cmd.AddCommand(newWebhookCreateCmd(&a), newWebhookListCmd(&a), newWebhookShowCmd(&a), newWebhookRotateCmd(&a), newWebhookDeleteCmd(&a))
	return cmd
}

func webhookPath(id string) string { return "/v1/webhooks/" + url.PathEscape(id) }

var webhookFields = []string{"id", "secret", "org_id", "url", "events", "description", "disabled", "disabled_reason", "created_at"}

// printWebhook makes a call that answers with an endpoint, and shows it.
func (a *apiCommand) printWebhook(cmd *cobra.Command, method, path string, in any) error {
	var out object
	if err := a.call(cmd.Context(), method, path, nil, in, &out); err != nil {
		return err
	}
	err := a.print(cmd.OutOrStdout(), out, func(w io.Writer) { a.details(w, out, webhookFields...) })
	if err == nil && out["secret"] != nil && a.format == "table" {
		fmt.Fprintln(cmd.ErrOrStderr(), "Keep the signing secret now: it cannot be shown again.")
	}
	return err
}

func newWebhookCreateCmd(a *apiCommand) *cobra.Command {
	var (
		org, address, description string
		events                    []string
	)
	cmd := &cobra.Command{
		Use:     "create --url URL [--events a,b]",
		Short:   "Add an endpoint; its signing secret (Standard Webhooks) is shown this once",
		Example: "  latchkey webhook create --org org_01… --url https://example.com/hooks --events alert.created,api_key.expiring",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in := object{"url": address}
			for field, value := range map[string]string{"org_id": org, "description": description} {
				if value != "" {
					in[field] = value
				}
			}
			if len(events) > 0 {
				in["events"] = events
			}
			return a.printWebhook(cmd, http.MethodPost, "/v1/webhooks", in)
		},
	}
	cmd.Flags().StringVar(&org, "org", "", "`ID` of the organization (that of the calling key if absent)")
	cmd.Flags().StringVar(&address, "url", "", "where to POST the events, an https `URL`")
	cmd.Flags().StringSliceVar(&events, "events", nil, "`TYPES` of events to hear, comma-separated (all if absent)")
	cmd.Flags().StringVar(&description, "description", "", "what it is for")
	_ = cmd.MarkFlagRequired("url")
	return cmd
}

func newWebhookListCmd(a *apiCommand) *cobra.Command {
	var org string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List endpoints",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query := url.Values{}
			if org != "" {
				query.Set("org_id", org)
			}
			var out struct {
				Webhooks []object `json:"webhooks"`
			}
			if err := a.call(cmd.Context(), http.MethodGet, "/v1/webhooks", query, nil, &out); err != nil {
				return err
			}
			return a.print(cmd.OutOrStdout(), out, func(w io.Writer) {
				a.table(w, out.Webhooks, "id", "org_id", "url", "events", "disabled", "disabled_reason", "created_at")
			})
		},
	}
	cmd.Flags().StringVar(&org, "org", "", "`ID` of an organization")
	return cmd
}

func newWebhookShowCmd(a *apiCommand) *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show an endpoint", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.printWebhook(cmd, http.MethodGet, webhookPath(args[0]), nil)
		},
	}
}

func newWebhookRotateCmd(a *apiCommand) *cobra.Command {
	return &cobra.Command{
		Use: "rotate-secret ID", Short: "Replace the signing secret; the old one signs along for a day", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.printWebhook(cmd, http.MethodPost, webhookPath(args[0])+"/rotate-secret", nil)
		},
	}
}

func newWebhookDeleteCmd(a *apiCommand) *cobra.Command {
	return &cobra.Command{
		Use: "delete ID", Short: "Remove an endpoint", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.call(cmd.Context(), http.MethodDelete, webhookPath(args[0]), nil, nil, nil); err != nil {
				return err
			}
			out := object{"id": args[0], "deleted": true}
			return a.print(cmd.OutOrStdout(), out, func(w io.Writer) { a.details(w, out, "id", "deleted") })
		},
	}
}
