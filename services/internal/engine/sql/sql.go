// Package sql reads as much of ClickHouse's SQL as a server must know before it
// hands a query to the engine: what kind of statement it is, where an INSERT's
// data begins, and which output format is asked for. The engine parses the rest.
package sql

import (
	"errors"
	"strings"
)

// Kind of a statement.
type Kind int

// Kinds of statements.
const (
	// Other gives no rows (DDL, SET, INSERT … SELECT).
	Other Kind = iota
	// Select can be streamed.
	Select
	// Show gives rows but cannot be streamed (SHOW, DESCRIBE, EXPLAIN, EXISTS, …).
	Show
	// Insert expects data: inline, in the HTTP body or as native blocks.
	Insert
	// Set changes the session.
	Set
	// Use changes the session's database.
	Use
)

// Statement is what is known of a query.
type Statement struct {
	Kind Kind
	// Text is the query without a trailing semicolon, and without its FORMAT clause.
	Text string
	// Format is the name in the FORMAT clause, or "".
	Format string
	// Insert is set for Kind Insert.
	Insert InsertHead
}

// InsertHead is the part of an INSERT before its data.
type InsertHead struct {
	// Into is "INSERT INTO table (columns)".
	Into string
	// Table is as it was written, with quotes and database.
	Table string
	// Columns is the list with its parentheses, or "".
	Columns string
	// Settings is the SETTINGS clause with its keyword, or "".
	Settings string
	// Format is that of the data; "Values" after VALUES.
	Format string
	// DataOffset is where the data begins in the query's text.
	DataOffset int
}

// Errors that Parse returns.
var (
	ErrEmpty    = errors.New("the query is empty")
	ErrMultiple = errors.New("multi-statements are not allowed")
	ErrExit     = errors.New("there is no client to leave")
	ErrFiles    = errors.New("reading and writing files of the server is not allowed")
)

// Parse classifies a query. It looks at no more than the head of an INSERT, so
// that data behind it costs nothing.
func Parse(query string) (Statement, error) {
	l := lexer{text: query}
	first := l.next()
	for first.isPunct("(") {
		first = l.next()
	}
	switch {
	case first.kind == end || first.isPunct(";"):
		return Statement{}, ErrEmpty
	case first.isWord("INSERT"):
		if head, ok := parseInsert(query, &l); ok {
			if head.Format == "" {
				return Statement{}, ErrFiles
			}
			return Statement{Kind: Insert, Text: query[:head.DataOffset], Insert: head}, nil
		}
	}
	s, err := scan(query)
	s.Kind = kindOf(first)
	if err == nil && isExit(s.Text) {
		err = ErrExit
	}
	return s, err
}

// isExit tells the texts at which the engine, which holds a command-line client,
// would do nothing.
func isExit(text string) bool {
	switch strings.ToLower(strings.TrimSpace(text)) {
	case "exit", "quit", "logout", "q", ":q", "\\q", "учше", "йгше", "дщпщге", "й", "\\й", ":й", "жй":
		return true
	}
	return false
}

func kindOf(first token) Kind {
	switch strings.ToUpper(first.text) {
	case "SELECT", "WITH", "FROM", "VALUES":
		return Select
	case "SHOW", "DESCRIBE", "DESC", "EXPLAIN", "EXISTS", "CHECK", "KILL", "GRANTS":
		return Show
	case "SET":
		return Set
	case "USE":
		return Use
	}
	return Other
}

// scan walks a whole statement that carries no data: it finds the FORMAT clause
// and refuses a second statement and access to files.
func scan(query string) (Statement, error) {
	l := lexer{text: query}
	var (
		s           Statement
		prev, prev2 token
		depth       int
		formatFrom  = -1
		formatTo    int
		stop        = -1 // offset of the first semicolon
	)
	for {
		t := l.next()
		if t.kind == end {
			break
		}
		if stop >= 0 && !t.isPunct(";") {
			return s, ErrMultiple
		}
		switch {
		case t.isPunct(";"):
			if stop < 0 {
				stop = t.from
			}
		case t.isPunct("("):
			depth++
			if prev.isFileAccess() && !prev2.isPunct(".") {
				return s, ErrFiles
			}
		case t.isPunct(")"):
			depth--
		case t.isWord("OUTFILE") && prev.isWord("INTO"), t.isWord("INFILE") && prev.isWord("FROM"):
			return s, ErrFiles
		case depth == 0 && prev.isWord("FORMAT") && !prev2.isPunct(".") && (t.kind == word || t.kind == quoted):
			formatFrom, formatTo, s.Format = prev.from, t.to, t.name()
		}
		prev2, prev = prev, t
	}
	if stop < 0 {
		stop = len(query)
	}
	s.Text = query[:stop]
	if s.Format != "" {
		s.Text = query[:formatFrom] + query[formatTo:stop]
	}
	return s, nil
}

