package notifier

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	netmail "net/mail"
	"os"
	"strings"
	"time"

	"github.com/wneessen/go-mail"
)

// letter is a mail before it is put into MIME. The same letter gives the same
// bytes, so that a repeated attempt is a copy and no second mail.
type letter struct {
	To        string
	Subject   string
	Text      string
	HTML      string
	MessageID string // without angle brackets
	Date      time.Time
	Urgent    bool
	// Headers are extra fields, X-Latchkey-… for the reader's filters.
	Headers map[string]string
}

// outcome is what an attempt came to. Exactly one of sent, refused and neither
// (try again) holds.
type outcome struct {
	sent    bool
	refused bool
	// answer is what the server said, or why it was not reached.
	answer string
}

// mailer sends letters over SMTP, one connection a letter: alerts are rare, and
// a kept connection is one more thing that goes stale.
type mailer struct {
	server  *smtpServer
	from    *netmail.Address
	timeout time.Duration
}

func newMailer(cfg Config) (*mailer, error) {
	server, err := parseSMTPURL(cfg.SMTPURL)
	if err != nil {
		return nil, fmt.Errorf("read LATCHKEY_SMTP_URL: %w", err)
	}
	from, err := netmail.ParseAddress(cfg.MailFrom)
	if err != nil {
		return nil, fmt.Errorf("read LATCHKEY_MAIL_FROM: %w", err)
	}
	return &mailer{server: server, from: from, timeout: cfg.Timeout}, nil
}

// messageID makes the stable Message-ID of a delivery from its id.
func (m *mailer) messageID(id string) string {
	_, domain, ok := strings.Cut(m.from.Address, "@")
	if !ok || domain == "" {
		domain = "localhost"
	}
	return strings.Map(func(r rune) rune {
		if r > ' ' && r < 0x7f && !strings.ContainsRune("<>@()[]\\,;:\"", r) {
			return r
		}
		return '_'
	}, id) + "@" + domain
}

// send makes one attempt.
func (m *mailer) send(ctx context.Context, l *letter) outcome {
	if m.server == nil {
		return outcome{refused: true, answer: `no mail server is configured (LATCHKEY_SMTP_URL is "none")`}
	}
	msg, err := m.message(l)
	if err != nil {
		return outcome{refused: true, answer: err.Error()}
	}
	client, err := mail.NewClient(m.server.host, m.options(time.Now().Add(m.timeout))...)
	if err != nil {
		return outcome{refused: true, answer: fmt.Sprintf("set up mail client: %v", err)}
	}
	ctx, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	return classify(msg, client.DialAndSendWithContext(ctx, msg))
}

// classify reads go-mail's answer. An error after the server took the mail
// (RSET, QUIT) is still a success; a code of 500 or more about this mail is
// final; all else may be tried again: a login that fails or a server that is
// away may be put right by its operator.
func classify(msg *mail.Msg, err error) outcome {
	if msg.IsDelivered() {
		answer := strings.TrimSpace(msg.ServerResponse())
		if answer == "" {
			answer = "accepted"
		}
		return outcome{sent: true, answer: answer}
	}
	if err == nil {
		return outcome{answer: "the mail server gave no answer"}
	}
	var sendErr *mail.SendError
	if errors.As(err, &sendErr) && sendErr.ErrorCode() >= 500 {
		return outcome{refused: true, answer: err.Error()}
	}
	return outcome{answer: err.Error()}
}

