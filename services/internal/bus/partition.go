package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// ErrLost says that another process owns the partition now, or that nobody
// knows: what was fetched and is not acknowledged will be fetched again by
// whoever owns it next.
var ErrLost = errors.New("partition is lost")

const (
	// group is the priority group that pins a consumer to one client.
	group = "owner"
	// pinnedTTL is how long a silent owner keeps its partition.
	pinnedTTL = 5 * time.Second
	// pullWait is how long one pull request waits at the server; it renews the pin.
	pullWait = time.Second
	// ackWait only matters to an owner that is stuck: a new owner resets the
	// consumer and waits for nothing.
	ackWait = 6 * time.Hour
)

// ConsumerName is the durable consumer of a service on a partition of USAGE.
func ConsumerName(service string, partition int) string {
	return service + "-" + strconv.Itoa(partition)
}

func partitionConsumer(service string, partition int) jetstream.ConsumerConfig {
	cfg := singleConsumer(service, usage.Subject(partition))
	cfg.Durable = ConsumerName(service, partition)
	return cfg
}

// singleConsumer is read by one client at a time, in order.
func singleConsumer(service, subject string) jetstream.ConsumerConfig {
	return jetstream.ConsumerConfig{
		Durable: service, FilterSubject: subject, DeliverPolicy: jetstream.DeliverAllPolicy,
		AckPolicy: jetstream.AckAllPolicy, AckWait: ackWait, MaxDeliver: -1, MaxAckPending: -1,
		PriorityPolicy: jetstream.PriorityPolicyPinned, PriorityGroups: []string{group}, PinnedTTL: pinnedTTL,
	}
}

func ensureConsumer(ctx context.Context, js jetstream.JetStream, stream string, cfg jetstream.ConsumerConfig) error {
	if c, err := js.Consumer(ctx, stream, cfg.Durable); err == nil {
		have := c.CachedInfo().Config
		if have.PinnedTTL == cfg.PinnedTTL && have.AckWait == cfg.AckWait && have.FilterSubject == cfg.FilterSubject {
			return nil
		}
	}
	if _, err := js.CreateOrUpdateConsumer(ctx, stream, cfg); err != nil {
		return fmt.Errorf("create consumer %s of %s: %w", cfg.Durable, stream, err)
	}
	return nil
}

// Options of [Partitions] and [Single].
type Options struct {
	Log *slog.Logger
	// Owned is told when a partition was taken or lost; may be nil.
	Owned func(partition int, owned bool)
}

// Partitions competes for every partition of USAGE on behalf of a service
// ("collector" or "detector") and calls own, in a goroutine of its own, for each
// that it is given, as long as JetStream holds this process to be its one
// reader. own begins with [Partition.Reset] to where it wants to read on, then
// fetches and acknowledges until ctx is done or a call returns [ErrLost], and
// returns; its other errors are logged and the partition is asked for again.
//
// A dead owner's partitions move to others about 5 s after its last fetch. A
// former owner may not know for as long: what it does meanwhile must be guarded
// elsewhere (the collector's intents, the detector's compare-and-set).
//
// Partitions returns when ctx is done and every own has returned.
func Partitions(ctx context.Context, js jetstream.JetStream, service string, opts Options, own func(ctx context.Context, p *Partition) error) error {
	n, err := PartitionCount(ctx, js)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for i := range n {
		p := &Partition{
			Number: i, Count: n, Stream: Usage, Consumer: ConsumerName(service, i),
			js: js, nc: js.Conn(), log: opts.logger().With("partition", i),
		}
		wg.Go(func() { p.compete(ctx, opts, own) })
	}
	wg.Wait()
	return nil
}

// Single is [Partitions] for a stream that one replica of a service reads as a
// whole: ALERTS, KEYS, AUDIT or BASELINES by the collector.
func Single(ctx context.Context, js jetstream.JetStream, service, stream string, opts Options, own func(ctx context.Context, p *Partition) error) error {
	p := &Partition{Count: 1, Stream: stream, Consumer: service, js: js, nc: js.Conn(), log: opts.logger().With("stream", stream)}
	p.compete(ctx, opts, own)
	return nil
}

func (o Options) logger() *slog.Logger {
	if o.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return o.Log
}

