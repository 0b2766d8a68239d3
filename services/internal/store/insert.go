package store

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/ClickHouse/clickhouse-go/v2"
)

// Setting is a setting of ClickHouse for one insert.
type Setting struct{ Name, Value string }

// Inserter writes blocks of columns. It is for one goroutine at a time.
type Inserter struct {
	opts *clickhouse.Options
	next int // address to try

	client *ch.Client
	web    *http.Client
	buf    proto.Buffer
}

// Inserter makes an inserter with a connection of its own, dialled when needed.
func (s *Store) Inserter() *Inserter {
	in := &Inserter{opts: s.opts}
	if s.opts.Protocol == clickhouse.HTTP {
		in.web = &http.Client{Transport: &http.Transport{TLSClientConfig: s.opts.TLS, MaxIdleConnsPerHost: 1}}
	}
	return in
}

// Insert writes one block and returns once ClickHouse has it. After an error it
// is not known whether it has; sending the same block again with the same
// insert_deduplication_token settles that.
func (in *Inserter) Insert(ctx context.Context, table string, block proto.Input, settings ...Setting) error {
	var err error
	if in.web != nil {
		err = in.insertHTTP(ctx, table, block, settings)
	} else {
		err = in.insertNative(ctx, table, block, settings)
	}
	if err != nil {
		return fmt.Errorf("insert into %s: %w", table, err)
	}
	return nil
}

// Close closes the connection; the next Insert opens another.
func (in *Inserter) Close() {
	if in.client != nil {
		_ = in.client.Close()
		in.client = nil
	}
	if in.web != nil {
		in.web.CloseIdleConnections()
	}
}

func (in *Inserter) insertNative(ctx context.Context, table string, block proto.Input, settings []Setting) error {
	if in.client == nil || in.client.IsClosed() {
		client, err := in.dial(ctx)
		if err != nil {
			return err
		}
		in.client = client
	}
	q := ch.Query{Body: insertInto(table, block), Input: block}
	for _, s := range settings {
		q.Settings = append(q.Settings, ch.Setting{Key: s.Name, Value: s.Value, Important: true})
	}
	err := in.client.Do(ctx, q)
	if err != nil {
		// Whatever state the connection is in, a new one is clean.
		in.Close()
	}
	return err
}

func insertInto(table string, block proto.Input) string {
	names := make([]string, len(block))
	for i, c := range block {
		names[i] = quote(c.Name)
	}
	return "INSERT INTO " + quote(table) + " (" + strings.Join(names, ", ") + ") VALUES"
}

func (in *Inserter) dial(ctx context.Context) (*ch.Client, error) {
	addr := in.opts.Addr[in.next%len(in.opts.Addr)]
	in.next++
	opt := ch.Options{
		Address: addr, Database: in.opts.Auth.Database, User: in.opts.Auth.Username, Password: in.opts.Auth.Password,
		ClientName: "latchkey", DialTimeout: in.opts.DialTimeout, TLS: in.opts.TLS, ReadTimeout: time.Minute,
		Compression: compression(in.opts),
	}
	if opt.User == "" {
		opt.User = "default"
	}
	client, err := ch.Dial(ctx, opt)
	if err != nil {
		return nil, fmt.Errorf("connect to ClickHouse at %s: %w", addr, err)
	}
	return client, nil
}

func compression(opts *clickhouse.Options) ch.Compression {
	if opts.Compression == nil {
		return ch.CompressionDisabled
	}
	switch opts.Compression.Method {
	case clickhouse.CompressionLZ4:
		return ch.CompressionLZ4
	case clickhouse.CompressionZSTD:
		return ch.CompressionZSTD
	}
	return ch.CompressionDisabled
}

// Exception is an error that ClickHouse answered.
type Exception struct {
	Code    int
	Message string
}

func (e *Exception) Error() string { return fmt.Sprintf("code %d: %s", e.Code, e.Message) }

// insertHTTP posts the block in format Native.
func (in *Inserter) insertHTTP(ctx context.Context, table string, block proto.Input, settings []Setting) error {
	in.buf.Reset()
	for _, c := range block {
		if p, ok := c.Data.(proto.Preparable); ok {
			if err := p.Prepare(); err != nil {
				return fmt.Errorf("prepare column %s: %w", c.Name, err)
			}
		}
	}
	b := proto.Block{Columns: len(block), Rows: block[0].Data.Rows()}
	if err := b.EncodeRawBlock(&in.buf, 0, block); err != nil {
		return fmt.Errorf("encode block: %w", err)
	}
	query := url.Values{
		"database": {in.opts.Auth.Database},
		"query":    {strings.TrimSuffix(insertInto(table, block), "VALUES") + "FORMAT Native"},
	}
	for _, s := range settings {
		query.Set(s.Name, s.Value)
	}
	scheme := "http"
	if in.opts.TLS != (*tls.Config)(nil) {
		scheme = "https"
	}
	addr := in.opts.Addr[in.next%len(in.opts.Addr)]
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, scheme+"://"+addr+"/?"+query.Encode(), bytes.NewReader(in.buf.Buf))
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	if in.opts.Auth.Username != "" {
		req.Header.Set("X-ClickHouse-User", in.opts.Auth.Username)
		req.Header.Set("X-ClickHouse-Key", in.opts.Auth.Password)
	}
	resp, err := in.web.Do(req)
	if err != nil {
		in.next++
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // without the URL
		}
		return fmt.Errorf("connect to ClickHouse at %s: %w", addr, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		e := &Exception{Message: strings.TrimSpace(string(answer))}
		_, _ = fmt.Sscan(resp.Header.Get("X-ClickHouse-Exception-Code"), &e.Code)
		return e
	}
	return nil
}

// ConnPool lends inserters, at most n at a time, so that the memory and the
// load of inserts stay bounded however many partitions there are.
type ConnPool struct {
	s     *Store
	slots chan struct{}
	mu    sync.Mutex
	idle  []*Inserter
}

// Pool makes a pool of n inserters.
func (s *Store) Pool(n int) *ConnPool { return &ConnPool{s: s, slots: make(chan struct{}, n)} }

// Get waits for an inserter; give it back with Put.
func (p *ConnPool) Get(ctx context.Context) (*Inserter, error) {
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.idle); n > 0 {
		in := p.idle[n-1]
		p.idle = p.idle[:n-1]
		return in, nil
	}
	return p.s.Inserter(), nil
}

// Put gives an inserter back.
func (p *ConnPool) Put(in *Inserter) {
	p.mu.Lock()
	p.idle = append(p.idle, in)
	p.mu.Unlock()
	<-p.slots
}

// Close closes idle connections.
func (p *ConnPool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, in := range p.idle {
		in.Close()
	}
	p.idle = nil
}
