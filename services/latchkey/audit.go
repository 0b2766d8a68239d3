package main

import (
	"io"
	"net/url"
	"strconv"

	"github.com/spf13/cobra"
)

func newAuditCmd() *cobra.Command {
	var a apiCommand
	filters := map[string]*string{}
	var limit int
	cmd := &cobra.Command{
		Use:     "audit",
		Short:   "Show what was changed, by whom and from where, newest first",
		Example: "  latchkey audit --key key_01…\n  latchkey audit --type api_key.revoked --output json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query := url.Values{}
			for name, value := range filters {
				if *value != "" {
					query.Set(name, *value)
				}
			}
			if limit > 0 && limit < 500 {
				query.Set("limit", strconv.Itoa(limit))
			}
			events, err := a.list(cmd.Context(), "/v1/audit", "events", query, limit)
			if err != nil {
				return err
			}
			return a.print(cmd.OutOrStdout(), object{"events": events}, func(w io.Writer) {
				a.table(w, events, "time", "type", "subject", "org_id", "actor", "actor_ip", "reason")
			})
		},
	}
	a.flags(cmd)
	f := cmd.Flags()
	filters["org_id"] = f.String("org", "", "`ID` of an organization")
	filters["key_id"] = f.String("key", "", "only what happened to the key with this `ID`")
	filters["type"] = f.String("type", "", "only changes of this `TYPE`: api_key.created, api_key.rotated, org.updated, …")
	filters["actor"] = f.String("actor", "", "only what the key with this `ID` changed")
	f.IntVar(&limit, "limit", 100, "at most `N` changes (all if 0)")
	return cmd
}
