package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	natsserver "github.com/nats-io/nats-server/v2/server"

	"github.com/latchkey-dev/latchkey/services/internal/engine"
	"github.com/latchkey-dev/latchkey/services/internal/mailbox"
	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// TestSeparateServices runs each service as a process of its own, as the compose
// file does: against one NATS server with deploy/nats/nats.conf, so that every
// service has to do with its own user's permissions, one ClickHouse and a mail
// server. A stolen key's event comes in at the edge; its mail must arrive.
func TestSeparateServices(t *testing.T) {
	sent := startMailServer(t)
	natsURL := startNATSWithUsers(t)
	ch, err := engine.Start(t.Context(), engine.Config{
		DataDir: t.TempDir(), NativeAddr: "127.0.0.1:0", HTTPAddr: "127.0.0.1:0", MemoryLimit: 2 << 30,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ch.Close() })
	clickhouse := "LATCHKEY_CLICKHOUSE_URL=" + ch.URL("latchkey")
	dir := t.TempDir()
	keysAddr, edgeAddr, consoleAddr := freeAddr(t), freeAddr(t), freeAddr(t)

	migrate := startProcess(t, []string{clickhouse}, "migrate", "up")
	<-migrate.done
	if migrate.cmd.ProcessState.ExitCode() != 0 {
		t.Fatal("migrate failed")
	}
	adminPath := filepath.Join(dir, "admin.key")
	running := startServices(t, natsURL, map[string][]string{
		"keys":      {clickhouse, "LATCHKEY_KEYS_ADDR=" + keysAddr, "LATCHKEY_ADMIN_KEY_PATH=" + adminPath},
		"edge":      {"LATCHKEY_EDGE_ADDR=" + edgeAddr, "LATCHKEY_EDGE_GRPC_ADDR=127.0.0.1:0"},
		"collector": {clickhouse},
		"detector":  {},
		"notifier":  {"LATCHKEY_SMTP_URL=" + sent.SMTPURL()},
		"console":   {clickhouse, "LATCHKEY_CONSOLE_ADDR=" + consoleAddr, "LATCHKEY_KEYS_URL=http://" + keysAddr},
	}, keysAddr, edgeAddr, consoleAddr)
	admin := &installation{process: running["keys"], dir: dir, addrs: map[string]string{"console": consoleAddr, "nats": strings.TrimPrefix(natsURL("collector"), "nats://")}}
	if err := writeAddresses(dir, admin.addrs); err != nil {
		t.Fatal(err)
	}
	var org, key created
	admin.runJSON(&org, "org", "create", "--name", "Acme", "--owner-email", "owner@acme.example")
	admin.runJSON(&key, "key", "create", "--org", org.ID, "--name", "billing", "--scopes", "invoices:read")

	// Two weeks of one server's life, then a request from elsewhere.
	history := filepath.Join(dir, "history.ndjson")
	if err := os.WriteFile(history, lifeOf(org.ID, key.ID), 0o600); err != nil {
		t.Fatal(err)
	}
	admin.run("import", "--format", "ndjson", history, "--wait=false")
	secret, err := os.ReadFile(adminPath)
	if err != nil {
		t.Fatal(err)
	}
	var answer usageAnswer
	for i := range 3 {
		event := fmt.Sprintf(`{"time":%q,"org_id":%q,"key_id":%q,"source_ip":"198.51.100.%d","method":"GET","route":"/v1/invoices","status":200}`,
			time.Now().UTC().Format(time.RFC3339Nano), org.ID, key.ID, 7+i)
		status := post(t, "http://"+edgeAddr+"/v1/usage", strings.TrimSpace(string(secret)), "application/json", strings.NewReader(event), &answer)
		if status != http.StatusAccepted || answer.Accepted != 1 {
			t.Fatalf("the edge answers %d %+v", status, answer)
		}
	}
	wantOneAlertMail(t, sent)
	eventually(t, time.Minute, "the alert is in ClickHouse, the API shows it", func() error {
		var list struct {
			Alerts []json.RawMessage `json:"alerts"`
		}
		admin.runJSON(&list, "alert", "list", "--org", org.ID)
		if len(list.Alerts) != 1 {
			return fmt.Errorf("%d alerts", len(list.Alerts))
		}
		return nil
	})
	for name, p := range running {
		if took := p.interrupt(); took > 5*time.Second {
			t.Errorf("%s took %s to stop", name, took)
		}
	}
}

