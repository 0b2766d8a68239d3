package main

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"github.com/spf13/cobra"
)

func newQueryCmd() *cobra.Command {
	var t target
	var format string
	cmd := &cobra.Command{
		Use:   `query "SQL" | -`,
		Short: "Ask the configured ClickHouse",
		Example: `  latchkey query 'SELECT key_id, count() FROM usage_events GROUP BY key_id'
  latchkey query --format json 'SELECT * FROM alerts ORDER BY time DESC LIMIT 5'
  echo 'SELECT count() FROM usage_hourly' | latchkey query -`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			query := args[0]
			if query == "-" {
				text, err := io.ReadAll(cmd.InOrStdin())
				if err != nil {
					return fmt.Errorf("read query: %w", err)
				}
				query = string(text)
			}
			write, ok := formats[format]
			if !ok {
				return fmt.Errorf("--format %q is none of table, json, csv, tsv", format)
			}
			return runQuery(cmd.Context(), cmd.OutOrStdout(), &t, query, write)
		},
	}
	t.flags(cmd)
	cmd.Flags().StringVar(&format, "format", "table", "`FORMAT` of the rows: table, json (one object a line), csv or tsv")
	return cmd
}

// rowWriter writes rows; header comes first, close last.
type rowWriter interface {
	header(names []string) error
	row(names []string, values []any) error
	close() error
}

var formats = map[string]func(io.Writer) rowWriter{
	"table": func(w io.Writer) rowWriter { return &tableWriter{tw: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0), w: w} },
	"json":  func(w io.Writer) rowWriter { return &jsonWriter{w: w} },
	"csv":   func(w io.Writer) rowWriter { return &csvWriter{csv.NewWriter(w)} },
	"tsv": func(w io.Writer) rowWriter {
		c := csv.NewWriter(w)
		c.Comma = '\t'
		return &csvWriter{c}
	},
}

func runQuery(ctx context.Context, w io.Writer, t *target, query string, format func(io.Writer) rowWriter) error {
	query = strings.TrimRight(strings.TrimSpace(query), ";")
	if query == "" {
		return errors.New("the query is empty")
	}
	db, err := openStore(t)
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	rows, err := db.Conn.Query(ctx, query)
	if err != nil {
		return fmt.Errorf("query ClickHouse at %s: %w", db.Addr(), err)
	}
	defer func() { _ = rows.Close() }()
	return writeRows(rows, format(w))
}

func writeRows(rows driver.Rows, out rowWriter) error {
	names, types := rows.Columns(), rows.ColumnTypes()
	if err := out.header(names); err != nil {
		return err
	}
	targets, values := make([]any, len(types)), make([]any, len(types))
	for i, ct := range types {
		targets[i] = reflect.New(ct.ScanType()).Interface()
	}
	for rows.Next() {
		if err := rows.Scan(targets...); err != nil {
			return fmt.Errorf("read row: %w", err)
		}
		for i := range targets {
			values[i] = plainValue(reflect.ValueOf(targets[i]).Elem().Interface())
		}
		if err := out.row(names, values); err != nil {
			return err
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read rows: %w", err)
	}
	return out.close()
}

// plainValue makes addresses and times readable, inside of arrays too.
func plainValue(v any) any {
	switch x := v.(type) {
	case net.IP:
		if a, ok := netip.AddrFromSlice(x); ok {
			return a.Unmap().String()
		}
		return ""
	case netip.Addr:
		return x.Unmap().String()
	case time.Time:
		return x.UTC().Format(time.RFC3339Nano)
	case nil, string, bool, fmt.Stringer:
		return v
	}
	if r := reflect.ValueOf(v); r.Kind() == reflect.Pointer {
		if r.IsNil() {
			return nil
		}
		return plainValue(r.Elem().Interface())
	}
	return v
}

func text(v any) string {
	switch x := v.(type) {
	case nil:
		return "NULL"
	case string:
		return x
	case float64, float32:
		return fmt.Sprintf("%g", x)
	}
	if k := reflect.ValueOf(v).Kind(); k == reflect.Slice || k == reflect.Map || k == reflect.Struct {
		if b, err := json.Marshal(v); err == nil {
			return string(b)
		}
	}
	return fmt.Sprint(v)
}

type tableWriter struct {
	tw *tabwriter.Writer
	w  io.Writer
	n  int
}

func (t *tableWriter) header(names []string) error {
	if len(names) > 0 {
		_, _ = fmt.Fprintln(t.tw, strings.Join(names, "\t"))
	}
	return nil
}

func (t *tableWriter) row(_ []string, values []any) error {
	cells := make([]string, len(values))
	for i, v := range values {
		cells[i] = strings.NewReplacer("\t", " ", "\n", " ").Replace(text(v))
	}
	t.n++
	_, err := fmt.Fprintln(t.tw, strings.Join(cells, "\t"))
	if t.n%1000 == 0 {
		_ = t.tw.Flush() // a long answer is not held back for its alignment
	}
	return err
}

func (t *tableWriter) close() error { return t.tw.Flush() }

type jsonWriter struct{ w io.Writer }

func (*jsonWriter) header([]string) error { return nil }

// row keeps the order of the columns, which a map would not.
func (j *jsonWriter) row(names []string, values []any) error {
	var b strings.Builder
	b.WriteByte('{')
	for i, name := range names {
		if i > 0 {
			b.WriteByte(',')
		}
		k, _ := json.Marshal(name)
		v, err := json.Marshal(values[i])
		if err != nil {
			return fmt.Errorf("write column %s: %w", name, err)
		}
		b.Write(k)
		b.WriteByte(':')
		b.Write(v)
	}
	b.WriteString("}\n")
	_, err := io.WriteString(j.w, b.String())
	return err
}

func (*jsonWriter) close() error { return nil }

type csvWriter struct{ *csv.Writer }

func (c *csvWriter) header(names []string) error { return c.Write(names) }

func (c *csvWriter) row(_ []string, values []any) error {
	cells := make([]string, len(values))
	for i, v := range values {
		cells[i] = text(v)
	}
	return c.Write(cells)
}

func (c *csvWriter) close() error {
	c.Flush()
	return c.Error()
}
