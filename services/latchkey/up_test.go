package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/latchkey-dev/latchkey/schemas/usage"
	usagev1 "github.com/latchkey-dev/latchkey/schemas/usage/v1"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

type created struct {
	ID  string `json:"id"`
	Key string `json:"key"`
}

// ndjson is n events of a few keys; line broken, if not less than 0, is no JSON.
func ndjson(prefix string, n, broken int) *bytes.Buffer {
	var b bytes.Buffer
	begin := time.Now().Add(-time.Hour).UTC()
	for i := range n {
		if i == broken {
			b.WriteString(`{"time": "half a line` + "\n")
			continue
		}
		fmt.Fprintf(&b, `{"id":"%s-%d","time":%q,"org_id":"org_acme","key_id":"%s-key-%d","source_ip":"203.0.113.%d","method":"GET","route":"/v1/orders/{id}","status":200}`+"\n",
			prefix, i, begin.Add(time.Duration(i)*10*time.Millisecond).Format(time.RFC3339Nano), prefix, i%7, i%5)
	}
	return &b
}

type usageAnswer struct {
	Accepted int `json:"accepted"`
	Rejected []struct {
		Index int    `json:"index"`
		Error string `json:"error"`
	} `json:"rejected"`
}

// TestUp is an afternoon with `latchkey up`: a key is made, events come in by
// several ways, ClickHouse is killed, everything is stopped and started again.
func TestUp(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	in := startUp(t, dir)
	var org, gateway created
	in.runJSON(&org, "org", "create", "--name", "Acme", "--owner-email", "owner@acme.example")
	in.runJSON(&gateway, "key", "create", "--org", org.ID, "--name", "gateway", "--scopes", "usage:write")
	admin, err := os.ReadFile(filepath.Join(dir, "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	if info, _ := os.Stat(filepath.Join(dir, "admin.key")); info.Mode().Perm() != 0o600 {
		t.Errorf("admin.key has mode %v", info.Mode())
	}
	adminKey := strings.TrimSpace(string(admin))

	const n, broken = 100_000, 31_415
	var answer usageAnswer
	if status := post(t, "http://"+in.addrs["edge"]+"/v1/usage", adminKey, "application/x-ndjson", ndjson("bulk", n, broken), &answer); status != http.StatusAccepted {
		t.Fatalf("POST /v1/usage answers %d %+v", status, answer)
	}
	if answer.Accepted != n-1 || len(answer.Rejected) != 1 || answer.Rejected[0].Index != broken || answer.Rejected[0].Error == "" {
		t.Errorf("accepted %d, rejected %+v; want all but line %d", answer.Accepted, answer.Rejected, broken)
	}
	in.wantSQL("SELECT count(), uniqExact(id) FROM latchkey.usage_events WHERE startsWith(id, 'bulk-')", fmt.Sprintf("%d\t%d", n-1, n-1))

	t.Run("another tenant's key publishes nothing for Acme", func(t *testing.T) {
		var refused usageAnswer
		body := strings.NewReader(`{"time":"2026-01-02T03:04:05Z","org_id":"org_other","key_id":"k","source_ip":"192.0.2.1","route":"/"}`)
		post(t, "http://"+in.addrs["edge"]+"/v1/usage", gateway.Key, "application/json", body, &refused)
		if refused.Accepted != 0 {
			t.Errorf("accepted %d events of another organization", refused.Accepted)
		}
	})
	t.Run("NATS takes every form of event", func(t *testing.T) { publishEveryForm(t, in) })
	t.Run("ClickHouse is killed while events flow", func(t *testing.T) { killClickHouse(t, in, adminKey) })

	if took := in.interrupt(); took > 5*time.Second {
		t.Errorf("Ctrl-C took %s", took)
	}
	if left := descendants(t, dir); len(left) > 0 {
		t.Errorf("processes are left behind: %v", left)
	}
	began := time.Now()
	in = startUp(t, dir)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the second start took %s", took)
	}
	in.wantSQL("SELECT count() FROM latchkey.usage_events WHERE startsWith(id, 'bulk-')", strconv.Itoa(n-1))
	var list struct {
		Keys []created `json:"keys"`
	}
	in.runJSON(&list, "key", "list", "--org", org.ID)
	if len(list.Keys) != 1 || list.Keys[0].ID != gateway.ID {
		t.Errorf("after the restart the keys are %+v, want %s", list.Keys, gateway.ID)
	}
}

