package detector

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/detector/anomaly"
	"github.com/latchkey-dev/latchkey/services/internal/geo"
)

// BacktestOptions are those of [Backtest].
type BacktestOptions struct {
	// Budget is the accepted number of false alerts per key and month, 0 for the default.
	Budget float64
	// Locate tells where an address is; may be nil.
	Locate func(netip.Addr) geo.Location
}

// Report is what a backtest counted.
type Report struct {
	Events   int64
	Keys     int
	Rejected int64
	// Reasons for which lines were rejected, the most frequent first.
	Reasons []RejectedLines
	// Alerts are the episodes in their final form, in order of time, then id.
	Alerts []alert.Alert
}

// RejectedLines are the lines that were rejected for one reason.
type RejectedLines struct {
	Reason string
	Count  int64
	First  int64 // line, from 1
}

// Backtest runs the whole detector over a file of events: NDJSON, or one JSON
// array, gzip or not. All events count as live. An alert is told once, as its
// episode ended, at the time of the event that raised it. The same input gives
// the same report.
func Backtest(ctx context.Context, r io.Reader, opts BacktestOptions) (*Report, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	decoders := runtime.GOMAXPROCS(0)
	b := &backtest{
		engine: anomaly.New(anomaly.Options{Budget: opts.Budget, Locate: opts.Locate}),
		text:   make(chan *batch, decoders), order: make(chan *batch, 3*decoders), free: make(chan *batch, 3*decoders),
		reasons: map[string]*RejectedLines{}, alerts: map[string]alert.Alert{},
	}
	for range cap(b.free) {
		b.free <- &batch{decoded: make(chan struct{}, 1)}
	}
	for range decoders {
		go b.decodeAll()
	}
	go func() {
		defer close(b.order)
		defer close(b.text)
		if err := b.read(ctx, r); err != nil {
			cancel(err)
		}
	}()
	for batch := range b.order {
		<-batch.decoded
		b.learn(batch)
		b.free <- batch
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return b.report(), nil
}

// backtest reads in one goroutine, decodes in as many as there are processors, and
// learns in another, in the order of the file.
type backtest struct {
	engine *anomaly.Engine
	// text are the batches to decode, order all that are to be learned from, free
	// those to be read into.
	text, order, free chan *batch
	events            int64
	rejected          int64
	reasons           map[string]*RejectedLines
	alerts            map[string]alert.Alert
}

// batch is a piece of the file.
type batch struct {
	text        []byte
	contentType string
	line        int64         // of the first byte
	decoded     chan struct{} // receives once events and rejected are there
	events      []usage.Event
	rejected    []rejection
}

type rejection struct {
	line   int64
	reason string
}

// batchBytes is about how much text a batch holds: enough to make the hand-over cheap.
const batchBytes = 256 << 10

// anyTime refuses no time as being in the future: a clock here would make
// the result depend on when it was computed.
var anyTime = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)

func (b *backtest) read(ctx context.Context, r io.Reader) error {
	in, err := unzip(r)
	if err != nil {
		return err
	}
	if isArray(in) {
		return b.readArray(ctx, in)
	}
	var rest []byte // a line that has begun
	line := int64(1)
	for {
		batch, err := b.take(ctx)
		if err != nil {
			return err
		}
		batch.text = append(batch.text[:0], rest...)
		rest = rest[:0]
		readErr := batch.fill(in)
		if readErr == nil {
			cut := bytes.LastIndexByte(batch.text, '\n') + 1
			rest = append(rest, batch.text[cut:]...)
			batch.text = batch.text[:cut]
		}
		batch.line = line
		line += int64(bytes.Count(batch.text, []byte{'\n'}))
		b.send(batch, usage.ContentTypeNDJSON)
		if errors.Is(readErr, io.EOF) {
			return nil
		}
		if readErr != nil {
			return fmt.Errorf("read events: %w", readErr)
		}
	}
}

// maxLine ends a file that is no text at all before it fills the memory.
const maxLine = 64 << 20

// fill reads until the batch is large enough and holds a whole line.
func (b *batch) fill(in io.Reader) error {
	for {
		start := len(b.text)
		b.text = slices.Grow(b.text, batchBytes)
		n, err := io.ReadFull(in, b.text[start:start+batchBytes])
		b.text = b.text[:start+n]
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = io.EOF
		}
		if err != nil || bytes.IndexByte(b.text[start:], '\n') >= 0 {
			return err
		}
		if len(b.text) > maxLine {
			return fmt.Errorf("a line is longer than %d MB: is this NDJSON?", maxLine>>20)
		}
	}
}

func unzip(r io.Reader) (*bufio.Reader, error) {
	in := bufio.NewReaderSize(r, 1<<16)
	if head, err := in.Peek(2); err != nil || head[0] != 0x1f || head[1] != 0x8b {
		return in, nil // a read error comes again
	}
	plain, err := gzip.NewReader(in)
	if err != nil {
		return nil, fmt.Errorf("read gzip: %w", err)
	}
	return bufio.NewReaderSize(plain, 1<<16), nil
}

// isArray tells a JSON array from NDJSON.
func isArray(in *bufio.Reader) bool {
	head, _ := in.Peek(64)
	return bytes.HasPrefix(bytes.TrimLeft(bytes.TrimPrefix(head, []byte("\xef\xbb\xbf")), " \t\r\n"), []byte("["))
}