// Partition is one partition of a stream, read in order by this process alone.
// Its methods are for the goroutine that own runs in, except [Partition.Touch].
type Partition struct {
	// Number is which of the Count partitions it is.
	Number, Count int
	// Stream and Consumer name its consumer in JetStream.
	Stream, Consumer string

	js  jetstream.JetStream
	nc  *nats.Conn
	log *slog.Logger

	pin     string
	sub     *nats.Subscription
	inbox   string
	asked   uint64 // requests so far; each has a reply subject of its own
	next    uint64 // delivery sequence that must come next
	last    uint64 // stream sequence of the last message handed out
	acked   uint64 // stream sequence of the last acknowledgment
	checked time.Time
	sure    bool // the acknowledgment was seen to have counted
}

// Message is one message of a partition.
type Message struct {
	// Sequence is the message's place in its stream.
	Sequence uint64
	// Time is when JetStream stored it.
	Time    time.Time
	Subject string
	Header  nats.Header
	Data    []byte
	// Pending is how many more of this partition waited when it was delivered.
	Pending uint64

	ack      string
	delivery uint64
}

func (p *Partition) compete(ctx context.Context, opts Options, own func(context.Context, *Partition) error) {
	defer p.close()
	for ctx.Err() == nil {
		// Whoever still has the pin begins anew with it: giving it back would only
		// pass the partition to and fro.
		if err := p.await(ctx); err != nil {
			if ctx.Err() != nil {
				return
			}
			p.log.Debug("wait for the partition", "error", err)
			pause(ctx, 500*time.Millisecond)
			continue
		}
		p.log.Debug("partition taken")
		if opts.Owned != nil {
			opts.Owned(p.Number, true)
		}
		err := own(ctx, p)
		if opts.Owned != nil {
			opts.Owned(p.Number, false)
		}
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, ErrLost):
			p.log.Info("partition lost", "reason", err)
			if p.pin != "" {
				pause(ctx, 100*time.Millisecond)
			}
		case err != nil:
			p.log.Error("partition given up, will be taken again", "error", err)
			pause(ctx, time.Second)
		}
	}
	p.release()
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// await returns once JetStream has pinned the consumer to this client, which it
// says with the first message; that message is read again after the reset.
func (p *Partition) await(ctx context.Context) error {
	if p.pin != "" {
		return nil
	}
	if err := p.subscribe(); err != nil {
		return err
	}
	for {
		msgs, err := p.pull(ctx, pullRequest{Batch: 1, Expires: 3 * time.Second})
		if err != nil {
			return err
		}
		if len(msgs) > 0 && p.pin != "" {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.recall(ctx); err != nil {
			return err
		}
	}
}

// recall asks for what a dead owner fetched and never acknowledged. No message
// would come otherwise, and so no pin, until somebody publishes a new one.
func (p *Partition) recall(ctx context.Context) error {
	info, err := p.Info(ctx)
	if err != nil {
		return err
	}
	owned := len(info.PriorityGroups) > 0 && info.PriorityGroups[0].PinnedClientID != ""
	if owned || info.NumPending > 0 || info.NumAckPending == 0 {
		return nil
	}
	if _, err := p.js.ResetConsumer(ctx, p.Stream, p.Consumer); err != nil {
		return fmt.Errorf("reset consumer %s: %w", p.Consumer, err)
	}
	return nil
}

// subscribe starts with an inbox of its own, so that nothing asked for earlier arrives.
func (p *Partition) subscribe() error {
	p.close()
	p.inbox = p.nc.NewInbox() + "."
	sub, err := p.nc.SubscribeSync(p.inbox + "*")
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	// Requests bound what can wait here.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return fmt.Errorf("lift pending limits: %w", err)
	}
	p.sub = sub
	return nil
}

func (p *Partition) close() {
	if p.sub != nil {
		_ = p.sub.Unsubscribe()
		p.sub = nil
	}
}

// release gives the partition back at once instead of when the pin runs out.
func (p *Partition) release() {
	p.close()
	pin := p.pin
	if pin == "" {
		return
	}
	p.pin = ""
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	// Another owner's pin is not ours to take away.
	info, err := p.Info(ctx)
	if err != nil || !slices.ContainsFunc(info.PriorityGroups, func(g jetstream.PriorityGroupState) bool { return g.PinnedClientID == pin }) {
		return
	}
	if s, err := p.js.Stream(ctx, p.Stream); err == nil {
		_ = s.UnpinConsumer(ctx, p.Consumer, group)
	}
}