// publishEveryForm sends the same kind of event as one object, an array, NDJSON
// and protobuf to usage.raw, whose subject names another key than some events
// do, and bad ones among them.
func publishEveryForm(t *testing.T, in *installation) {
	nc, err := nats.Connect("nats://" + in.addrs["nats"])
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	event := func(id string) string {
		return fmt.Sprintf(`{"id":"form-%s","time":%q,"org_id":"org_acme","key_id":"key.%s","source_ip":"::ffff:203.0.113.9","route":"/v1/forms","unknown":[1]}`,
			id, time.Now().UTC().Format(time.RFC3339Nano), id)
	}
	protobuf, err := proto.Marshal(&usagev1.UsageBatch{Events: []*usagev1.UsageEvent{
		{Id: "form-p1", Time: timestamppb.Now(), OrgId: "org_acme", KeyId: "key.p1", SourceIp: "2001:db8::1", Route: "/v1/forms"},
		{Id: "form-p2", Time: timestamppb.Now(), OrgId: "org_acme", KeyId: "key.p2", SourceIp: "no address", Route: "/v1/forms"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct{ contentType, body string }{
		{usage.ContentTypeJSON, event("one")},
		{usage.ContentTypeJSON, "[" + event("a1") + `,{"route":"/no/key"},` + event("a2") + "]"},
		{usage.ContentTypeNDJSON, event("n1") + "\n{broken\n" + event("n2") + "\n"},
		{usage.ContentTypeProtobuf, string(protobuf)},
		{"text/plain", "what is this"},
	} {
		msg := nats.NewMsg(usage.RawSubject + usage.SubjectToken("key.one"))
		msg.Header.Set("Content-Type", m.contentType)
		msg.Data = []byte(m.body)
		if _, err := js.PublishMsg(t.Context(), msg); err != nil {
			t.Fatalf("publish %s: %v", m.contentType, err)
		}
	}
	in.wantSQL("SELECT groupArray(id) FROM (SELECT id FROM latchkey.usage_events WHERE startsWith(id, 'form-') ORDER BY id)",
		"['form-a1','form-a2','form-n1','form-n2','form-one','form-p1']")
	eventually(t, 20*time.Second, "what could not be read is in the dead letters", func() error {
		stream, err := js.Stream(t.Context(), bus.Dead)
		if err != nil {
			return err
		}
		info, err := stream.Info(t.Context())
		if err == nil && info.State.Msgs != 4 {
			err = fmt.Errorf("%d dead letters, want 4", info.State.Msgs)
		}
		return err
	})
}

// killClickHouse kills the engine with -9 twice while batches are posted: the
// edge answers each, and afterwards every event is there once.
func killClickHouse(t *testing.T, in *installation, key string) {
	ctx, cancel := context.WithCancel(t.Context())
	var (
		posted, failed atomic.Int64
		wg             sync.WaitGroup
	)
	wg.Go(func() {
		for batch := 0; ctx.Err() == nil; batch++ {
			var answer usageAnswer
			status := post(t, "http://"+in.addrs["edge"]+"/v1/usage", key, "application/x-ndjson", ndjson("kill"+strconv.Itoa(batch), 500, -1), &answer)
			if status != http.StatusAccepted || answer.Accepted != 500 {
				failed.Add(1)
			}
			posted.Add(int64(answer.Accepted))
		}
	})
	for range 2 {
		before := posted.Load()
		eventually(t, 20*time.Second, "events flow", func() error {
			if posted.Load() < before+5_000 {
				return errors.New("not yet")
			}
			return nil
		})
		pids := descendants(t, in.dir)
		if len(pids) != 1 {
			t.Fatalf("the engine should be the only child process, found %v", pids)
		}
		if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, 30*time.Second, "ClickHouse is back", func() error {
			_, err := in.sql("SELECT 1")
			return err
		})
	}
	cancel()
	wg.Wait()
	if failed.Load() > 0 {
		t.Errorf("the edge failed %d times", failed.Load())
	}
	want := fmt.Sprintf("%d\t%d", posted.Load(), posted.Load())
	in.wantSQL("SELECT count(), uniqExact(id) FROM latchkey.usage_events WHERE startsWith(id, 'kill')", want)
	in.wantSQL("SELECT sum(events) FROM latchkey.usage_hourly WHERE startsWith(key_id, 'kill')", strconv.FormatInt(posted.Load(), 10))
}

// descendants are the processes that run the test's binary on a data directory,
// other than `latchkey up` itself.
func descendants(t *testing.T, dir string) []int {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(procs) == 0 {
		t.Skip("needs /proc to see processes")
	}
	var pids []int
	for _, p := range procs {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		exe, err := os.Readlink(filepath.Join(filepath.Dir(p), "exe"))
		if err != nil || exe != binary {
			continue
		}
		cmdline, _ := os.ReadFile(p)
		environ, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "environ"))
		if !bytes.Contains(cmdline, []byte("\x00up\x00")) && bytes.Contains(environ, []byte(dir)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestUpRefusesASecondOne shows what a person sees who starts it twice.
func TestUpRefusesASecondOne(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	unlock, err := lockData(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	p := startProcess(t, nil, "up", "--data", dir)
	<-p.done
	if p.cmd.ProcessState.ExitCode() != 1 || !strings.Contains(p.output(), "another `latchkey up` uses") {
		t.Errorf("exit code %d, output %q", p.cmd.ProcessState.ExitCode(), p.output())
	}
}

// TestDemoCheck is what scripts/demo --check does, and a second start of the
// same demo.
func TestDemoCheck(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes two minutes")
	}
	dir := t.TempDir()
	for range 2 {
		p := startProcess(t, nil, append([]string{"up", "--demo", "--check", "--data", dir}, anyPorts...)...)
		<-p.done
		if code := p.cmd.ProcessState.ExitCode(); code != 0 {
			t.Fatalf("exit code %d", code)
		}
	}
}