func (b *backtest) readArray(ctx context.Context, in io.Reader) error {
	batch, err := b.take(ctx)
	if err != nil {
		return err
	}
	if batch.text, err = io.ReadAll(in); err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	batch.line = 1
	b.send(batch, usage.ContentTypeJSON)
	return nil
}

func (b *backtest) send(batch *batch, contentType string) {
	batch.contentType = contentType
	b.order <- batch
	b.text <- batch
}

func (b *backtest) decodeAll() {
	var d usage.Decoder
	for batch := range b.text {
		batch.decode(&d)
		batch.decoded <- struct{}{}
	}
}

func (b *backtest) take(ctx context.Context) (*batch, error) {
	select {
	case batch := <-b.free:
		return batch, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (b *batch) decode(d *usage.Decoder) {
	b.events, b.rejected = b.events[:0], b.rejected[:0]
	place := func(i int) int64 { return int64(i) + 1 }
	if b.contentType == usage.ContentTypeNDJSON {
		rows := lineCounter{text: b.text, line: b.line}
		place = rows.of
	}
	err := d.Decode(b.contentType, b.text, anyTime, func(i int, ev *usage.Event, bad error) {
		if bad != nil {
			b.rejected = append(b.rejected, rejection{place(i), bad.Error()})
			return
		}
		b.events = append(b.events, *ev)
		if ev.ID == "" {
			b.events[len(b.events)-1].ID = "line:" + strconv.FormatInt(place(i), 10)
		}
	})
	if err != nil {
		b.rejected = append(b.rejected, rejection{b.line, err.Error()})
	}
}

// lineCounter turns the numbers of elements into those of their lines: the elements
// are the lines that are not blank. It is asked in ascending order, so that it reads
// the text once.
type lineCounter struct {
	text    []byte // from the line on
	line    int64
	element int // the number of the next line that is not blank
}

func (c *lineCounter) of(element int) int64 {
	for len(c.text) > 0 {
		row, rest := c.text, []byte(nil)
		if n := bytes.IndexByte(c.text, '\n'); n >= 0 {
			row, rest = c.text[:n], c.text[n+1:]
		}
		filled := !blank(row)
		if filled && c.element >= element {
			break
		}
		if filled {
			c.element++
		}
		c.text = rest
		c.line++
	}
	return c.line
}

func blank(row []byte) bool {
	for _, c := range row {
		if c != ' ' && c != '\t' && c != '\r' {
			return false
		}
	}
	return true
}

// maxReasons bounds the distinct reasons, since some quote what they refuse.
const maxReasons = 50

func (b *backtest) learn(batch *batch) {
	b.engine.ObserveAll(batch.events, false, func(a alert.Alert) { b.alerts[a.ID] = a })
	b.events += int64(len(batch.events))
	b.rejected += int64(len(batch.rejected))
	for _, r := range batch.rejected {
		if b.reasons[r.reason] == nil && len(b.reasons) >= maxReasons {
			r.reason = "other reasons"
		}
		if b.reasons[r.reason] == nil {
			b.reasons[r.reason] = &RejectedLines{Reason: r.reason, First: r.line}
		}
		b.reasons[r.reason].Count++
	}
}

func (b *backtest) report() *Report {
	rep := &Report{Events: b.events, Keys: b.engine.Keys(), Rejected: b.rejected}
	rep.Alerts = slices.SortedFunc(maps.Values(b.alerts), func(x, y alert.Alert) int {
		return cmp.Or(x.Time.Compare(y.Time), cmp.Compare(x.ID, y.ID))
	})
	for _, r := range slices.SortedFunc(maps.Values(b.reasons), func(x, y *RejectedLines) int {
		return cmp.Or(cmp.Compare(y.Count, x.Count), cmp.Compare(x.First, y.First), cmp.Compare(x.Reason, y.Reason))
	}) {
		rep.Reasons = append(rep.Reasons, *r)
	}
	return rep
}

// WriteAlerts writes one alert a line, as JSON.
func (r *Report) WriteAlerts(w io.Writer) error {
	out := bufio.NewWriter(w)
	enc := json.NewEncoder(out)
	for i := range r.Alerts {
		if err := enc.Encode(&r.Alerts[i]); err != nil {
			return fmt.Errorf("write alert: %w", err)
		}
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write alerts: %w", err)
	}
	return nil
}

// PrintSummary writes the counts for people.
func (r *Report) PrintSummary(w io.Writer) {
	fmt.Fprintf(w, "%d events of %d keys, %d lines rejected, %d alerts\n", r.Events, r.Keys, r.Rejected, len(r.Alerts))
	for _, reason := range r.Reasons {
		fmt.Fprintf(w, "  rejected %d: %s (first: line %d)\n", reason.Count, reason.Reason, reason.First)
	}
	counts := map[string]int{}
	for _, a := range r.Alerts {
		for _, t := range a.Triggers {
			counts[t]++
		}
	}
	for _, t := range slices.Sorted(maps.Keys(counts)) {
		fmt.Fprintf(w, "  alerts with %s: %d\n", t, counts[t])
	}
}
