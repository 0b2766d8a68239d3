package edge

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// BenchOptions say what [Bench] measures.
type BenchOptions struct {
	Keys    int           // in the stream, all of them loaded
	Round   time.Duration // of one measurement; several are made of each, in turns
	Clients int           // connections that ask forward-auth at once
	Spool   string        // directory
	Say     func(format string, args ...any)
}

// BenchReport is what [Bench] measured. Of several rounds in turns the best
// counts, and ratios are of those of one run.
type BenchReport struct {
	Keys         int     `json:"keys"`
	StartSeconds float64 `json:"start_seconds"` // from New to every key loaded
	BytesPerKey  float64 `json:"bytes_per_key"`

	SHA256Ns      float64 `json:"sha256_ns"` // bare, of the same keys
	DecideNs      float64 `json:"verify_scope_enqueue_ns"`
	DecideRatio   float64 `json:"verify_scope_enqueue_per_sha256"`
	DecideAllocs  float64 `json:"verify_scope_enqueue_allocs"`
	HotSHA256Ns   float64 `json:"one_key_sha256_ns"`
	HotDecideNs   float64 `json:"one_key_verify_scope_enqueue_ns"`
	HotRatio      float64 `json:"one_key_verify_scope_enqueue_per_sha256"`
	BareRequests  float64 `json:"bare_200_requests_per_second"`
	AuthRequests  float64 `json:"forward_auth_requests_per_second"`
	AuthRatio     float64 `json:"forward_auth_per_bare_200"`
	EventsStored  float64 `json:"events_stored"` // of the forward-auth rounds
	EventsDropped float64 `json:"events_dropped"`
}

// Bench measures an edge against an empty JetStream: the start with many keys,
// one decision, and forward-auth over HTTP beside a handler that only says 200.
func Bench(ctx context.Context, nc *nats.Conn, o BenchOptions) (BenchReport, error) {
	report := BenchReport{Keys: o.Keys}
	js, err := jetstream.New(nc)
	if err != nil {
		return report, fmt.Errorf("open JetStream: %w", err)
	}
	if err := bus.Ensure(ctx, js, bus.Config{}); err != nil {
		return report, err
	}
	o.Say("publishing %d keys", o.Keys)
	secrets, err := publishSamples(ctx, js, o.Keys)
	if err != nil {
		return report, err
	}
	o.Say("starting an edge with %d keys", o.Keys)
	s, stop, err := benchStart(ctx, nc, o, &report)
	if err != nil {
		return report, err
	}
	o.Say("deciding")
	if err := s.benchDecide(o, secrets, &report); err != nil {
		return report, errors.Join(err, stop())
	}
	o.Say("forward-auth beside a handler that only says 200")
	err = s.benchAuth(ctx, o, secrets, &report)
	return report, errors.Join(err, stop())
}

// sampleChange is the message about the i-th of many made-up keys, of the size
// that real ones have.
func sampleChange(i int, hash apikey.Hash) []byte {
	return fmt.Appendf(nil, `{"id":"evt_%026d","type":"api_key.created","time":"2026-11-21T12:00:00Z","actor":"key_admin","actor_ip":"203.0.113.7",`+
		`"record":{"id":%q,"org_id":"org_%d","name":"integration %d","hash":%q,"prefix":"lk_live_%04x","environment":"live",`+
		`"scopes":["orders:read","orders:write"],"status":"active","created_at":"2026-11-21T12:00:00Z","rotation_days":90}}`,
		i, sampleID(i), i%1000, i, hash.String(), i&0xffff)
}

func sampleID(i int) string { return fmt.Sprintf("key_%026d", i) }

// benchSecrets is how many keys the decisions are spread over.
const benchSecrets = 1 << 16

