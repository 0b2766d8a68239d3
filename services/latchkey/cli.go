package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// target is where a command finds a running Latchkey: LATCHKEY_API_URL and
// LATCHKEY_API_KEY, or the files that `latchkey up --data DIR` wrote.
type target struct{ data string }

func (t *target) flags(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVar(&t.data, "data", os.Getenv("LATCHKEY_DATA"), "the `DIR` of a running `latchkey up`, to find its addresses and admin key")
}

// addresses reads DIR/addresses.json: "console", "edge", "nats", "clickhouse", "clickhouse_http", …
func (t *target) addresses() (map[string]string, error) {
	path := filepath.Join(t.data, "addresses.json")
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read addresses: %w (is `latchkey up --data %s` running?)", err, t.data)
	}
	addrs := map[string]string{}
	if err := json.Unmarshal(content, &addrs); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return addrs, nil
}

// lookup is the environment variable, else what `up` wrote under name with
// scheme before it, else the default.
func (t *target) lookup(variable, name, scheme, fallback string) (string, error) {
	if v := os.Getenv(variable); v != "" {
		return v, nil
	}
	if t.data == "" {
		return fallback, nil
	}
	addrs, err := t.addresses()
	if err != nil {
		return "", err
	}
	if addrs[name] == "" {
		return "", fmt.Errorf("%s names no %s address", filepath.Join(t.data, "addresses.json"), name)
	}
	return scheme + addrs[name], nil
}

func (t *target) apiURL() (string, error) {
	return t.lookup("LATCHKEY_API_URL", "console", "http://", "http://127.0.0.1:8080")
}

func (t *target) natsURL() (string, error) {
	return t.lookup("LATCHKEY_NATS_URL", "nats", "nats://", "nats://127.0.0.1:4222")
}

func (t *target) clickhouseURL() (string, error) {
	url, err := t.lookup("LATCHKEY_CLICKHOUSE_URL", "clickhouse", "clickhouse://", "clickhouse://127.0.0.1:9000")
	if err == nil && strings.Count(url, "/") == 2 {
		url += "/latchkey"
	}
	return url, err
}

func (t *target) apiKey() (string, error) {
	if v := os.Getenv("LATCHKEY_API_KEY"); v != "" {
		return v, nil
	}
	if t.data == "" {
		return "", errors.New("no API key: set LATCHKEY_API_KEY, or name the data directory of a running `latchkey up` with --data")
	}
	content, err := os.ReadFile(filepath.Join(t.data, "admin.key"))
	if err != nil {
		return "", fmt.Errorf("read admin key: %w", err)
	}
	return strings.TrimSpace(string(content)), nil
}

// output is the --output flag of every command that answers.
type output struct{ format string }

func (o *output) flags(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVarP(&o.format, "output", "o", "table", "`FORMAT` of the answer: table or json")
}

func (o *output) check() error {
	if o.format != "table" && o.format != "json" {
		return fmt.Errorf("--output %q is neither table nor json", o.format)
	}
	return nil
}

// print writes v as JSON, or as the table that rows draws (tab-separated cells).
func (o *output) print(w io.Writer, v any, rows func(w io.Writer)) error {
	if o.format == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	rows(tw)
	return tw.Flush()
}
