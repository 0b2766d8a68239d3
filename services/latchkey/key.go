package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func newKeyCmd() *cobra.Command {
	var a apiCommand
	cmd := &cobra.Command{Use: "key", Short: "Create, list, show, update, rotate, revoke and suspend keys; hygiene report"}
	a.flags(cmd)
	cmd.AddCommand(
		newKeyCreateCmd(&a), newKeyListCmd(&a), newKeyShowCmd(&a), newKeyUpdateCmd(&a), newKeyRotateCmd(&a),
		newKeyClaimCmd(&a), newKeyRevokeCmd(&a), newKeySuspendCmd(&a), newKeyResumeCmd(&a), newKeyHygieneCmd(&a),
	)
	return cmd
}

// keyPath is the path of a key and of what is done to it.
func keyPath(id string, action ...string) string {
	return "/v1/api-keys/" + strings.Join(append([]string{url.PathEscape(id)}, action...), "/")
}

// printNewKey shows a secret, the only time that it can be shown.
func (a *apiCommand) printNewKey(cmd *cobra.Command, out object) error {
	err := a.print(cmd.OutOrStdout(), out, func(w io.Writer) {
		a.details(w, out, "id", "key", "org_id", "name", "scopes", "expires_at", "parent_key_id")
		if p, ok := out["previous"].(map[string]any); ok {
			o := object(p)
			fmt.Fprintf(w, "old key\t%s, %s, until %s\n", o.text("id"), o.text("status"), o.text("valid_until"))
		}
	})
	if err == nil && a.format == "table" {
		fmt.Fprintln(cmd.ErrOrStderr(), "Keep the key now: it is not stored and cannot be shown again.")
	}
	return err
}

func newKeyCreateCmd(a *apiCommand) *cobra.Command {
	var (
		org, name, environment, description, owner, expires string
		scopes, tags, cidrs                                 []string
		policy                                              policyFlags
	)
	cmd := &cobra.Command{
		Use:     "create --org ID --name NAME --scopes a:b,c:d",
		Short:   "Create a key; its secret is shown this once",
		Example: "  latchkey key create --org org_01… --name billing --scopes telemetry:write,commands:read --expires 90d",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in := object{"name": name, "scopes": scopes}
			for field, value := range map[string]string{"org_id": org, "environment": environment, "description": description, "owner": owner} {
				if value != "" {
					in[field] = value
				}
			}
			if expires != "" {
				at, err := parseExpiry(expires, time.Now())
				if err != nil {
					return err
				}
				in["expires_at"] = at
			}
			if len(tags) > 0 {
				in["tags"] = tags
			}
			if len(cidrs) > 0 {
				in["allowed_cidrs"] = cidrs
			}
			policy.put(cmd, in)
			var out object
			if err := a.call(cmd.Context(), http.MethodPost, "/v1/api-keys", nil, in, &out); err != nil {
				return err
			}
			return a.printNewKey(cmd, out)
		},
	}
	f := cmd.Flags()
	f.StringVar(&org, "org", "", "`ID` of the organization (that of the calling key if absent)")
	f.StringVar(&name, "name", "", "its `NAME`")
	f.StringSliceVar(&scopes, "scopes", nil, "`SCOPES`, comma-separated: resource:action, resource:*, full_access")
	f.StringVar(&expires, "expires", "", "`WHEN` it expires: 90d, 12h, or a time like 2027-01-31T00:00:00Z")
	f.StringVar(&environment, "environment", "", "`NAME` of the environment, part of the key (live if absent)")
	f.StringVar(&description, "description", "", "what it is for")
	f.StringVar(&owner, "owner", "", "who answers for it")
	f.StringSliceVar(&tags, "tags", nil, "tags, comma-separated")
	f.StringSliceVar(&cidrs, "allowed-cidrs", nil, "source `RANGES` from which it may be used (all if absent)")
	policy.flags(cmd)
	_ = cmd.MarkFlagRequired("name")
	_ = cmd.MarkFlagRequired("scopes")
	return cmd
}

