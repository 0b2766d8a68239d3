package notifier

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
)

// postfixServer is a Postfix of our own, with STARTTLS, that delivers to ada and to
// nobody else.
type postfixServer struct {
	addr string
	base string // holds ada's Maildir
}

// mails are what ada got.
func (p *postfixServer) mails(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(p.base, "ada", "new", "*"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(data))
	}
	return out
}

func startPostfix(t *testing.T) *postfixServer {
	t.Helper()
	bin, err := exec.LookPath("postfix")
	if err != nil {
		if _, err := os.Stat("/usr/sbin/postfix"); err != nil {
			t.Skip("no Postfix here: apt-get install postfix (choose “No configuration”)")
		}
		bin = "/usr/sbin/postfix"
	}
	owner, err := user.Lookup("postfix")
	if err != nil || os.Getuid() != 0 {
		t.Skip("Postfix can only be started by root")
	}
	uid, _ := strconv.Atoi(owner.Uid)
	gid, _ := strconv.Atoi(owner.Gid)
	dir, err := os.MkdirTemp("", "latchkey-postfix-") // t.TempDir lies below what Postfix's user may not enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	p := &postfixServer{base: filepath.Join(dir, "mail"), addr: freeAddr(t)}
	for _, sub := range []string{"etc", "queue", "data", "mail"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for path, mode := range map[string]os.FileMode{dir: 0o755, filepath.Join(dir, "mail"): 0o700} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, sub := range []string{"data", "mail"} {
		if err := os.Chown(filepath.Join(dir, sub), uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("chain.pem", selfSigned(t))
	write("boxes", "ada@acme.example ada/\n")
	_ = os.Chmod(filepath.Join(dir, "etc", "boxes"), 0o644)
	write("main.cf", fmt.Sprintf(`compatibility_level = 3.6
queue_directory = %[1]s/queue
data_directory = %[1]s/data
maillog_file = /dev/stdout
myhostname = mx.acme.example
mydestination =
alias_maps =
inet_interfaces = loopback-only
virtual_mailbox_domains = acme.example
virtual_mailbox_base = %[1]s/mail
virtual_mailbox_maps = texthash:%[1]s/etc/boxes
virtual_uid_maps = static:%[2]d
virtual_gid_maps = static:%[3]d
virtual_minimum_uid = 1
smtpd_tls_security_level = may
smtpd_tls_chain_files = %[1]s/etc/chain.pem
smtpd_tls_received_header = yes
smtpd_recipient_restrictions = reject_unauth_destination
`, dir, uid, gid))
	write("master.cf", p.addr+` inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
virtual unix - n n - - virtual
error unix - - n - - error
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
proxymap unix - - n - - proxymap
postlog unix-dgram n - n - 1 postlogd
`)
	var log bytes.Buffer
	cmd := exec.Command(bin, "-c", filepath.Join(dir, "etc"), "start-fg")
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command(bin, "-c", filepath.Join(dir, "etc"), "stop").Run()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(log.String())
		}
	})
	for range 3000 {
		if conn, err := net.Dial("tcp", p.addr); err == nil {
			_ = conn.Close()
			return p
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("Postfix does not listen")
	return nil
}

func freeAddr(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	return listener.Addr().String()
}

func selfSigned(t *testing.T) string {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mx.acme.example"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})) + string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))
}

func TestPostfixDelivers(t *testing.T) {
	t.Parallel()
	p := startPostfix(t)
	h := newHouse(t)
	h.put(bus.Orgs, "org_nobody", map[string]string{"id": "org_nobody", "name": "Nobody", "owner_email": "nobody@acme.example"})
	h.start(Config{SMTPURL: "smtp://" + p.addr + "?helo=latchkey.example"})
	h.alert(testAlert())
	refused := numbered(2)
	refused.OrgID, refused.KeyID, refused.Severity = "org_nobody", "key_2", alert.Low
	h.alert(refused)
	if d := h.delivery("alert.alrt_7f3a9c21", delivery.Sent); !strings.Contains(d.Answer, "queued as") {
		t.Errorf("delivery = %+v", d)
	}
	if d := h.delivery("alert.alrt_2", delivery.Refused); !strings.Contains(d.Answer, "550") || d.Attempts != 1 {
		t.Errorf("delivery = %+v", d)
	}
	var mails []string
	for range 3000 {
		if mails = p.mails(t); len(mails) > 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if len(mails) != 1 {
		t.Fatalf("%d mails", len(mails))
	}
	for _, want := range []string{
		"Message-ID: <alrt_7f3a9c21@latchkey.example>", "using TLSv1.3", "multipart/alternative", "Auto-Submitted: auto-generated", "X-Latchkey-Severity: high",
	} {
		if !strings.Contains(mails[0], want) {
			t.Errorf("the delivered mail has no %q", want)
		}
	}
}

// A server whose certificate nobody vouches for gets no mail where TLS is required.
func TestRequiredTLSWantsACertificate(t *testing.T) {
	t.Parallel()
	p := startPostfix(t)
	h := newHouse(t)
	h.start(Config{SMTPURL: "smtp://" + p.addr + "?starttls=required", RetryFor: time.Nanosecond})
	h.alert(testAlert())
	if d := h.delivery("alert.alrt_7f3a9c21", delivery.Abandoned); !strings.Contains(d.Answer, "certificate") {
		t.Errorf("delivery = %+v", d)
	}
	if n := len(p.mails(t)); n != 0 {
		t.Errorf("%d mails", n)
	}
}
