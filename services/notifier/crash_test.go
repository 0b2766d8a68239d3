package notifier

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// childEnv makes the test binary a notifier that others may kill.
const childEnv = "LATCHKEY_TEST_NOTIFIER"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		fmt.Fprintln(os.Stderr, "notifier ended:", childMain())
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/nats-io/nats-server/v2/server.(*Account).sendSubscription"))
}

func childMain() error {
	var cfg Config
	if err := run.Load(&cfg); err != nil {
		return err
	}
	return run.Service(context.Background(), "notifier", func(ctx context.Context, deps run.Deps) (run.Runner, error) {
		return New(ctx, cfg, deps)
	})
}

// kill ends a process at once; it may have ended before.
func kill(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// A notifier that is killed with -9 again and again, at any moment: every alert
// reaches the owner, and none twice.
func TestKilledAgainAndAgain(t *testing.T) {
	t.Parallel()
	server := natstest.Start(t)
	nc := natstest.Connect(t, server)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if err := bus.Ensure(t.Context(), js, bus.Config{Replicas: 1, Partitions: 1}); err != nil {
		t.Fatal(err)
	}
	h, box := &house{t, nc, js}, startMailbox(t)
	h.put(bus.Orgs, "org_acme", testOrg)
	start := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"=1", "LATCHKEY_NATS_URL=nats://"+server.Addr(), "LATCHKEY_PARTITIONS=1", "LATCHKEY_SMTP_URL="+box.SMTPURL(),
			"LATCHKEY_MAIL_TIMEOUT=1s", "LATCHKEY_WEBHOOK_TIMEOUT=1s", "LATCHKEY_MAIL_MAX_PER_HOUR=1000", "LATCHKEY_NOTIFY_RETRY_MIN=10ms")
		cmd.Stderr = os.Stderr
		cmd.Env = append(cmd.Env, "LATCHKEY_LOG_LEVEL=error")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { kill(cmd) })
		return cmd
	}
	const alerts = 120
	kills := 4
	if os.Getenv("LATCHKEY_TEST_LONG") != "" {
		kills = 30
	}
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // where to kill, repeatably
	for i := range kills {
		cmd := start()
		for n := i * alerts / kills; n < (i+1)*alerts/kills; n++ {
			h.alert(numbered(n))
		}
		// Once the first of these is on its way, any moment will do.
		h.delivery(fmt.Sprintf("alert.alrt_%d", i*alerts/kills), delivery.Pending, delivery.Sent)
		time.Sleep(time.Duration(random.IntN(int(40 * time.Millisecond))))
		kill(cmd)
	}
	start()
	for n := range alerts {
		h.delivery(fmt.Sprintf("alert.alrt_%d", n), delivery.Sent)
	}
	seen := map[string]bool{}
	for _, s := range box.List() {
		m, err := box.Get(s.ID)
		if err != nil {
			t.Fatal(err)
		}
		id := m.Headers["X-Latchkey-Alert-Id"][0]
		if seen[id] {
			t.Errorf("the owner sees two mails about %s", id)
		}
		seen[id] = true
	}
	if len(seen) != alerts {
		t.Errorf("%d alerts reached the owner, want %d", len(seen), alerts)
	}
}