// parseExpiry reads "90d", "12h", a date or a time.
func parseExpiry(s string, now time.Time) (time.Time, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.Atoi(days); err == nil {
			return now.UTC().AddDate(0, 0, n).Truncate(time.Second), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil {
		return now.UTC().Add(d).Truncate(time.Second), nil
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("--expires %q is neither like 90d, 12h, 2027-01-31 nor 2027-01-31T00:00:00Z", s)
}

func newKeyListCmd(a *apiCommand) *cobra.Command {
	filters := map[string]*string{}
	var overdue, unused bool
	var limit int
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List and search keys, newest first",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query := url.Values{}
			for name, value := range filters {
				if *value != "" {
					query.Set(name, *value)
				}
			}
			if overdue {
				query.Set("overdue", "true")
			}
			if unused {
				query.Set("unused", "true")
			}
			if limit > 0 && limit < 1000 {
				query.Set("limit", strconv.Itoa(limit))
			}
			keys, err := a.list(cmd.Context(), "/v1/api-keys", "keys", query, limit)
			if err != nil {
				return err
			}
			return a.print(cmd.OutOrStdout(), object{"keys": keys}, func(w io.Writer) {
				a.table(w, keys, "id", "org_id", "name", "prefix", "status", "scopes", "created_at", "expires_at", "last_used_at")
			})
		},
	}
	f := cmd.Flags()
	for name, usage := range map[string]string{
		"org_id": "`ID` of an organization", "status": "`STATUS`: active, suspended, revoked or expired", "q": "`TEXT` in name, id, prefix, description or owner",
		"scope": "keys that may do `SCOPE`", "owner": "`OWNER`", "tag": "`TAG`", "older_than": "older than `AGE`: 90d", "unused_for": "not used for `AGE`: 90d",
	} {
		flag := strings.ReplaceAll(strings.TrimSuffix(name, "_id"), "_", "-")
		filters[name] = f.String(flag, "", usage)
	}
	f.BoolVar(&overdue, "overdue", false, "only those whose rotation is overdue")
	f.BoolVar(&unused, "unused", false, "only those unused for long")
	f.IntVar(&limit, "limit", 0, "at most `N` keys (all if 0)")
	return cmd
}

func newKeyShowCmd(a *apiCommand) *cobra.Command {
	return &cobra.Command{
		Use:   "show ID",
		Short: "Show a key",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.printKey(cmd, http.MethodGet, keyPath(args[0]), nil)
		},
	}
}

// printKey makes a call that answers with a key, and shows it.
func (a *apiCommand) printKey(cmd *cobra.Command, method, path string, in any) error {
	var out object
	if err := a.call(cmd.Context(), method, path, nil, in, &out); err != nil {
		return err
	}
	return a.print(cmd.OutOrStdout(), out, func(w io.Writer) {
		a.details(w, out, "id", "org_id", "name", "prefix", "status", "revoke_reason", "environment", "description", "owner", "scopes", "created_at",
			"expires_at", "last_rotated_at", "rotation_due_at", "last_used_at", "revoked_at", "parent_key_id", "successor_key_id", "unclaimed",
			"allowed_cidrs", "tags")
		a.policyDetails(w, out)
	})
}

func newKeyUpdateCmd(a *apiCommand) *cobra.Command {
	var (
		name, description, owner, expires string
		scopes, tags, cidrs               []string
		policy                            policyFlags
	)
	cmd := &cobra.Command{
		Use:     "update ID",
		Short:   "Change a key; what is not named stays as it is",
		Example: "  latchkey key update key_01… --scopes orders:read --allowed-cidrs 198.51.100.0/24 --on-compromise rotate",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := object{}
			for flag, value := range map[string]any{
				"name": name, "description": description, "owner": owner, "scopes": scopes, "tags": tags, "allowed-cidrs": cidrs,
			} {
				if cmd.Flags().Changed(flag) {
					in[strings.ReplaceAll(flag, "-", "_")] = value
				}
			}
			switch expires {
			case "":
			case "never":
				in["never_expires"] = true
			default:
				at, err := parseExpiry(expires, time.Now())
				if err != nil {
					return err
				}
				in["expires_at"] = at
			}
			policy.put(cmd, in)
			return a.printKey(cmd, http.MethodPatch, keyPath(args[0]), in)
		},
	}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "its new `NAME`")
	f.StringSliceVar(&scopes, "scopes", nil, "its new `SCOPES`, the whole set")
	f.StringVar(&expires, "expires", "", "`WHEN` it expires: 90d, 12h, a time, or never")
	f.StringVar(&description, "description", "", "what it is for")
	f.StringVar(&owner, "owner", "", "who answers for it")
	f.StringSliceVar(&tags, "tags", nil, "its new tags, the whole set")
	f.StringSliceVar(&cidrs, "allowed-cidrs", nil, "the source `RANGES` from which it may be used, the whole set")
	policy.flags(cmd)
	return cmd
}

