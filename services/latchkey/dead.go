package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// deadLetter is what a service could not read.
type deadLetter struct {
	// ID is its sequence in stream DEAD.
	ID      uint64    `json:"id"`
	Time    time.Time `json:"time"`
	Service string    `json:"service"`
	Reason  string    `json:"reason"`
	// Stream, Subject, Sequence and Index say where it lay; no index means the
	// whole message.
	Stream      string `json:"stream"`
	Subject     string `json:"subject"`
	Sequence    uint64 `json:"sequence"`
	Index       *int   `json:"index,omitempty"`
	ContentType string `json:"content_type"`
	Bytes       int    `json:"bytes"`
	// Body is cut after 1,000 bytes here; what is not text shows as �.
	Body string `json:"body"`

	msg *jetstream.RawStreamMsg
}

func newDeadCmd() *cobra.Command {
	var t target
	var out output
	cmd := &cobra.Command{Use: "dead", Short: "List what could not be read, or send it again"}
	t.flags(cmd)
	out.flags(cmd)
	cmd.AddCommand(newDeadListCmd(&t, &out), newDeadReplayCmd(&t, &out))
	return cmd
}

func newDeadListCmd(t *target, out *output) *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use: "list", Short: "Dead letters with their reasons, the oldest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			js, done, err := openJetStream(t)
			if err != nil {
				return err
			}
			defer done()
			letters := []deadLetter{}
			err = eachDead(cmd.Context(), js, func(d deadLetter) error {
				if limit > 0 && len(letters) == limit {
					return errEnough
				}
				letters = append(letters, d)
				return nil
			})
			if err != nil && !errors.Is(err, errEnough) {
				return err
			}
			return out.print(cmd.OutOrStdout(), letters, func(w io.Writer) { deadTable(w, letters) })
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 100, "at most this many, 0 for all")
	return cmd
}

func deadTable(w io.Writer, letters []deadLetter) {
	if len(letters) == 0 {
		fmt.Fprintln(w, "There are no dead letters.")
		return
	}
	fmt.Fprintln(w, "ID\tTIME\tSERVICE\tFROM\tREASON\tBODY")
	for _, d := range letters {
		from := d.Subject + " #" + strconv.FormatUint(d.Sequence, 10)
		if d.Index != nil {
			from += "[" + strconv.Itoa(*d.Index) + "]"
		}
		body := []rune(strings.Join(strings.Fields(d.Body), " "))
		if len(body) > 60 {
			body = append(body[:59], '…')
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\n", d.ID, d.Time.UTC().Format("2006-01-02 15:04:05"), d.Service, from, d.Reason, string(body))
	}
}

var errEnough = errors.New("enough")

// eachDead walks over the dead letters.
func eachDead(ctx context.Context, js jetstream.JetStream, fn func(deadLetter) error) error {
	s, err := js.Stream(ctx, bus.Dead)
	if err != nil {
		return fmt.Errorf("look up stream %s: %w", bus.Dead, err)
	}
	state := s.CachedInfo().State
	for seq := max(state.FirstSeq, 1); seq <= state.LastSeq; {
		m, err := s.GetMsg(ctx, seq, jetstream.WithGetMsgSubject("dead.>"))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read dead letter %d: %w", seq, err)
		}
		if err := fn(readDead(m)); err != nil {
			return err
		}
		seq = m.Sequence + 1
	}
	return nil
}

func readDead(m *jetstream.RawStreamMsg) deadLetter {
	d := deadLetter{
		ID: m.Sequence, Time: m.Time.UTC(), Service: strings.TrimPrefix(m.Subject, "dead."), Reason: m.Header.Get(bus.HeaderReason),
		Stream: m.Header.Get(bus.HeaderStream), Subject: m.Header.Get(bus.HeaderSubject), ContentType: m.Header.Get("Content-Type"),
		Bytes: len(m.Data), msg: m,
	}
	d.Sequence, _ = strconv.ParseUint(m.Header.Get(bus.HeaderSequence), 10, 64)
	if i, err := strconv.Atoi(m.Header.Get(bus.HeaderIndex)); err == nil {
		d.Index = &i
	}
	body := m.Data[:min(len(m.Data), 1000)]
	if d.Body = string(body); !utf8.Valid(body) {
		d.Body = strings.ToValidUTF8(d.Body, "\uFFFD")
	}
	return d
}

func newDeadReplayCmd(t *target, out *output) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "replay ID… | --all",
		Short: "Send dead letters to where they came from once more, and forget them here",
		Long: `Sends dead letters to their subject once more: after a service was taught to read
them, or a clock was put right. What still cannot be read comes back as a new
dead letter. Sending one twice is harmless.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return errors.New("name dead letters by their ids, or say --all")
			}
			if err := out.check(); err != nil {
				return err
			}
			wanted := map[uint64]bool{}
			for _, a := range args {
				id, err := strconv.ParseUint(a, 10, 64)
				if err != nil {
					return fmt.Errorf("%q is not the id of a dead letter", a)
				}
				wanted[id] = true
			}
			js, done, err := openJetStream(t)
			if err != nil {
				return err
			}
			defer done()
			replayed, err := replayDead(cmd.Context(), js, wanted)
			if perr := out.print(cmd.OutOrStdout(), map[string]int{"replayed": replayed}, func(w io.Writer) {
				fmt.Fprintf(w, "%d sent again\n", replayed)
			}); perr != nil {
				return perr
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every dead letter")
	return cmd
}

// replayDead sends the wanted dead letters, all if none are named.
func replayDead(ctx context.Context, js jetstream.JetStream, wanted map[uint64]bool) (int, error) {
	s, err := js.Stream(ctx, bus.Dead)
	if err != nil {
		return 0, fmt.Errorf("look up stream %s: %w", bus.Dead, err)
	}
	n, all := 0, len(wanted) == 0
	err = eachDead(ctx, js, func(d deadLetter) error {
		if !all && !wanted[d.ID] {
			return nil
		}
		delete(wanted, d.ID)
		if d.Subject == "" {
			return fmt.Errorf("dead letter %d does not say where it came from", d.ID)
		}
		msg := &nats.Msg{Subject: d.Subject, Data: d.msg.Data, Header: nats.Header{}}
		for _, name := range []string{"Content-Type", usage.HeaderMode} {
			if v := d.msg.Header.Get(name); v != "" {
				msg.Header.Set(name, v)
			}
		}
		if _, err := js.PublishMsg(ctx, msg, jetstream.WithMsgID(fmt.Sprintf("replay:%d", d.ID))); err != nil {
			return fmt.Errorf("send dead letter %d again: %w", d.ID, err)
		}
		if err := s.DeleteMsg(ctx, d.ID); err != nil {
			return fmt.Errorf("remove dead letter %d: %w", d.ID, err)
		}
		n++
		return nil
	})
	if err == nil && len(wanted) > 0 {
		for id := range wanted {
			return n, fmt.Errorf("there is no dead letter %d", id)
		}
	}
	return n, err
}
