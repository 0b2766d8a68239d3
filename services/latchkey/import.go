package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/ingest"
	"github.com/latchkey-dev/latchkey/services/internal/progress"
)

// importer is the import command.
type importer struct {
	target  target
	output  output
	opts    ingest.Options
	live    bool
	dryRun  bool
	wait    bool
	waitFor time.Duration

	js        jetstream.JetStream
	publisher *ingest.Publisher
	order     *ingest.Orderer
	summary   ingest.Summary
	file      string
	ctx       context.Context
}

func newImportCmd() *cobra.Command {
	im := &importer{}
	cmd := &cobra.Command{
		Use:   "import --format FORMAT FILE…",
		Short: "Load usage history out of files",
		Long: `Reads usage events out of files and puts them on the stream USAGE, where they are stored and learned from. They
mail nobody, unless --live says that they are today's traffic. What would be no event is left out and counted, with the
reason; importing the same file again stores nothing twice. FILE is a file (gzip or not), a folder, a glob pattern or -.

Formats:
  ndjson      one usage event a line, as documented
  cloudtrail  AWS CloudTrail: access key → key_id, account → org_id, "s3.amazonaws.com/GetObject" → route,
              "s3:GetObject" → scope, region → gateway. Calls that AWS services make with a key have no address and get ::
  nginx       combined format (key: the user of basic authentication, or one more quoted field at the end), or JSON
  caddy       JSON (key: header X-Latchkey-Key-Id of the request or the answer, user_id, or a logged credential)
  envoy       default format with "%REQ(X-LATCHKEY-KEY-ID)%" added as the last field, or JSON with key_id

A secret in a log becomes the key id "sha256:…", its hash, and goes no further. The exit code is 1 if a file could not be
read or its events not be published; records that were left out do not change it.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return im.run(cmd, args) },
	}
	f := cmd.Flags()
	f.StringVarP(&im.opts.Format, "format", "f", "", "`FORMAT` of the files: "+strings.Join(ingest.Formats(), ", "))
	f.StringVar(&im.opts.Org, "org", "", "organization `ID` of the events: of NDJSON events that name none, of all others instead of CloudTrail's account or \""+ingest.DefaultOrg+"\"")
	f.StringVar(&im.opts.Gateway, "gateway", "", "`NAME` of the gateway that wrote the logs; tells equal lines of two hosts apart")
	f.BoolVar(&im.live, "live", false, "treat the events as live traffic: alerts are mailed")
	f.BoolVar(&im.dryRun, "dry-run", false, "read and count, publish nothing")
	f.BoolVar(&im.wait, "wait", true, "wait until the collector has stored the events in ClickHouse")
	f.DurationVar(&im.waitFor, "wait-timeout", 10*time.Minute, "how long to wait for the collector")
	_ = cmd.MarkFlagRequired("format")
	im.target.flags(cmd)
	im.output.flags(cmd)
	return cmd
}

func (im *importer) run(cmd *cobra.Command, args []string) error {
	im.ctx, im.opts.Now = cmd.Context(), time.Now()
	if err := errors.Join(im.output.check(), im.opts.Check()); err != nil {
		return err
	}
	files, err := ingest.Expand(args)
	if err != nil {
		return err
	}
	if !im.dryRun {
		nc, err := im.connect()
		if err != nil {
			return err
		}
		defer nc.Close()
	}
	if err := im.readAll(files); err != nil {
		return err
	}
	if im.wait && !im.dryRun && im.summary.Imported > 0 {
		im.summary.Stored = im.await()
	}
	im.summary.Finish()
	if err := im.output.print(cmd.OutOrStdout(), &im.summary, im.summary.Print); err != nil {
		return err
	}
	if len(im.summary.Errors) > 0 {
		return fmt.Errorf("%d of %d files could not be read to their end", len(im.summary.Errors), im.summary.Files)
	}
	return nil
}

func (im *importer) connect() (*nats.Conn, error) {
	url, err := im.target.natsURL()
	if err != nil {
		return nil, err
	}
	nc, err := nats.Connect(url, nats.Name("latchkey-import"), nats.MaxReconnects(-1), nats.ReconnectWait(250*time.Millisecond))
	if err != nil {
		return nil, fmt.Errorf("connect to NATS at %s: %w (is `latchkey up` running? name its folder with --data)", url, err)
	}
	if im.js, err = jetstream.New(nc, jetstream.WithDefaultTimeout(10*time.Second)); err != nil {
		nc.Close()
		return nil, fmt.Errorf("use JetStream: %w", err)
	}
	partitions, err := bus.PartitionCount(im.ctx, im.js)
	if err != nil {
		nc.Close()
		return nil, err
	}
	im.publisher = ingest.NewPublisher(im.js, partitions, im.live)
	return nc, nil
}

// readAll publishes what the files hold, in order of time. A file that cannot be
// read is noted and costs nothing else; an error means that publishing failed.
func (im *importer) readAll(files []string) error {
	bar := progress.Start("import", ingest.Size(files), progress.Bytes)
	defer bar.Finish()
	im.order = ingest.NewOrderer(func(ev *usage.Event) error {
		if im.publisher == nil {
			return nil
		}
		return im.publisher.Add(im.ctx, ev)
	})
	for _, path := range files {
		im.file = path
		im.summary.Files++
		err := im.readFile(path, bar)
		var failed publishError
		if errors.As(err, &failed) || im.ctx.Err() != nil {
			return err
		}
		if err != nil {
			im.summary.Errors = append(im.summary.Errors, fmt.Sprintf("%s: %v", path, err))
		}
	}
	if err := im.order.Flush(); err != nil {
		return err
	}
	if im.publisher == nil {
		return nil
	}
	return im.publisher.Flush(im.ctx)
}

func (im *importer) readFile(path string, bar io.Writer) (err error) {
	f, err := ingest.OpenFile(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return ingest.Read(im.ctx, io.TeeReader(f, bar), im.opts, im)
}

// publishError tells a failure to publish from one to read.
type publishError struct{ error }

func (e publishError) Unwrap() error { return e.error }

// Event takes an event of the file being read.
func (im *importer) Event(ev *usage.Event) error {
	im.summary.Take(ev.KeyID)
	if err := im.order.Add(ev); err != nil {
		return publishError{err}
	}
	return nil
}

// LeftOut counts a record that is no event.
func (im *importer) LeftOut(place, reason string) {
	im.summary.Leave(filepath.Base(im.file)+", "+place, reason)
}

// await reports whether the collector has stored everything. That it has not is
// no failure: JetStream keeps the events until it does.
func (im *importer) await() bool {
	ctx, cancel := context.WithTimeout(im.ctx, im.waitFor)
	defer cancel()
	last := im.publisher.Last()
	bar := progress.Start("store", int64(len(last)), progress.Items)
	defer bar.Finish()
	err := ingest.AwaitReaders(ctx, im.js, bus.Usage, last,
		func(p int) string { return bus.ConsumerName(bus.Collector, p) },
		func(through int) { bar.Set(int64(through)) })
	if err != nil {
		fmt.Fprintf(os.Stderr, "The events are safe in JetStream, but not all are in ClickHouse yet: %v\n", err)
	}
	return err == nil
}