// startServices runs each service as its own user of NATS and waits until those
// that listen are ready.
func startServices(t *testing.T, natsURL func(string) string, services map[string][]string, listening ...string) map[string]*process {
	t.Helper()
	running := map[string]*process{}
	for name, env := range services {
		running[name] = startProcess(t, append(env, "LATCHKEY_NATS_URL="+natsURL(name)), name)
	}
	for _, addr := range listening {
		eventually(t, time.Minute, addr+" is ready", func() error { return checkHealth(t.Context(), t.Output(), "http://"+addr) })
	}
	return running
}

// wantOneAlertMail waits until the owner, and nobody else, has one mail about
// the stolen key.
func wantOneAlertMail(t *testing.T, sent *mailbox.Mailbox) {
	t.Helper()
	eventually(t, time.Minute, "one mail about the stolen key", func() error {
		alerts := 0
		for _, m := range sent.List() {
			if m.To[0] != "owner@acme.example" {
				t.Errorf("a mail went to %v", m.To)
			}
			if strings.Contains(m.Subject, "new network") {
				alerts++
			}
		}
		if alerts != 1 {
			return fmt.Errorf("%d such mails among %+v", alerts, sent.List())
		}
		return nil
	})
}

func startMailServer(t *testing.T) *mailbox.Mailbox {
	t.Helper()
	m, err := mailbox.New(t.Context(), mailbox.Config{Dir: t.TempDir()}, run.Deps{})
	if err != nil {
		t.Fatal(err)
	}
	group := run.NewGroup()
	group.Go("mailbox", m.Run)
	t.Cleanup(func() { _ = group.Stop() })
	return m
}

// startNATSWithUsers runs the configuration of the compose file on any port and
// returns the URL of each user.
func startNATSWithUsers(t *testing.T) func(user string) string {
	t.Helper()
	for variable := range loadCompose(t).Services["nats"].Environment {
		t.Setenv(variable, "secret-"+strings.ToLower(strings.Split(variable, "_")[1]))
	}
	opts, err := natsserver.ProcessConfigFile(filepath.Join(repository, "deploy/nats/nats.conf"))
	if err != nil {
		t.Fatal(err)
	}
	opts.Host, opts.Port, opts.HTTPHost, opts.HTTPPort = "127.0.0.1", -1, "127.0.0.1", -1
	opts.StoreDir, opts.NoSigs, opts.NoLog = t.TempDir(), true, true
	server, err := natsserver.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	server.Start()
	t.Cleanup(func() { server.Shutdown(); server.WaitForShutdown() })
	if !server.ReadyForConnections(20 * time.Second) {
		t.Fatal(errors.New("NATS does not start"))
	}
	return func(user string) string {
		return fmt.Sprintf("nats://%s:secret-%s@%s", user, user, server.Addr())
	}
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// lifeOf is two weeks of a key that one server uses every ten minutes.
func lifeOf(org, key string) []byte {
	var b strings.Builder
	for at := time.Now().UTC().Add(-14 * 24 * time.Hour); at.Before(time.Now()); at = at.Add(10 * time.Minute) {
		fmt.Fprintf(&b, `{"time":%q,"org_id":%q,"key_id":%q,"source_ip":"203.0.113.20","method":"GET","route":"/v1/invoices","status":200}`+"\n",
			at.Format(time.RFC3339Nano), org, key)
	}
	return []byte(b.String())
}