func newKeyRotateCmd(a *apiCommand) *cobra.Command {
	var grace, from, expires, reason string
	cmd := &cobra.Command{
		Use:     "rotate ID",
		Short:   "Replace a key; the new secret is shown this once",
		Long:    "Replaces a key by a new one with the same scopes. The old one stays valid for the\ngrace period, but never beyond its own expiry; --grace 0 ends it at once.",
		Example: "  latchkey key rotate key_01… --grace 24h",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := object{}
			if grace != "" {
				in["grace"] = grace
			}
			if from != "" {
				in["grace_from"] = from
			}
			if reason != "" {
				in["reason"] = reason
			}
			if expires != "" {
				at, err := parseExpiry(expires, time.Now())
				if err != nil {
					return err
				}
				in["expires_at"] = at
			}
			var out object
			if err := a.call(cmd.Context(), http.MethodPost, keyPath(args[0], "rotate"), nil, in, &out); err != nil {
				return err
			}
			return a.printNewKey(cmd, out)
		},
	}
	cmd.Flags().StringVar(&grace, "grace", "", "how long the old key stays valid, a `DURATION`: 24h, 7d, 0 (the policy's, or 24h, if absent)")
	cmd.Flags().StringVar(&from, "grace-from", "", "when that begins: now, or first_use of the new key")
	cmd.Flags().StringVar(&expires, "expires", "", "`WHEN` the new key expires (it lives as long as the old one was meant to, if absent)")
	cmd.Flags().StringVar(&reason, "reason", "", "`TEXT` for the audit")
	return cmd
}

func newKeyClaimCmd(a *apiCommand) *cobra.Command {
	return &cobra.Command{
		Use:   "claim ID",
		Short: "Fetch the secret of a key that a policy made, once",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var out object
			if err := a.call(cmd.Context(), http.MethodPost, keyPath(args[0], "claim"), nil, nil, &out); err != nil {
				return err
			}
			return a.printNewKey(cmd, out)
		},
	}
}

func newKeyRevokeCmd(a *apiCommand) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "revoke ID",
		Short: "End a key for good",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.printKey(cmd, http.MethodPost, keyPath(args[0], "revoke"), object{"reason": reason})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "unspecified", "a name of RFC 5280: keyCompromise, superseded, cessationOfOperation, affiliationChanged, privilegeWithdrawn, unspecified")
	return cmd
}

func newKeySuspendCmd(a *apiCommand) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "suspend ID",
		Short: "Stop a key until it is resumed",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.printKey(cmd, http.MethodPost, keyPath(args[0], "suspend"), object{"reason": reason})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "`TEXT` for the audit")
	return cmd
}

func newKeyResumeCmd(a *apiCommand) *cobra.Command {
	return &cobra.Command{
		Use:   "resume ID",
		Short: "Let a suspended key work again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.printKey(cmd, http.MethodPost, keyPath(args[0], "resume"), nil)
		},
	}
}

func newKeyHygieneCmd(a *apiCommand) *cobra.Command {
	var org, kind string
	cmd := &cobra.Command{
		Use:   "hygiene",
		Short: "What to put in order: overdue, unused, too wide and shared keys",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query := url.Values{}
			if org != "" {
				query.Set("org_id", org)
			}
			if kind != "" {
				query.Set("kind", kind)
			}
			var out object
			if err := a.call(cmd.Context(), http.MethodGet, "/v1/hygiene", query, nil, &out); err != nil {
				return err
			}
			err := a.print(cmd.OutOrStdout(), out, func(w io.Writer) {
				fmt.Fprintln(w, "FINDING\tKEY\tNAME\tWHAT\tADVICE")
				findings, _ := out["findings"].([]any)
				for _, f := range findings {
					if m, ok := f.(map[string]any); ok {
						o := object(m)
						fmt.Fprintf(w, "%v\t%v\t%v\t%v\t%v\n", o["kind"], o["key_id"], o["name"], o["detail"], o["advice"])
					}
				}
			})
			if err == nil && out["usage"] == "unknown" {
				return errors.New("the use of keys is not known, because ClickHouse does not answer: findings that follow from it are missing")
			}
			return err
		},
	}
	cmd.Flags().StringVar(&org, "org", "", "`ID` of an organization")
	cmd.Flags().StringVar(&kind, "kind", "", "only findings of this `KIND`: overdue, unused, never_used, full_access, unused_scopes, shared, expiring, unclaimed")
	return cmd
}