func publishSamples(ctx context.Context, js jetstream.JetStream, n int) ([]string, error) {
	var secrets []string
	for i := range n {
		k, err := apikey.Generate(apikey.Live)
		if err != nil {
			return nil, fmt.Errorf("generate key: %w", err)
		}
		if len(secrets) < benchSecrets {
			secrets = append(secrets, k.Secret())
		}
		if _, err := js.PublishAsync(bus.KeySubject(sampleID(i)), sampleChange(i, apikey.Sum(k.Secret())), jetstream.WithStallWait(time.Minute)); err != nil {
			return nil, fmt.Errorf("publish key: %w", err)
		}
	}
	select {
	case <-js.PublishAsyncComplete():
		return secrets, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func benchStart(ctx context.Context, nc *nats.Conn, o BenchOptions, report *BenchReport) (*Service, func() error, error) {
	cfg := DefaultConfig()
	cfg.Addr, cfg.GRPCAddr, cfg.Spool = "127.0.0.1:0", "", o.Spool
	before := heapBytes()
	began := time.Now()
	s, err := New(ctx, cfg, run.Deps{NATS: nc})
	if err != nil {
		return nil, nil, err
	}
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- s.Run(runCtx) }()
	stop := func() error {
		cancel()
		return <-done
	}
	select {
	case <-s.Loaded():
	case <-ctx.Done():
		return nil, nil, errors.Join(ctx.Err(), stop())
	}
	report.StartSeconds = time.Since(began).Seconds()
	report.BytesPerKey = float64(heapBytes()-before) / float64(max(o.Keys, 1))
	return s, stop, nil
}

func heapBytes() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// discardStore takes the frames of the decision rounds.
type discardStore struct{ memoryStore }

func (*discardStore) append(frame) error { return nil }

// benchDecide measures verify, scope and enqueue as a request does them, in turns
// with the bare hash of the same keys. What is enqueued is flushed between the
// rounds, off the clock: it is another goroutine's work.
func (s *Service) benchDecide(o BenchOptions, secrets []string, report *BenchReport) error {
	// Short bursts, of which the best counts: on a machine that others use too,
	// some go undisturbed, and the figure is that of the code.
	const burst = 4096
	box := &outbox{
		opts: outboxOptions{queue: 4 * burst}, pack: s.live, store: &discardStore{}, metrics: s.metrics, tally: newTally(),
		full: make(chan struct{}, 1), fresh: make(chan struct{}, 1),
		queue: make([]usage.Event, 0, 4*burst), spare: make([]usage.Event, 0, 4*burst),
	}
	e := edge.New(s.keys, edge.Options{Recorder: box, Gateway: "bench"})
	need := edge.Require("orders:write")
	source := netip.MustParseAddr("203.0.113.7")
	denied := 0
	decide := func(secret string) {
		now := time.Now()
		v := e.DecideAt(now, secret, source, need)
		if !v.Allowed() {
			denied++
		}
		e.Record(v, need, &usage.Event{Time: now, SourceIP: source, Method: "POST", Route: "/v1/orders/{id}", UserAgent: "bench/1"})
	}
	var sink byte
	hash := func(secret string) {
		h := apikey.Sum(secret)
		sink ^= h[0]
	}
	var hashes, decisions, hotHashes, hotDecisions, allocs []float64
	next := 0 // the keys take turns, so that each is met cold
	for deadline := time.Now().Add(4 * o.Round); time.Now().Before(deadline) || len(decisions) < 50; next += burst {
		for _, part := range []struct {
			ns   *[]float64
			what func(string)
			hot  bool
		}{{&hashes, hash, false}, {&decisions, decide, false}, {&hotHashes, hash, true}, {&hotDecisions, decide, true}} {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			began := time.Now()
			for i := range burst {
				if part.hot {
					part.what(secrets[0])
				} else {
					part.what(secrets[(next+i)%len(secrets)])
				}
			}
			*part.ns = append(*part.ns, float64(time.Since(began).Nanoseconds())/burst)
			runtime.ReadMemStats(&after)
			if part.ns == &decisions {
				allocs = append(allocs, float64(after.Mallocs-before.Mallocs)/burst)
			}
			box.flush()
		}
	}
	if denied > 0 {
		return fmt.Errorf("%d decisions denied a good key", denied)
	}
	report.SHA256Ns, report.DecideNs = slices.Min(hashes), slices.Min(decisions)
	report.HotSHA256Ns, report.HotDecideNs = slices.Min(hotHashes), slices.Min(hotDecisions)
	report.DecideRatio = report.DecideNs / report.SHA256Ns
	report.HotRatio = report.HotDecideNs / report.HotSHA256Ns
	// Other goroutines allocate now and then; a decision that did would show every time.
	report.DecideAllocs = float64(int(slices.Min(allocs)))
	runtime.KeepAlive(sink)
	return nil
}

// benchAuth measures forward-auth requests in turns with requests to a handler
// that only returns 200, by the same clients over the same kind of connections.
func (s *Service) benchAuth(ctx context.Context, o BenchOptions, secrets []string, report *BenchReport) error {
	bare, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusOK)
	})}
	go func() { _ = server.Serve(bare) }()
	defer server.Close()
	var rates [2][]float64
	for range 8 {
		for i, addr := range []string{bare.Addr().String(), s.Addr()} {
			rate, err := load(ctx, addr, secrets, o)
			if err != nil {
				return err
			}
			rates[i] = append(rates[i], rate)
		}
	}
	report.BareRequests, report.AuthRequests = slices.Max(rates[0]), slices.Max(rates[1])
	report.AuthRatio = report.AuthRequests / report.BareRequests
	for ctx.Err() == nil && !s.outbox.drained() {
		runtime.Gosched()
	}
	report.EventsStored = counterValue(s.metrics.published)
	for _, d := range s.metrics.drops {
		report.EventsDropped += counterValue(d.count)
	}
	return nil
}

