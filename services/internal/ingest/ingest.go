// Package ingest reads usage events out of files: Latchkey's own NDJSON, AWS
// CloudTrail, and the access logs of nginx, Caddy and Envoy.
package ingest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Formats of files.
const (
	NDJSON     = "ndjson"
	CloudTrail = "cloudtrail"
	Nginx      = "nginx"
	Caddy      = "caddy"
	Envoy      = "envoy"
)

// Formats lists them all.
func Formats() []string { return []string{NDJSON, CloudTrail, Nginx, Caddy, Envoy} }

// DefaultOrg owns the events of access logs, which name no organization, unless
// Options.Org says otherwise.
const DefaultOrg = "default"

// Options say how to read.
type Options struct {
	Format string
	// Org owns the events: instead of CloudTrail's account, of [DefaultOrg] for
	// access logs, and for events of NDJSON that name none.
	Org string
	// Gateway is written into events that name no gateway. Two hosts whose access
	// logs may hold the very same line need different ones.
	Gateway string
	// Now is the clock against which times in the future are judged.
	Now time.Time
}

// Sink takes what a file holds. Neither method keeps its argument.
type Sink interface {
	// Event takes a valid event that has an id; an error ends the reading.
	Event(ev *usage.Event) error
	// LeftOut counts a record that is no event, at a place for people ("line 7").
	LeftOut(place, reason string)
}

// Check reports options that cannot be.
func (o Options) Check() error {
	if !slices.Contains(Formats(), o.Format) {
		return fmt.Errorf("format %q is none of %s", o.Format, strings.Join(Formats(), ", "))
	}
	if o.Org != "" {
		if err := usage.CheckIdentifier(o.Org); err != nil {
			return fmt.Errorf("org %w", err)
		}
	}
	if o.Gateway != "" {
		if err := usage.CheckIdentifier(o.Gateway); err != nil {
			return fmt.Errorf("gateway %w", err)
		}
	}
	return nil
}

// Read reads one file, gzip or not, into the sink. The error is for a file that
// cannot be read to its end; what came before it is in the sink.
func Read(ctx context.Context, r io.Reader, opts Options, sink Sink) error {
	if err := opts.Check(); err != nil {
		return err
	}
	plain, err := decompress(r)
	if err != nil {
		return err
	}
	in := &reader{opts: opts, sink: sink}
	if opts.Format == CloudTrail {
		return in.cloudTrail(ctx, plain)
	}
	parse := map[string]func([]byte) (usage.Event, error){
		NDJSON: in.ndjson, Nginx: in.nginx, Caddy: in.caddy, Envoy: in.envoy,
	}[opts.Format]
	return eachLine(ctx, plain, func(number int64, line []byte) error {
		ev, err := parse(line)
		return in.keep(ev, err, line, number, "line")
	})
}

// reader reads one file.
type reader struct {
	opts    Options
	sink    Sink
	decoder usage.Decoder
	ids     ordinals
}

// keep completes an event, judges it and hands it on. raw is what it was read
// from, which makes the id of an event that has none.
func (in *reader) keep(ev usage.Event, err error, raw []byte, number int64, unit string) error {
	if err == nil {
		if ev.Gateway == "" {
			ev.Gateway = in.opts.Gateway
		}
		if ev.ID == "" {
			ev.ID = in.ids.id(in.opts.Gateway, raw)
		}
		ev.Normalize()
		err = ev.Validate(in.opts.Now)
	}
	if err != nil {
		in.sink.LeftOut(fmt.Sprintf("%s %d", unit, number), reason(err))
		return nil
	}
	return in.sink.Event(&ev)
}

// reason is an error on one line.
func reason(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// errNoKey leaves out a request that was made without a key: there is nobody to
// learn a habit of.
var errNoKey = errors.New("made without a key")

func (in *reader) ndjson(line []byte) (ev usage.Event, err error) {
	if in.opts.Org != "" {
		line = withOrg(line, in.opts.Org)
	}
	decodeErr := in.decoder.Decode(usage.ContentTypeNDJSON, line, in.opts.Now, func(_ int, e *usage.Event, bad error) {
		if bad != nil {
			err = bad
			return
		}
		ev = *e
	})
	return ev, errors.Join(decodeErr, err)
}

// withOrg puts org before the fields of an event, where one of its own overrides it.
func withOrg(line []byte, org string) []byte {
	if !bytes.HasPrefix(line, []byte("{")) || bytes.HasPrefix(bytes.TrimSpace(line[1:]), []byte("}")) {
		return line
	}
	return append([]byte(`{"org_id":"`+org+`",`), line[1:]...)
}