// Info asks JetStream for the consumer's state.
func (p *Partition) Info(ctx context.Context) (*jetstream.ConsumerInfo, error) {
	c, err := p.js.Consumer(ctx, p.Stream, p.Consumer)
	if err != nil {
		return nil, fmt.Errorf("look up consumer %s: %w", p.Consumer, err)
	}
	return c.CachedInfo(), nil
}

// AckFloor is the stream sequence up to which everything is acknowledged.
func (p *Partition) AckFloor(ctx context.Context) (uint64, error) {
	info, err := p.Info(ctx)
	if err != nil {
		return 0, err
	}
	return info.AckFloor.Stream, nil
}

// Reset makes the message at stream sequence seq, or the first behind it, the
// next one to be fetched, and all before it acknowledged.
func (p *Partition) Reset(ctx context.Context, seq uint64) error {
	seq = max(seq, 1)
	if _, err := p.js.ResetConsumerToSequence(ctx, p.Stream, p.Consumer, seq); err != nil {
		return fmt.Errorf("reset consumer %s to %d: %w", p.Consumer, seq, err)
	}
	if err := p.subscribe(); err != nil {
		return err
	}
	p.next, p.last, p.acked = 1, seq-1, 0
	return nil
}

// Fetch returns messages in the order of the stream, without gaps: up to count
// of them and about maxBytes, those that are there, or the first that comes
// within wait; none after it, which is no error.
func (p *Partition) Fetch(ctx context.Context, count, maxBytes int, wait time.Duration) ([]*Message, error) {
	deadline := time.Now().Add(wait)
	for {
		msgs, err := p.pull(ctx, pullRequest{Batch: count, MaxBytes: maxBytes, NoWait: true})
		if err == nil && len(msgs) == 0 && ctx.Err() == nil {
			left := time.Until(deadline)
			if left <= 0 {
				return nil, p.confirm(ctx)
			}
			msgs, err = p.pull(ctx, pullRequest{Batch: 1, Expires: max(min(left, pullWait), 10*time.Millisecond)})
		}
		if err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if len(msgs) == 0 {
			continue
		}
		good, err := p.inOrder(ctx, msgs)
		if err != nil {
			return nil, err
		}
		if len(good) > 0 {
			return good, nil
		}
	}
}

// inOrder keeps the messages up to a gap in the deliveries (a connection that
// broke in between) and, at a gap, asks for the rest again.
func (p *Partition) inOrder(ctx context.Context, msgs []*Message) ([]*Message, error) {
	for i, m := range msgs {
		if m.delivery != p.next || m.Sequence <= p.last {
			p.log.Info("deliveries have a gap, reading again", "sequence", p.last+1)
			return msgs[:i], p.Reset(ctx, p.last+1)
		}
		p.next, p.last = m.delivery+1, m.Sequence
	}
	return msgs, nil
}

// Ack acknowledges m and all before it, and returns once JetStream has it.
func (p *Partition) Ack(ctx context.Context, m *Message) error {
	actx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := p.nc.RequestWithContext(actx, m.ack, []byte("+ACK")); err != nil {
		return fmt.Errorf("acknowledge %d: %w", m.Sequence, err)
	}
	p.acked, p.sure = m.Sequence, false
	if time.Since(p.checked) < 10*time.Second {
		return nil
	}
	return p.confirm(actx)
}

// confirm looks whether the last acknowledgment counted. One of a former owner
// that comes after our reset makes JetStream ignore ours, without telling. That
// is rare, so looking now and then, and when there is nothing else to do, is
// enough.
func (p *Partition) confirm(ctx context.Context) error {
	if p.acked == 0 || p.sure {
		return nil
	}
	floor, err := p.AckFloor(ctx)
	if err != nil {
		return err
	}
	p.checked = time.Now()
	if floor < p.acked {
		return fmt.Errorf("%w: acknowledged %d, but the floor is %d", ErrLost, p.acked, floor)
	}
	p.sure = true
	return nil
}

// Touch keeps the partition for another few seconds without fetching anything;
// for an owner that is busy with what it has. Errors do not matter: the next
// Fetch tells.
func (p *Partition) Touch() {
	// A request for at most one byte is refused, yet renews the pin.
	req, _ := json.Marshal(pullRequest{Batch: 1, MaxBytes: 1, NoWait: true, Group: group, Pin: p.pin})
	_ = p.nc.PublishRequest(p.nextSubject(), p.nc.NewInbox(), req)
}

