package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

func newAlertCmd() *cobra.Command {
	var a apiCommand
	cmd := &cobra.Command{Use: "alert", Short: "List, show and acknowledge alerts"}
	a.flags(cmd)
	cmd.AddCommand(newAlertListCmd(&a), newAlertShowCmd(&a), newAlertVerdictCmd(&a))
	return cmd
}

func newAlertListCmd(a *apiCommand) *cobra.Command {
	var org, key string
	var limit int
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List alerts, newest first",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query := url.Values{}
			if org != "" {
				query.Set("org_id", org)
			}
			if key != "" {
				query.Set("key_id", key)
			}
			if limit > 0 && limit < 1000 {
				query.Set("limit", strconv.Itoa(limit))
			}
			alerts, err := a.list(cmd.Context(), "/v1/alerts", "alerts", query, limit)
			if err != nil {
				return err
			}
			return a.print(cmd.OutOrStdout(), object{"alerts": alerts}, func(w io.Writer) {
				a.table(w, alerts, "id", "time", "severity", "key_id", "source_ip", "country", "triggers", "summary")
			})
		},
	}
	cmd.Flags().StringVar(&org, "org", "", "`ID` of an organization")
	cmd.Flags().StringVar(&key, "key", "", "`ID` of a key")
	cmd.Flags().IntVar(&limit, "limit", 0, "at most `N` alerts (all if 0)")
	return cmd
}

func newAlertShowCmd(a *apiCommand) *cobra.Command {
	return &cobra.Command{
		Use:   "show ID",
		Short: "Show an alert with its evidence",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var out object
			if err := a.call(cmd.Context(), http.MethodGet, "/v1/alerts/"+url.PathEscape(args[0]), nil, nil, &out); err != nil {
				return err
			}
			return a.print(cmd.OutOrStdout(), out, func(w io.Writer) {
				a.details(w, out, "id", "time", "detected_at", "org_id", "key_id", "severity", "score", "summary", "source_ip", "country", "asn", "as_name",
					"user_agent", "method", "route", "triggers", "verdict")
				evidence, _ := out["evidence"].([]any)
				for _, e := range evidence {
					if m, ok := e.(map[string]any); ok {
						o := object(m)
						fmt.Fprintf(w, "%s\t%s\n\tusual: %s\n", o.text("trigger"), o.text("observed"), o.text("usual"))
					}
				}
			})
		},
	}
}

var verdicts = []string{"expected", "compromised", "planned"}

func newAlertVerdictCmd(a *apiCommand) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "acknowledge ID [expected|compromised|planned]",
		Aliases: []string{"verdict", "ack"},
		Short:   "Say what an alert was (expected, if you say no more): it teaches the key's baseline",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			args = append(args, verdicts[0])
			if !slices.Contains(verdicts, args[1]) {
				return fmt.Errorf("verdict %q is none of %s", args[1], strings.Join(verdicts, ", "))
			}
			var out object
			if err := a.call(cmd.Context(), http.MethodPost, "/v1/alerts/"+url.PathEscape(args[0])+"/verdict", nil, object{"verdict": args[1]}, &out); err != nil {
				return err
			}
			if out == nil {
				out = object{"id": args[0], "verdict": args[1]}
			}
			return a.print(cmd.OutOrStdout(), out, func(w io.Writer) {
				a.details(w, out, "id", "alert_id", "verdict", "actor", "time", "expires_at")
			})
		},
	}
	return cmd
}
