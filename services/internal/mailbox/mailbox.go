// Package mailbox is an SMTP server that delivers to a directory, and the pages
// that show it: the mailbox of a newcomer who has no mail server at hand.
package mailbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/latchkey-dev/latchkey/services/internal/run"
)

// Config of the mailbox.
type Config struct {
	// Dir is where the mails lie, created if absent.
	Dir string `env:"MAILBOX_DIR"`
	// Addr is where SMTP is spoken; port 0 takes a free one.
	Addr string `env:"MAILBOX_ADDR" envDefault:"127.0.0.1:0"`
	// MaxMails and MaxBytes bound what is kept; the oldest goes first.
	MaxMails int   `env:"MAILBOX_MAX_MAILS" envDefault:"2000"`
	MaxBytes int64 `env:"MAILBOX_MAX_BYTES" envDefault:"268435456"`
	// MaxMessageBytes bounds one mail.
	MaxMessageBytes int64 `env:"MAILBOX_MAX_MESSAGE_BYTES" envDefault:"1048576"`
}

func (c *Config) setDefaults() {
	if c.Addr == "" {
		c.Addr = "127.0.0.1:0"
	}
	if c.MaxMails <= 0 {
		c.MaxMails = 2000
	}
	if c.MaxBytes <= 0 {
		c.MaxBytes = 256 << 20
	}
	if c.MaxMessageBytes <= 0 {
		c.MaxMessageBytes = 1 << 20
	}
}

// Mailbox takes mail over SMTP and keeps it in a directory.
type Mailbox struct {
	cfg      Config
	log      *slog.Logger
	store    *store
	listener net.Listener
	server   *smtp.Server
	stop     sync.Once
}

// New opens the directory and listens; mails are taken once [Mailbox.Run] runs.
func New(ctx context.Context, cfg Config, deps run.Deps) (*Mailbox, error) {
	cfg.setDefaults()
	if cfg.Dir == "" {
		return nil, errors.New("open mailbox: no directory is configured")
	}
	log := deps.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	st, err := openStore(cfg.Dir, cfg.MaxMails, cfg.MaxBytes)
	if err != nil {
		return nil, err
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("listen for SMTP: %w", err)
	}
	m := &Mailbox{cfg: cfg, log: log, store: st, listener: listener}
	m.server = m.newServer()
	return m, nil
}

// Addr is where SMTP is spoken.
func (m *Mailbox) Addr() net.Addr { return m.listener.Addr() }

// SMTPURL is the address for LATCHKEY_SMTP_URL: plain SMTP, which is fit for
// loopback alone.
func (m *Mailbox) SMTPURL() string { return "smtp://" + m.Addr().String() + "?starttls=off" }

// Run takes mail until ctx is done, then lets the mails in flight finish.
func (m *Mailbox) Run(ctx context.Context) error {
	served := make(chan error, 1)
	go func() { served <- m.server.Serve(m.listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve SMTP: %w", err)
	case <-ctx.Done():
	}
	m.Close()
	if err := <-served; err != nil && !errors.Is(err, smtp.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("serve SMTP: %w", err)
	}
	return nil
}

// Close stops the listener; a mail whose body has come is finished, idle
// connections are cut. It may be called twice, and without Run.
func (m *Mailbox) Close() {
	m.stop.Do(func() {
		// Idle clients would hold a shutdown for their whole read time-out.
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		if err := m.server.Shutdown(ctx); err != nil {
			_ = m.server.Close()
		}
		_ = m.listener.Close()
	})
}

// List gives what is kept, newest first.
func (m *Mailbox) List() []Summary { return m.store.list() }

// Get reads one mail.
func (m *Mailbox) Get(id string) (*Mail, error) { return m.store.get(id) }

func (m *Mailbox) newServer() *smtp.Server {
	s := smtp.NewServer(smtp.BackendFunc(func(c *smtp.Conn) (smtp.Session, error) {
		return &session{mailbox: m, remote: c.Conn().RemoteAddr().String(), helo: c.Hostname}, nil
	}))
	s.Domain = "latchkey.localhost"
	s.MaxMessageBytes = m.cfg.MaxMessageBytes
	s.MaxRecipients = 50
	s.MaxLineLength = 8192
	s.ReadTimeout = 60 * time.Second
	s.WriteTimeout = 30 * time.Second
	s.EnableSMTPUTF8 = true
	s.ErrorLog = slog.NewLogLogger(m.log.Handler(), slog.LevelDebug)
	return s
}

// session is one SMTP connection.
type session struct {
	mailbox *Mailbox
	remote  string
	helo    func() string
	from    string
	to      []string
}

func (s *session) Reset()        { s.from, s.to = "", nil }
func (s *session) Logout() error { return nil }

func (s *session) Mail(from string, _ *smtp.MailOptions) error {
	s.from = from
	return nil
}

func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	s.to = append(s.to, to)
	return nil
}

// Data stores the mail before it is accepted.
func (s *session) Data(r io.Reader) error {
	body, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	id, copies, err := s.mailbox.store.put(envelope{
		From: s.from, To: s.to, Remote: s.remote, Helo: s.helo(), Time: time.Now().UTC(),
	}, body)
	if err != nil {
		s.mailbox.log.Error("cannot store a mail", "error", err)
		return &smtp.SMTPError{Code: 452, EnhancedCode: smtp.EnhancedCode{4, 3, 1}, Message: "The mailbox cannot store this mail now"}
	}
	s.mailbox.log.Debug("mail stored", "id", id, "copies", copies)
	return nil
}