// parseInsert reads from behind INSERT. ok is false for INSERT … SELECT and for
// what it does not understand: the engine then says what is wrong with it. The
// format is empty if the data is to come from a file of the server.
func parseInsert(query string, l *lexer) (head InsertHead, ok bool) {
	t := l.next()
	if t.isWord("INTO") {
		t = l.next()
	}
	if t.isWord("TABLE") {
		t = l.next()
	}
	if t.isWord("FUNCTION") || !t.isName() {
		return head, false
	}
	tableFrom, tableTo := t.from, t.to
	t = l.next()
	if t.isPunct(".") {
		name := l.next()
		if !name.isName() {
			return head, false
		}
		tableTo = name.to
		t = l.next()
	}
	head.Table = query[tableFrom:tableTo]
	intoTo := tableTo
	if t.isPunct("(") {
		from, to, closed := l.skipParens(t)
		if !closed {
			return head, false
		}
		head.Columns = query[from:to]
		// "INSERT INTO t (SELECT …)" has no column list.
		inner := lexer{text: head.Columns[1:]}
		if w := inner.next(); w.isWord("SELECT") || w.isWord("WITH") {
			return head, false
		}
		intoTo = to
		t = l.next()
	}
	head.Into = query[:intoTo]
	if t.isWord("PARTITION") { // INSERT INTO t PARTITION BY is of table functions only
		return head, false
	}
	settingsFrom := t.from
	if t.isWord("SETTINGS") {
		for !t.isWord("VALUES") && !t.isWord("FORMAT") && !t.isWord("SELECT") && !t.isWord("WITH") && t.kind != end {
			head.Settings = query[settingsFrom:t.to]
			t = l.next()
		}
	}
	switch {
	case t.isWord("VALUES"):
		head.Format, head.DataOffset = "Values", t.to
		return head, true
	case t.isWord("FROM"):
		return head, l.next().isWord("INFILE")
	case t.isWord("FORMAT"):
		name := l.next()
		if !name.isName() {
			return head, false
		}
		head.Format, head.DataOffset = name.name(), dataStart(query, name.to)
		return head, true
	case t.kind == end || t.isPunct(";"):
		// "INSERT INTO t (a)": what native clients may send, the blocks follow.
		head.Format, head.DataOffset = "Values", len(query)
		return head, true
	}
	return head, false
}

// dataStart skips the blanks and the one line end that may stand between a
// format's name and its data.
func dataStart(query string, at int) int {
	for at < len(query) && (query[at] == ' ' || query[at] == '\t' || query[at] == '\r' || query[at] == '\f') {
		at++
	}
	if at < len(query) && query[at] == ';' {
		at++
	}
	if at < len(query) && query[at] == '\n' {
		at++
	}
	return at
}

type tokenKind int

const (
	end tokenKind = iota
	word
	quoted // `x` or "x"
	text   // 'x'
	number
	punct
)

type token struct {
	kind     tokenKind
	text     string
	from, to int
}

func (t token) isWord(w string) bool  { return t.kind == word && strings.EqualFold(t.text, w) }
func (t token) isPunct(p string) bool { return t.kind == punct && t.text == p }
func (t token) isName() bool          { return t.kind == word || t.kind == quoted }

// name is an identifier without its quotes.
func (t token) name() string {
	if t.kind == quoted && len(t.text) >= 2 {
		return t.text[1 : len(t.text)-1]
	}
	return t.text
}

// isFileAccess tells names of functions that reach files or programs of the
// machine. A ClickHouse server confines them; the engine, made for the local
// use of one person, does not.
func (t token) isFileAccess() bool {
	if !t.isName() {
		return false
	}
	switch strings.ToLower(t.name()) {
	case "file", "filecluster", "executable", "executablepool", "python", "sqlite", "filesystem":
		return true
	}
	return false
}

type lexer struct {
	text string
	at   int
}

