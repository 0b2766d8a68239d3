package detector

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/engine/enginetest"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// childURL names the NATS server in a process that is to be a detector.
const childURL = "DETECTOR_TEST_CHILD"

func TestMain(m *testing.M) {
	if url := os.Getenv(childURL); url != "" {
		if err := beDetector(url); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	enginetest.Main(m)
}

func beDetector(url string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	nc, err := nats.Connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	cfg := Config{SnapshotInterval: 20 * time.Millisecond, BaselineInterval: time.Hour}
	cfg.CacheDir = os.Getenv("DETECTOR_TEST_CACHE")
	s, err := New(ctx, cfg, run.Deps{NATS: nc, Log: slog.New(slog.DiscardHandler), Metrics: run.NewRegistry(), Bus: layout})
	if err != nil {
		return err
	}
	return s.Run(ctx)
}

func child(t testing.TB, url string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childURL+"="+url, "DETECTOR_TEST_CACHE="+t.TempDir())
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

// TestKill9 kills the detector's process at random moments under load, with a
// second replica standing by in half of them.
func TestKill9(t *testing.T) {
	t.Parallel()
	kills := 3
	if os.Getenv("LATCHKEY_TEST_LONG") != "" {
		kills = 20
	}
	events := traffic(12, 21)
	want := undisturbed(t, events, kills+1)
	server, js := serve(t)
	rnd := rand.New(rand.NewPCG(5, 6))
	for i := range kills {
		victim := child(t, server.ClientURL())
		var standby *exec.Cmd
		if i%2 == 1 {
			standby = child(t, server.ClientURL())
		}
		before := acknowledged(t, js)
		publish(t, js, part(events, i, kills+1), false)
		if share := rnd.IntN(3); share > 0 { // else at once
			eventually(t, "the detector works", func() bool { return acknowledged(t, js) > before })
		}
		_ = victim.Process.Kill()
		_ = victim.Wait()
		if standby != nil {
			_ = standby.Process.Kill()
			_ = standby.Wait()
		}
	}
	last := child(t, server.ClientURL())
	publish(t, js, part(events, kills, kills+1), false) // so that it has begun when it is told to stop
	caughtUp(t, js)
	if err := last.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := last.Wait(); err != nil {
		t.Errorf("stop: %v", err)
	}
	same(t, js, want)
}

// acknowledged is the sum of the ack floors of all partitions.
func acknowledged(t testing.TB, js jetstream.JetStream) (sum uint64) {
	t.Helper()
	for p := range partitions {
		c, err := js.Consumer(t.Context(), bus.Usage, bus.ConsumerName(bus.Detector, p))
		if err != nil {
			t.Fatal(err)
		}
		sum += c.CachedInfo().AckFloor.Stream
	}
	return sum
}

// TestAlertLatency is no test of time but shows it: from storage to alert, under load.
func TestAlertLatency(t *testing.T) {
	if os.Getenv("LATCHKEY_TEST_LONG") == "" {
		t.Skip("set LATCHKEY_TEST_LONG=1 to measure the way from event to alert")
	}
	server, js := serve(t)
	in := start(t, server)
	history := traffic(300, 21)
	publish(t, js, history, true)
	caughtUp(t, js)
	// Live: every key goes on at home and turns up elsewhere now and then.
	rate, length := 20_000, 10*time.Second
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	began, sent := time.Now(), 0
	base := history[len(history)-1].Time
	for time.Since(began) < length {
		<-ticker.C
		var batch []usage.Event
		for due := int(time.Since(began).Seconds() * float64(rate)); sent < due; sent++ {
			ev := history[len(history)-1-sent%1000]
			ev.ID, ev.Time = fmt.Sprintf("live-%d", sent), base.Add(time.Since(began))
			if sent%997 == 0 {
				ev.SourceIP = history[0].SourceIP.Next().Next().Next().Next().Next()
				ev.KeyID = fmt.Sprintf("key_%d", sent/997%300)
				ev.Route = "/v1/users"
			}
			batch = append(batch, ev)
		}
		publish(t, js, batch, false)
	}
	caughtUp(t, js)
	families, err := in.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "latchkey_detector_alert_latency_seconds" {
			continue
		}
		h := f.GetMetric()[0].GetHistogram()
		t.Logf("%d events/s sent, %d alerts", sent/int(length.Seconds()), h.GetSampleCount())
		for _, b := range h.GetBucket() {
			t.Logf("≤ %4.0f ms: %d", b.GetUpperBound()*1000, b.GetCumulativeCount())
		}
	}
}
