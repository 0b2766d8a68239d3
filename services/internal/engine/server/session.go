package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/latchkey-dev/latchkey/services/internal/engine/chdb"
	"github.com/latchkey-dev/latchkey/services/internal/engine/sql"
	"github.com/latchkey-dev/latchkey/services/internal/engine/wire"
)

// ClickHouse's error codes that this server raises itself.
const (
	codeBadArguments        = 36
	codeNotImplemented      = 48
	codeSyntaxError         = 62
	codeUnknownSetting      = 115
	codeUnknownException    = 1002
	codeAccessDenied        = 497
	codeAuthentication      = 516
	codeUnexpectedPacket    = 101
	codeQueryWasCancelled   = 394
	codeIncorrectData       = 117
	codeQueryTooLarge       = 229
	codeNoSuchColumnInTable = 16
)

func exception(code int, name, format string, args ...any) *chdb.Error {
	return &chdb.Error{Code: code, Name: name, Message: fmt.Sprintf(format, args...)}
}

// asException gives any error a ClickHouse code.
func asException(err error) *chdb.Error {
	var e *chdb.Error
	if errors.As(err, &e) {
		return e
	}
	var unsupported *wire.UnsupportedTypeError
	switch {
	case errors.Is(err, sql.ErrEmpty), errors.Is(err, sql.ErrMultiple), errors.Is(err, sql.ErrExit):
		return exception(codeSyntaxError, "SYNTAX_ERROR", "Syntax error: %v", err)
	case errors.Is(err, sql.ErrFiles):
		return exception(codeAccessDenied, "ACCESS_DENIED", "Not allowed: %v", err)
	case errors.As(err, &unsupported):
		return exception(codeNotImplemented, "NOT_IMPLEMENTED", "%v", err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return exception(codeQueryWasCancelled, "QUERY_WAS_CANCELLED", "Query was cancelled")
	case errors.Is(err, wire.ErrTooLong):
		return exception(codeIncorrectData, "INCORRECT_DATA", "%v", err)
	}
	return exception(codeUnknownException, "UNKNOWN_EXCEPTION", "%v", err)
}

// setting is one name and value that came with a query.
type setting struct {
	name, value string
	// optional settings are passed over if the engine does not know them.
	optional bool
}

// session is a ClickHouse session: one connection of the engine. It runs one
// query at a time.
type session struct {
	srv  *Server
	conn *chdb.Conn
	// marker ends the log_comment of all that the session runs; it is how a
	// running query is found in system.processes.
	marker string
	// applied are the settings that came with the last query and are in force.
	applied []setting
	// replay are the SET statements of the session's user: they are repeated
	// when a query's own settings are taken back.
	replay []string
}

// baseSettings make the engine, which is made for local use, behave like a server.
// A text for a JSON column is the one form of it that all clients read.
const baseSettings = "SET implicit_select = 0, allow_introspection_functions = 0, " +
	"output_format_native_write_json_as_string = 1, input_format_parallel_parsing = 0, log_comment = "

func (s *Server) openSession(database string) (*session, error) {
	conn, err := s.lib.Connect()
	if err != nil {
		return nil, exception(codeUnknownException, "UNKNOWN_EXCEPTION", "%v", err)
	}
	ses := &session{srv: s, conn: conn, marker: fmt.Sprintf("latchkey-session-%d", s.sessions.Add(1))}
	err = conn.Exec(baseSettings + sql.Quote(ses.marker))
	if err == nil && database != "" && database != "default" {
		err = conn.Exec("USE " + sql.QuoteName(database))
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return ses, nil
}

func (ses *session) close() { ses.conn.Close() }

// apply puts the settings of the next query in force and takes back those of
// the last one.
func (ses *session) apply(settings []setting) error {
	if slices.Equal(settings, ses.applied) {
		return nil
	}
	if len(ses.applied) > 0 {
		names := map[string]bool{}
		for _, s := range ses.applied {
			names[s.name+" = DEFAULT"] = true
		}
		reset := append([]string{"SET " + strings.Join(slices.Sorted(maps.Keys(names)), ", "), baseSettings + sql.Quote(ses.marker)}, ses.replay...)
		ses.applied = nil
		for _, statement := range reset {
			if err := ses.conn.Exec(statement); err != nil {
				return err
			}
		}
	}
	if len(settings) == 0 {
		return nil
	}
	assignments := make([]string, len(settings))
	for i, s := range settings {
		assignments[i] = ses.assignment(s)
	}
	err := ses.conn.Exec("SET " + strings.Join(assignments, ", "))
	ses.applied = settings
	if e := (*chdb.Error)(nil); errors.As(err, &e) && e.Code == codeUnknownSetting {
		return ses.applyOneByOne(settings, assignments)
	}
	return err
}

func (ses *session) applyOneByOne(settings []setting, assignments []string) error {
	ses.applied = nil
	for i, a := range assignments {
		err := ses.conn.Exec("SET " + a)
		if err != nil && settings[i].optional {
			continue
		}
		if err != nil {
			return err
		}
		ses.applied = append(ses.applied, settings[i])
	}
	return nil
}

func (ses *session) assignment(s setting) string {
	if s.name == "log_comment" {
		s.value += ses.marker
	}
	return sql.QuoteName(s.name) + " = " + sql.Quote(s.value)
}

func (ses *session) setParameters(parameters map[string]string) error {
	for name, value := range parameters {
		// The parameter's text is in escaped form, as a value of TSV would be.
		if err := ses.conn.Exec("SET " + sql.QuoteName("param_"+name) + " = " + sql.Quote(value)); err != nil {
			return err
		}
	}
	return nil
}

// remember keeps what a statement changed in the session.
func (ses *session) remember(st sql.Statement) {
	if st.Kind == sql.Set && len(ses.replay) < 1000 {
		ses.replay = append(ses.replay, st.Text)
	}
}

// run executes a statement that carries no data, and gives its output to sink
// piece by piece. The bytes are only valid during the call. If ctx ends the
// query is killed.
func (ses *session) run(ctx context.Context, st sql.Statement, format string, stream bool, sink func([]byte) error) (chdb.Stats, error) {
	if err := ctx.Err(); err != nil {
		return chdb.Stats{}, err
	}
	release, err := ses.srv.acquire(ctx)
	if err != nil {
		return chdb.Stats{}, err
	}
	defer release()
	ended := make(chan struct{})
	defer close(ended)
	defer context.AfterFunc(ctx, func() { ses.srv.killUntil(ended, ses.marker) })()
	var stats chdb.Stats
	if stream && st.Kind == sql.Select {
		stats, err = ses.stream(ctx, st.Text, format, sink)
	} else {
		stats, err = ses.whole(st.Text, format, sink)
	}
	if err == nil {
		ses.remember(st)
	}
	return stats, err
}

func (ses *session) whole(text, format string, sink func([]byte) error) (chdb.Stats, error) {
	result, err := ses.conn.Query(text, format)
	if err != nil {
		return chdb.Stats{}, err
	}
	defer result.Close()
	stats := result.Stats()
	if b := result.Bytes(); len(b) > 0 {
		err = sink(b)
	}
	return stats, err
}

func (ses *session) stream(ctx context.Context, text, format string, sink func([]byte) error) (sum chdb.Stats, err error) {
	stream, err := ses.conn.Stream(text, format)
	if err != nil {
		return sum, err
	}
	defer stream.Close()
	for {
		piece, err := stream.Next()
		if err != nil || piece == nil {
			return sum, err
		}
		stats := piece.Stats()
		sum.RowsRead += stats.RowsRead
		sum.BytesRead += stats.BytesRead
		sum.ElapsedSeconds += stats.ElapsedSeconds
		err = sink(piece.Bytes())
		piece.Close()
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return sum, err
		}
	}
}

// insert loads a spooled file. The engine reads it as its own client would read
// a local file: through the table's insert pipeline, so that defaults,
// materialized views and deduplication work as for any INSERT.
func (ses *session) insert(ctx context.Context, head sql.InsertHead, format, path string) (chdb.Stats, error) {
	text := head.Into + " FROM INFILE " + sql.Quote(path) + " COMPRESSION 'none' " + head.Settings + " FORMAT " + format
	return ses.run(ctx, sql.Statement{Kind: sql.Insert, Text: text}, "Null", false, func([]byte) error { return nil })
}

// describe tells the columns that a query or table gives.
func (ses *session) describe(what string) ([]wire.Column, error) {
	columns, err := ses.describeAll(what)
	out := make([]wire.Column, len(columns))
	for i, c := range columns {
		out[i] = wire.Column{Name: c.Name, Type: c.Type}
	}
	return out, err
}

type describedColumn struct {
	Name        string `json:"name"`
	Type        string `json:"type"`
	DefaultType string `json:"default_type"`
}

func (ses *session) describeAll(what string) ([]describedColumn, error) {
	out, err := ses.conn.QueryString("DESCRIBE TABLE "+what+" SETTINGS describe_include_subcolumns = 0, describe_compact_output = 0", "JSON")
	if err != nil {
		return nil, err
	}
	var answer struct {
		Data []describedColumn `json:"data"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("read DESCRIBE's answer: %w", err)
	}
	return answer.Data, nil
}

// header tells the columns of a statement that gave no block.
func (ses *session) header(st sql.Statement) ([]wire.Column, error) {
	if st.Kind == sql.Select {
		if columns, err := ses.describe("(" + st.Text + "\n)"); err == nil {
			return columns, nil
		}
	}
	if st.Kind != sql.Select && st.Kind != sql.Show {
		return nil, nil
	}
	out, err := ses.conn.QueryString(st.Text, "JSONCompact")
	if err != nil || out == "" {
		return nil, err
	}
	var answer struct {
		Meta []wire.Column `json:"meta"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("read columns: %w", err)
	}
	return answer.Meta, nil
}

// insertColumns tells which columns an INSERT fills, in the order of its list.
func (ses *session) insertColumns(head sql.InsertHead) ([]wire.Column, error) {
	all, err := ses.describeAll(head.Table)
	if err != nil {
		return nil, err
	}
	names, plain := sql.Names(head.Columns)
	if !plain { // (* EXCEPT (…)) and its like: let the engine expand it
		return ses.describe("(SELECT " + strings.TrimSuffix(strings.TrimPrefix(head.Columns, "("), ")") + " FROM " + head.Table + ")")
	}
	var columns []wire.Column
	byName := map[string]string{}
	for _, c := range all {
		byName[c.Name] = c.Type
		if c.DefaultType != "MATERIALIZED" && c.DefaultType != "ALIAS" && c.DefaultType != "EPHEMERAL" {
			columns = append(columns, wire.Column{Name: c.Name, Type: c.Type})
		}
	}
	if len(names) == 0 {
		return columns, nil
	}
	columns = columns[:0]
	for _, name := range names {
		t, ok := byName[name]
		if !ok {
			return nil, exception(codeNoSuchColumnInTable, "NO_SUCH_COLUMN_IN_TABLE", "No such column %s in table %s", name, head.Table)
		}
		columns = append(columns, wire.Column{Name: name, Type: t})
	}
	return columns, nil
}
