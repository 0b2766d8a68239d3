package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/pipeline"
)

func newStatusCmd() *cobra.Command {
	var t target
	var out output
	var watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "The whole pipeline at a glance: rates, lag, last insert, owners, spool, dead letters",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			src, done, err := pipelineSource(&t)
			if err != nil {
				return err
			}
			defer done()
			for {
				if err := showStatus(cmd.Context(), cmd.OutOrStdout(), src, &out, watch); err != nil {
					if watch && cmd.Context().Err() != nil {
						return nil
					}
					return err
				}
				if !watch {
					return nil
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(time.Second):
				}
			}
		},
	}
	t.flags(cmd)
	out.flags(cmd)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it again every two seconds")
	return cmd
}

// pipelineSource connects to what a status is read from.
func pipelineSource(t *target) (pipeline.Source, func(), error) {
	js, closeNATS, err := openJetStream(t)
	if err != nil {
		return pipeline.Source{}, nil, err
	}
	db, err := openStore(t)
	if err != nil {
		closeNATS()
		return pipeline.Source{}, nil, err
	}
	edge, err := t.lookup("LATCHKEY_EDGE_URL", "edge", "http://", "http://127.0.0.1:8081")
	if err != nil {
		edge = ""
	}
	return pipeline.Source{JS: js, DB: db, Edge: edge}, func() { _ = db.Close(); closeNATS() }, nil
}

func openJetStream(t *target) (jetstream.JetStream, func(), error) {
	url, err := t.natsURL()
	if err != nil {
		return nil, nil, err
	}
	nc, err := bus.Connect(url, "latchkey-cli")
	if err != nil {
		return nil, nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		nc.Close()
		return nil, nil, fmt.Errorf("open JetStream: %w", err)
	}
	return js, nc.Close, nil
}

func showStatus(ctx context.Context, w io.Writer, src pipeline.Source, out *output, watch bool) error {
	s, err := src.Read(ctx)
	if err != nil {
		return err
	}
	if watch && out.format == "json" {
		return json.NewEncoder(w).Encode(s)
	}
	if watch {
		fmt.Fprint(w, "\x1b[H\x1b[2J")
	}
	return out.print(w, s, func(w io.Writer) { statusTable(w, s) })
}

func statusTable(w io.Writer, s *pipeline.Status) {
	full := ""
	if s.Usage.MaxBytes > 0 {
		full = fmt.Sprintf(", %.1f %% full", float64(s.Usage.Bytes)*100/float64(s.Usage.MaxBytes))
	}
	fmt.Fprintf(w, "usage stream\t%d messages, %s%s\t%.0f messages/s\n", s.Usage.Messages, size(s.Usage.Bytes), full, s.Usage.Rate)
	for _, r := range s.Readers {
		fmt.Fprintf(w, "%s\t%d events behind, %.1f s\t%d of %d partitions owned\n", r.Service, r.LagEvents, r.LagSeconds, r.Owned, len(r.Partitions))
	}
	if s.Store.Reachable {
		last := "never"
		if !s.Store.LastInsert.IsZero() {
			last = s.Store.LastInsert.UTC().Format("2006-01-02 15:04:05")
		}
		fmt.Fprintf(w, "clickhouse\t%d events, latest accepted %s\t%.0f events/s in the last minute\n", s.Store.Events, last, s.Store.Rate)
	} else {
		fmt.Fprintln(w, "clickhouse\tdoes not answer\t")
	}
	if s.Spool != nil {
		fmt.Fprintf(w, "edge spool\t%d events, %s\t\n", s.Spool.Events, size(s.Spool.Bytes))
	}
	fmt.Fprintf(w, "alerts\t%d\t\n", s.Alerts.Messages)
	fmt.Fprintf(w, "dead letters\t%d\t\n", s.Dead.Messages)
	fmt.Fprintln(w)
	fmt.Fprintln(w, "PARTITION\tCOLLECTOR LAG\tAGE\tLAST BATCH\tOWNER\tDETECTOR LAG\tAGE")
	for i, p := range s.Readers[0].Partitions {
		d := s.Readers[1].Partitions[i]
		owner, last := p.Owner, "-"
		if owner == "" || !p.Owned {
			owner = "-"
		}
		if !p.LastBatch.IsZero() {
			last = p.LastBatch.UTC().Format("15:04:05")
		}
		fmt.Fprintf(w, "%d\t%d\t%.1f s\t%s\t%s\t%d\t%.1f s\n", p.Partition, p.LagEvents, p.LagSeconds, last, owner, d.LagEvents, d.LagSeconds)
	}
	for _, problem := range s.Problems {
		fmt.Fprintf(w, "\n! %s", problem)
	}
	if len(s.Problems) > 0 {
		fmt.Fprintln(w)
	}
}

func size(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/unit, 0
	for ; f >= unit && i < 4; i++ {
		f /= unit
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTP"[i])
}