// skipParens goes from an opening parenthesis behind its closing one.
func (l *lexer) skipParens(open token) (from, to int, closed bool) {
	for depth := 1; ; {
		switch t := l.next(); {
		case t.kind == end:
			return 0, 0, false
		case t.isPunct("("):
			depth++
		case t.isPunct(")"):
			if depth--; depth == 0 {
				return open.from, t.to, true
			}
		}
	}
}

func (l *lexer) next() token {
	l.skipBlanks()
	from := l.at
	if from >= len(l.text) {
		return token{kind: end, from: from, to: from}
	}
	kind := punct
	switch c := l.text[l.at]; {
	case c == '\'':
		kind = text
		l.skipQuoted(c)
	case c == '"' || c == '`':
		kind = quoted
		l.skipQuoted(c)
	case c == '$' && l.skipHeredoc():
		kind = text
	case isWordStart(c):
		kind = word
		for l.at < len(l.text) && (isWordStart(l.text[l.at]) || isDigit(l.text[l.at])) {
			l.at++
		}
	case isDigit(c):
		kind = number
		for l.at < len(l.text) && (isWordStart(l.text[l.at]) || isDigit(l.text[l.at]) || l.text[l.at] == '.') {
			l.at++
		}
	default:
		l.at++
	}
	return token{kind: kind, text: l.text[from:l.at], from: from, to: l.at}
}

func isWordStart(c byte) bool {
	return c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c >= 0x80
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func (l *lexer) skipBlanks() {
	for l.at < len(l.text) {
		rest := l.text[l.at:]
		switch c := rest[0]; {
		case c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v':
			l.at++
		case strings.HasPrefix(rest, "--"), strings.HasPrefix(rest, "# "), strings.HasPrefix(rest, "#!"):
			l.skipPast("\n")
		case strings.HasPrefix(rest, "/*"):
			l.at += 2
			l.skipPast("*/")
		default:
			return
		}
	}
}

func (l *lexer) skipPast(mark string) {
	if i := strings.Index(l.text[l.at:], mark); i >= 0 {
		l.at += i + len(mark)
		return
	}
	l.at = len(l.text)
}

// skipQuoted goes behind the closing quote; backslashes escape, and a doubled
// quote stands for itself, which two adjacent tokens express as well.
func (l *lexer) skipQuoted(quote byte) {
	for l.at++; l.at < len(l.text); l.at++ {
		switch l.text[l.at] {
		case '\\':
			l.at++
		case quote:
			l.at++
			if l.at < len(l.text) && l.text[l.at] == quote {
				continue
			}
			return
		}
	}
	l.at = len(l.text)
}

// skipHeredoc goes behind $tag$ … $tag$.
func (l *lexer) skipHeredoc() bool {
	rest := l.text[l.at+1:]
	i := strings.IndexByte(rest, '$')
	if i < 0 {
		return false
	}
	for _, c := range []byte(rest[:i]) {
		if !isWordStart(c) && !isDigit(c) {
			return false
		}
	}
	tag := l.text[l.at : l.at+i+2]
	j := strings.Index(l.text[l.at+len(tag):], tag)
	if j < 0 {
		return false
	}
	l.at += len(tag) + j + len(tag)
	return true
}

// Quote writes s as a string literal.
func Quote(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// QuoteName writes s as an identifier.
func QuoteName(s string) string {
	return "`" + strings.NewReplacer(`\`, `\\`, "`", "\\`").Replace(s) + "`"
}

// Names reads a list like "(a, `b c`, n.x)"; plain is false if there is more in
// it than names. An empty list is plain.
func Names(list string) (names []string, plain bool) {
	if list == "" {
		return nil, true
	}
	l := lexer{text: list}
	if !l.next().isPunct("(") {
		return nil, false
	}
	name, t := "", l.next()
	for ; t.kind != end; t = l.next() {
		switch {
		case t.isName():
			name += unescape(t)
		case t.isPunct("."):
			name += "."
		case t.isPunct(","), t.isPunct(")"):
			if name == "" {
				return nil, false
			}
			names = append(names, name)
			name = ""
		default:
			return nil, false
		}
	}
	return names, true
}

// unescape is an identifier's meaning.
func unescape(t token) string {
	name := t.name()
	if t.kind != quoted || !strings.ContainsAny(name, "\\`\"") {
		return name
	}
	quote := t.text[:1]
	return strings.NewReplacer(`\\`, `\`, `\`+quote, quote, quote+quote, quote).Replace(name)
}
