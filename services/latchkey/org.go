package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/spf13/cobra"
)

func newOrgCmd() *cobra.Command {
	var a apiCommand
	cmd := &cobra.Command{Use: "org", Short: "Create, list, show and update organizations"}
	a.flags(cmd)
	cmd.AddCommand(newOrgCreateCmd(&a), newOrgListCmd(&a), newOrgShowCmd(&a), newOrgUpdateCmd(&a))
	return cmd
}

func newOrgCreateCmd(a *apiCommand) *cobra.Command {
	var (
		id, name, email string
		policy          policyFlags
	)
	cmd := &cobra.Command{
		Use:     "create --name NAME --owner-email ADDRESS",
		Short:   "Create an organization",
		Example: "  latchkey org create --name Acme --owner-email owner@acme.example",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in := object{"name": name, "owner_email": email}
			if id != "" {
				in["id"] = id
			}
			policy.put(cmd, in)
			var out object
			if err := a.call(cmd.Context(), http.MethodPost, "/v1/orgs", nil, in, &out); err != nil {
				return err
			}
			return a.print(cmd.OutOrStdout(), out, func(w io.Writer) { a.details(w, out, "id", "name", "owner_email") })
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "its `NAME`")
	cmd.Flags().StringVar(&email, "owner-email", "", "the `ADDRESS` that alerts and notices go to")
	cmd.Flags().StringVar(&id, "id", "", "an `ID` of your own (made up if absent)")
	policy.flags(cmd)
	_ = cmd.MarkFlagRequired("name")
	_ = cmd.MarkFlagRequired("owner-email")
	return cmd
}

func newOrgUpdateCmd(a *apiCommand) *cobra.Command {
	var (
		name, email string
		policy      policyFlags
	)
	cmd := &cobra.Command{
		Use:     "update ID",
		Short:   "Change an organization and the policy of its keys",
		Example: "  latchkey org update org_01… --rotation-days 30 --auto-rotate --on-compromise suspend:critical",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := object{}
			if cmd.Flags().Changed("name") {
				in["name"] = name
			}
			if cmd.Flags().Changed("owner-email") {
				in["owner_email"] = email
			}
			policy.put(cmd, in)
			return a.printOrg(cmd, http.MethodPatch, args[0], in)
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "its new `NAME`")
	cmd.Flags().StringVar(&email, "owner-email", "", "the new `ADDRESS` that alerts and notices go to")
	policy.flags(cmd)
	return cmd
}

func newOrgListCmd(a *apiCommand) *cobra.Command {
	var search string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List organizations",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query := url.Values{}
			if search != "" {
				query.Set("q", search)
			}
			orgs, err := a.list(cmd.Context(), "/v1/orgs", "orgs", query, 0)
			if err != nil {
				return err
			}
			return a.print(cmd.OutOrStdout(), object{"orgs": orgs}, func(w io.Writer) {
				a.table(w, orgs, "id", "name", "owner_email", "created_at")
			})
		},
	}
	cmd.Flags().StringVarP(&search, "query", "q", "", "only those with `TEXT` in name, id or address")
	return cmd
}

func newOrgShowCmd(a *apiCommand) *cobra.Command {
	return &cobra.Command{
		Use:   "show ID",
		Short: "Show an organization and its policy",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.printOrg(cmd, http.MethodGet, args[0], nil)
		},
	}
}

// printOrg makes a call that answers with an organization, and shows it.
func (a *apiCommand) printOrg(cmd *cobra.Command, method, id string, in any) error {
	var out object
	if err := a.call(cmd.Context(), method, "/v1/orgs/"+url.PathEscape(id), nil, in, &out); err != nil {
		return err
	}
	return a.print(cmd.OutOrStdout(), out, func(w io.Writer) {
		a.details(w, out, "id", "name", "owner_email", "created_at")
		a.policyDetails(w, out)
	})
}

// policyDetails prints the policy of a key or an organization.
func (a *apiCommand) policyDetails(w io.Writer, out object) {
	a.details(w, out, "rotation_days", "auto_rotate", "rotation_grace", "unused_days", "alert_budget")
	if r, ok := out["on_compromise"].(map[string]any); ok {
		fmt.Fprintf(w, "on compromise\t%v from severity %v\n", r["action"], r["severity"])
	}
}