func (m *mailer) message(l *letter) (*mail.Msg, error) {
	// A boundary of its own keeps repeated attempts identical.
	msg := mail.NewMsg(mail.WithEncoding(mail.EncodingQP), mail.WithBoundary(boundary(l.MessageID)), mail.WithNoDefaultUserAgent())
	msg.FromMailAddress(m.from)
	to, err := netmail.ParseAddress(l.To)
	if err != nil {
		return nil, fmt.Errorf("read recipient %q: %w", l.To, err)
	}
	msg.ToMailAddress(to)
	msg.Subject(l.Subject)
	msg.SetMessageIDWithValue(l.MessageID)
	msg.SetDateWithValue(l.Date.UTC())
	if l.Urgent {
		msg.SetImportance(mail.ImportanceHigh)
	}
	// RFC 3834: no vacation notes in reply.
	msg.SetGenHeader("Auto-Submitted", "auto-generated")
	msg.SetGenHeader("X-Auto-Response-Suppress", "All")
	for name, value := range l.Headers {
		msg.SetGenHeader(mail.Header(name), headerText(value))
	}
	msg.SetBodyString(mail.TypeTextPlain, l.Text)
	msg.AddAlternativeString(mail.TypeTextHTML, l.HTML)
	// What cannot be written at all is no matter for the mail server.
	if _, err := msg.WriteTo(io.Discard); err != nil {
		return nil, fmt.Errorf("write mail: %w", err)
	}
	return msg, nil
}

// boundary follows from the Message-ID and is short enough for RFC 2046, which
// allows 70 characters.
func boundary(messageID string) string {
	sum := sha256.Sum256([]byte(messageID))
	return "latchkey-" + hex.EncodeToString(sum[:12])
}

func (m *mailer) options(deadline time.Time) []mail.Option {
	s := m.server
	tlsConfig := &tls.Config{ServerName: s.host, MinVersion: tls.VersionTLS12}
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		// go-mail moves the deadline as it goes; an attempt has one end.
		conn = &boundedConn{Conn: conn, until: deadline}
		if !s.implicitTLS {
			return conn, nil
		}
		secure := tls.Client(conn, tlsConfig)
		if err := secure.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("TLS handshake: %w", err)
		}
		return secure, nil
	}
	policy := mail.TLSMandatory
	switch {
	case s.implicitTLS:
		// The dialer made TLS. With this policy go-mail looks at the connection and
		// finds it secure; with WithSSL and a dialer of ours it would take it for
		// plain and offer no password.
		policy = mail.TLSOpportunistic
	case s.starttls == "opportunistic":
		policy = mail.TLSOpportunistic
		// Who would do without encryption gains nothing by refusing a certificate.
		tlsConfig.InsecureSkipVerify = true //nolint:gosec // see above
	case s.starttls == "off":
		policy = mail.NoTLS
	}
	options := []mail.Option{
		mail.WithTimeout(m.timeout), mail.WithDialContextFunc(dial), mail.WithHELO(s.heloName()), mail.WithoutNoop(),
		mail.WithTLSConfig(tlsConfig), mail.WithTLSPolicy(policy), mail.WithPort(s.port),
	}
	if s.user != "" {
		options = append(options, mail.WithUsername(s.user), mail.WithPassword(s.password), mail.WithSMTPAuth(s.authType()))
	}
	return options
}

func (s *smtpServer) heloName() string {
	if s.helo != "" {
		return s.helo
	}
	if name, err := os.Hostname(); err == nil && name != "" {
		return name
	}
	return "localhost"
}

func (s *smtpServer) authType() mail.SMTPAuthType {
	switch s.auth {
	case "plain":
		return mail.SMTPAuthPlain
	case "login":
		return mail.SMTPAuthLogin
	case "cram-md5":
		return mail.SMTPAuthCramMD5
	case "scram-sha-256":
		return mail.SMTPAuthSCRAMSHA256
	case "xoauth2":
		return mail.SMTPAuthXOAUTH2
	}
	if s.starttls == "off" && s.loopback() {
		return mail.SMTPAuthPlain // discovery refuses it without TLS; to this machine it is fine
	}
	return mail.SMTPAuthAutoDiscover
}

// boundedConn lets nobody move the deadline past until.
type boundedConn struct {
	net.Conn
	until time.Time
}

func (c *boundedConn) SetDeadline(t time.Time) error {
	if t.IsZero() || t.After(c.until) {
		t = c.until
	}
	return c.Conn.SetDeadline(t)
}