// load asks addr for a while, as a gateway with keep-alive connections does, and
// returns requests per second.
func load(ctx context.Context, addr string, secrets []string, o BenchOptions) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, o.Round)
	defer cancel()
	var total atomic.Int64
	errs := make([]error, o.Clients)
	var wg sync.WaitGroup
	began := time.Now()
	for c := range o.Clients {
		wg.Go(func() {
			n, err := client(ctx, addr, secrets[c%len(secrets)])
			total.Add(n)
			errs[c] = err
		})
	}
	wg.Wait()
	return float64(total.Load()) / time.Since(began).Seconds(), errors.Join(errs...)
}

func client(ctx context.Context, addr, secret string) (int64, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return 0, fmt.Errorf("dial: %w", err)
	}
	defer conn.Close()
	request := authRequest(secret)
	in := bufio.NewReader(conn)
	for n := int64(0); ; n++ {
		if ctx.Err() != nil {
			return n, nil // the round is over
		}
		if _, err := conn.Write(request); err != nil {
			return n, fmt.Errorf("ask: %w", err)
		}
		if err := readOK(in); err != nil {
			return n, err
		}
	}
}

// authRequest is what a gateway asks about one request.
func authRequest(secret string) []byte {
	return []byte("GET /auth HTTP/1.1\r\nHost: api.example.com\r\nAuthorization: Bearer " + secret +
		"\r\nX-Forwarded-Method: POST\r\nX-Forwarded-Uri: /v1/orders/all?page=2\r\nX-Forwarded-For: 203.0.113.7\r\nUser-Agent: bench/1\r\n\r\n")
}

// readOK reads an answer without a body and demands that it is 200.
func readOK(in *bufio.Reader) error {
	line, err := in.ReadSlice('\n')
	if err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	if !bytes.Contains(line, []byte(" 200 ")) {
		return fmt.Errorf("answer is %q", line)
	}
	for len(line) > 2 {
		if line, err = in.ReadSlice('\n'); err != nil {
			return fmt.Errorf("read answer: %w", err)
		}
	}
	return nil
}
