package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// apiCommand is what the commands that talk to the REST API share: where it is,
// the key, and the form of the answer.
type apiCommand struct {
	target
	output
}

func (a *apiCommand) flags(cmd *cobra.Command) {
	a.target.flags(cmd)
	a.output.flags(cmd)
}

// apiError is a problem (RFC 9457) that the API answered with.
type apiError struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	Errors []struct {
		Message  string `json:"message"`
		Location string `json:"location"`
	} `json:"errors"`
	RequestID string `json:"request_id"`
}

func (e *apiError) Error() string {
	var b strings.Builder
	if b.WriteString(e.Detail); e.Detail == "" {
		fmt.Fprintf(&b, "%s (HTTP %d)", e.Title, e.Status)
	}
	for _, one := range e.Errors {
		fmt.Fprintf(&b, "\n  %s: %s", strings.TrimPrefix(strings.TrimPrefix(one.Location, "body."), "query."), one.Message)
	}
	switch e.Status {
	case http.StatusUnauthorized:
		b.WriteString("\nSet LATCHKEY_API_KEY to a key that works, or name the data directory of a running `latchkey up` with --data.")
	case http.StatusInternalServerError:
		fmt.Fprintf(&b, " (request %s)", e.RequestID)
	}
	return b.String()
}

// call makes one call of the API. in and out may be nil.
func (a *apiCommand) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	if err := a.check(); err != nil {
		return err
	}
	base, err := a.apiURL()
	if err != nil {
		return err
	}
	key, err := a.apiKey()
	if err != nil {
		return err
	}
	var body io.Reader
	if in != nil {
		encoded, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(encoded)
	}
	address := strings.TrimRight(base, "/") + path
	if len(query) > 0 {
		address += "?" + query.Encode()
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil {
		return fmt.Errorf("call %s: %w", base, err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "latchkey/"+version)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("%w\nIs Latchkey running? Its address comes from LATCHKEY_API_URL or --data; now %s is asked", err, base)
	}
	defer func() { _ = res.Body.Close() }()
	content, err := io.ReadAll(io.LimitReader(res.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("read answer of %s: %w", base, err)
	}
	if res.StatusCode >= 300 {
		return readAPIError(res, content)
	}
	if out == nil || len(content) == 0 {
		return nil
	}
	if err := json.Unmarshal(content, out); err != nil {
		return fmt.Errorf("read answer of %s: %w", base, err)
	}
	return nil
}

func readAPIError(res *http.Response, content []byte) error {
	problem := &apiError{Status: res.StatusCode, Title: http.StatusText(res.StatusCode)}
	if strings.HasSuffix(strings.SplitN(res.Header.Get("Content-Type"), ";", 2)[0], "json") && json.Unmarshal(content, problem) == nil {
		return problem
	}
	if res.StatusCode/100 == 3 {
		return errors.New("the API answered with a redirect; is LATCHKEY_API_URL right?")
	}
	return problem
}

// list calls a listing, whose pages hold the objects under field, until it ends
// or limit objects came, limit 0 for all.
func (a *apiCommand) list(ctx context.Context, path, field string, query url.Values, limit int) ([]object, error) {
	objects := []object{}
	for {
		var (
			page   map[string]json.RawMessage
			some   []object
			cursor string
		)
		if err := a.call(ctx, http.MethodGet, path, query, nil, &page); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(page[field], &some); err != nil {
			return nil, fmt.Errorf("read %s of the answer: %w", field, err)
		}
		if next, ok := page["next_cursor"]; ok {
			if err := json.Unmarshal(next, &cursor); err != nil {
				return nil, fmt.Errorf("read cursor of the answer: %w", err)
			}
		}
		objects = append(objects, some...)
		if limit > 0 && len(objects) >= limit {
			return objects[:limit], nil
		}
		if cursor == "" {
			return objects, nil
		}
		query.Set("cursor", cursor)
	}
}

// object is an answer that is shown as it came.
type object map[string]any

// text is a field as a table cell.
func (o object) text(name string) string {
	switch v := o[name].(type) {
	case nil:
		return "-"
	case string:
		if t, err := time.Parse(time.RFC3339Nano, v); err == nil {
			return t.UTC().Format("2006-01-02 15:04")
		}
		if v == "" {
			return "-"
		}
		return v
	case []any:
		parts := make([]string, len(v))
		for i, p := range v {
			parts[i] = fmt.Sprint(p)
		}
		if len(parts) == 0 {
			return "-"
		}
		return strings.Join(parts, ",")
	default:
		return fmt.Sprint(v)
	}
}

// table prints objects, one a row, with the fields of columns ("id=ID").
func (a *apiCommand) table(w io.Writer, objects []object, columns ...string) {
	heads := make([]string, len(columns))
	for i, c := range columns {
		heads[i] = strings.ToUpper(strings.ReplaceAll(c, "_", " "))
	}
	fmt.Fprintln(w, strings.Join(heads, "\t"))
	for _, o := range objects {
		cells := make([]string, len(columns))
		for i, c := range columns {
			cells[i] = o.text(c)
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
}

// details prints one object, a field a row, the named ones first.
func (a *apiCommand) details(w io.Writer, o object, fields ...string) {
	for _, f := range fields {
		if _, ok := o[f]; ok {
			fmt.Fprintf(w, "%s\t%s\n", strings.ReplaceAll(f, "_", " "), o.text(f))
		}
	}
}
