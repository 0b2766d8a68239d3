// Package demo is a made-up organization with a dozen keys: it loads 30 days of
// their lives, goes on in real time through the edge, and lets four of them be
// misused, so that a newcomer sees what Latchkey does about it.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/services/internal/mailbox"
)

// OwnerEmail is where the demo organization's alerts go.
const OwnerEmail = "owner@demo.example"

// checkTimeout is how long Check waits for the four mails once traffic is live.
const checkTimeout = 2 * time.Minute

// Config says what the demo runs against.
type Config struct {
	// Dir holds the demo's state.
	Dir        string
	EdgeURL    string
	ConsoleURL string
	JetStream  jetstream.JetStream
	// Mails lists the mails of the sink; nil if a real mail server is used.
	Mails *mailbox.Mailbox
	Out   io.Writer
	Log   *slog.Logger
	// Check ends the demo once each of the four attacks has led to its mail, or
	// with an error that says which has not.
	Check bool
}

type demo struct {
	cfg   Config
	out   io.Writer
	log   *slog.Logger
	state *state
	// keys are the state's as they were when the traffic began; only carryOn
	// changes the state itself.
	keys   []keyState
	client *client
	now    func() time.Time

	mu     sync.Mutex
	alerts map[string]alert.Alert // by part
	mails  map[string]string      // subject by part
}

// ErrCheck is why a check failed.
var ErrCheck = errors.New("demo check failed")

// Run loads what is missing of the history, then runs until ctx is done or, in
// a check, until the outcome is known.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Check && cfg.Mails == nil {
		return fmt.Errorf("%w: it reads the built-in mailbox, so LATCHKEY_SMTP_URL must not be set", ErrCheck)
	}
	st, err := loadState(cfg.Dir)
	if err != nil {
		return err
	}
	d := &demo{
		cfg: cfg, out: cfg.Out, log: cfg.Log.With("component", "demo"), state: st, client: newClient(cfg.EdgeURL),
		now: time.Now, alerts: map[string]alert.Alert{}, mails: map[string]string{},
	}
	if err := d.prepare(ctx); err != nil {
		return fmt.Errorf("prepare the demo: %w", err)
	}
	d.keys = slices.Clone(d.state.Keys)
	return d.live(ctx)
}

// live runs the ordinary traffic, the attacks and the watch beside each other.
func (d *demo) live(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	alerts, err := d.follow(ctx)
	if err != nil {
		return err
	}
	var (
		wg     sync.WaitGroup
		failed = make(chan error, 8)
	)
	start := func(name string, fn func(context.Context) error) {
		wg.Go(func() {
			if err := fn(ctx); err != nil && ctx.Err() == nil {
				failed <- fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	d.banner()
	start("ordinary traffic", d.carryOn)
	for _, a := range attacks() {
		start(a.part+" key", func(ctx context.Context) error { return d.attack(ctx, a) })
	}
	complete := make(chan struct{})
	start("watch", func(ctx context.Context) error { return d.watch(ctx, alerts, complete) })
	defer wg.Wait()
	defer cancel()

	deadline := make(<-chan time.Time)
	if d.cfg.Check {
		deadline = time.After(checkTimeout)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-complete:
			if d.cfg.Check {
				fmt.Fprintln(d.out, "Check passed: each of the four attacks led to its mail.")
				return nil
			}
			complete = nil
			d.say("✓ Each of the four was noticed and mailed. Ordinary traffic goes on: look at %s/alerts.", d.cfg.ConsoleURL)
		case <-deadline:
			return fmt.Errorf("%w after %s: %s", ErrCheck, checkTimeout, d.missing())
		}
	}
}

func (d *demo) banner() {
	fmt.Fprintf(d.out, "\n  Live now. Within a minute, four keys of %d are misused.\n", len(d.keys))
	fmt.Fprintf(d.out, "  Console   %s\n  Mailbox   %s/mailbox\n  Ctrl-C    ends it; the data stays\n\n", d.cfg.ConsoleURL, d.cfg.ConsoleURL)
}

// attack waits for its time, says so, and misuses the key of this run.
func (d *demo) attack(ctx context.Context, a attack) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(a.starts):
	}
	i := slices.IndexFunc(d.keys, func(k keyState) bool { return k.Part == a.part && k.Run == d.state.Runs })
	if i < 0 {
		return fmt.Errorf("no key plays %s in run %d", a.part, d.state.Runs)
	}
	k := d.keys[i]
	d.say("%s  %s %s", stamp(d.now()), k.Name, a.title)
	return d.commit(ctx, a, k)
}

func (d *demo) say(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fmt.Fprintf(d.out, "  "+format+"\n", args...)
}

// missing names each attack that has not led to its mail, and how far it came.
func (d *demo) missing() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []string
	for _, a := range attacks() {
		if d.mails[a.part] != "" {
			continue
		}
		how := "no alert was raised"
		if al, ok := d.alerts[a.part]; ok {
			how = fmt.Sprintf("alert %s was raised, but no mail arrived", al.ID)
		}
		out = append(out, fmt.Sprintf("%s key (%s): %s", a.part, a.trigger, how))
	}
	return strings.Join(out, "; ")
}

func stamp(t time.Time) string { return t.Format("15:04:05") }