// pullRequest is the body of CONSUMER.MSG.NEXT.
type pullRequest struct {
	Batch    int           `json:"batch"`
	MaxBytes int           `json:"max_bytes,omitempty"`
	Expires  time.Duration `json:"expires,omitempty"`
	NoWait   bool          `json:"no_wait,omitempty"`
	Group    string        `json:"group,omitempty"`
	Pin      string        `json:"id,omitempty"`
}

func (p *Partition) nextSubject() string {
	return "$JS.API.CONSUMER.MSG.NEXT." + p.Stream + "." + p.Consumer
}

// pull sends one request and returns what came until the server says that it is
// answered. nats.go's own Fetch does this with a new subscription and two
// channels a request, and hides the delivery sequence.
func (p *Partition) pull(ctx context.Context, req pullRequest) ([]*Message, error) {
	req.Group, req.Pin = group, p.pin
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encode pull request: %w", err)
	}
	p.asked++
	reply := p.inbox + strconv.FormatUint(p.asked, 10)
	if err := p.nc.PublishRequest(p.nextSubject(), reply, body); err != nil {
		return nil, fmt.Errorf("pull: %w", err)
	}
	// The server answers within Expires; a broken connection never does.
	deadline := time.Now().Add(req.Expires + 2*time.Second)
	var msgs []*Message
	for len(msgs) < req.Batch {
		m, err := p.nextMsg(ctx, deadline)
		if err != nil || m == nil {
			return msgs, err
		}
		if len(m.Data) == 0 {
			if status := m.Header.Get("Status"); status != "" {
				if m.Subject != reply {
					// Of an earlier request: one that got all that it asked for is
					// told of its end behind its last message.
					continue
				}
				done, err := pullStatus(status, m.Header.Get("Description"))
				if errors.Is(err, ErrLost) {
					p.pin = ""
				}
				if err != nil {
					return nil, err
				}
				if done {
					return msgs, nil
				}
				continue
			}
		}
		if pin := m.Header.Get("Nats-Pin-Id"); pin != "" {
			p.pin = pin
		}
		msg, err := parseMessage(m)
		if err != nil {
			return nil, err
		}
		msgs = append(msgs, msg)
	}
	return msgs, nil
}

// nextMsg is the next message of the subscription, nil once the deadline passed.
func (p *Partition) nextMsg(ctx context.Context, deadline time.Time) (*nats.Msg, error) {
	for {
		// Short waits let the context in without a goroutine for each message.
		m, err := p.sub.NextMsg(min(time.Until(deadline), 200*time.Millisecond))
		switch {
		case err == nil:
			return m, nil
		case !errors.Is(err, nats.ErrTimeout):
			return nil, fmt.Errorf("read message: %w", err)
		case ctx.Err() != nil || time.Now().After(deadline):
			return nil, nil
		}
	}
}

// pullStatus tells whether a status message ends a pull request.
func pullStatus(status, description string) (done bool, err error) {
	switch status {
	case "100": // idle heartbeat
		return false, nil
	case "404", "408": // no more messages, or the wait is over
		return true, nil
	case "423":
		return true, fmt.Errorf("%w: %s", ErrLost, description)
	case "409":
		if strings.Contains(strings.ToLower(description), "exceed") || strings.Contains(description, "Batch Completed") {
			return true, nil
		}
		return true, fmt.Errorf("%w: %s", ErrLost, description)
	}
	return true, fmt.Errorf("pull refused: %s %s", status, description)
}

// parseMessage reads the reply subject:
// $JS.ACK.[<domain>.<account hash>.]<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>[.<token>].
func parseMessage(m *nats.Msg) (*Message, error) {
	tokens := strings.Split(m.Reply, ".")
	switch {
	case len(tokens) == 9 && tokens[0] == "$JS":
		tokens = tokens[4:]
	case len(tokens) >= 11 && tokens[0] == "$JS":
		tokens = tokens[6:]
	default:
		return nil, fmt.Errorf("message has no JetStream reply subject but %q", m.Reply)
	}
	var n [5]uint64
	for i := range n {
		v, err := strconv.ParseUint(tokens[i], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("read reply subject %q: %w", m.Reply, err)
		}
		n[i] = v
	}
	return &Message{
		Sequence: n[1], delivery: n[2], Time: time.Unix(0, int64(n[3])).UTC(), Pending: n[4],
		Subject: m.Subject, Header: m.Header, Data: m.Data, ack: m.Reply,
	}, nil
}
