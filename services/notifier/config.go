package notifier

import (
	"errors"
	"fmt"
	"net"
	"net/mail"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Config of the notifier. Variables carry the prefix LATCHKEY_.
type Config struct {
	// SMTPURL names the mail server:
	// smtp[s]://[user:password@]host[:port][?starttls=required|opportunistic|off][&helo=name][&auth=plain|login|cram-md5|scram-sha-256|xoauth2].
	// "none" sends no mail at all and leaves webhooks.
	SMTPURL string `env:"SMTP_URL" envDefault:"smtp://127.0.0.1:25"`
	// MailFrom is the sender, "Name <address>".
	MailFrom string `env:"MAIL_FROM" envDefault:"Latchkey <latchkey@localhost>"`
	// FallbackEmail hears of alerts whose organization is unknown; empty stores them only.
	FallbackEmail string `env:"FALLBACK_EMAIL"`
	// ConsoleURL is the address of the console as its readers reach it, written in mails.
	ConsoleURL string `env:"CONSOLE_URL" envDefault:"http://127.0.0.1:8080"`
	// TimeZone is the IANA name of the readers' time zone, shown beside UTC; empty
	// is that of this machine.
	TimeZone string `env:"MAIL_TIMEZONE"`
	// MaxPerHour bounds the mails to one address in an hour; further alerts come in one digest.
	MaxPerHour int `env:"MAIL_MAX_PER_HOUR" envDefault:"200"`
	// Timeout bounds one attempt, from dialling to the server's last answer.
	Timeout time.Duration `env:"MAIL_TIMEOUT" envDefault:"15s"`
	// RetryMin and RetryMax bound the pause between attempts, which doubles.
	RetryMin time.Duration `env:"NOTIFY_RETRY_MIN" envDefault:"2s"`
	RetryMax time.Duration `env:"NOTIFY_RETRY_MAX" envDefault:"15m"`
	// RetryFor is how long a delivery is tried before it is given up.
	RetryFor time.Duration `env:"NOTIFY_RETRY_FOR" envDefault:"72h"`
	// WebhookTimeout bounds one call.
	WebhookTimeout time.Duration `env:"WEBHOOK_TIMEOUT" envDefault:"20s"`
	// WebhookAllow are networks that webhooks may reach though they are not public
	// ("10.1.0.0/16"); plain http is allowed to them alone.
	WebhookAllow []netip.Prefix `env:"WEBHOOK_ALLOW"`
	// Addr serves /metrics and health where the notifier runs alone; empty serves nothing.
	Addr string `env:"NOTIFIER_ADDR"`
}

func (c *Config) setDefaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&c.Timeout, 15*time.Second)
	set(&c.RetryMin, 2*time.Second)
	set(&c.RetryMax, 15*time.Minute)
	set(&c.RetryFor, 72*time.Hour)
	set(&c.WebhookTimeout, 20*time.Second)
	if c.MaxPerHour <= 0 {
		c.MaxPerHour = 200
	}
	if c.MailFrom == "" {
		c.MailFrom = "Latchkey <latchkey@localhost>"
	}
	if c.ConsoleURL == "" {
		c.ConsoleURL = "http://127.0.0.1:8080"
	}
	c.ConsoleURL = strings.TrimRight(c.ConsoleURL, "/")
}

// Validate reports everything that is wrong, each by its variable.
func (c *Config) Validate() error {
	var errs []error
	if _, err := parseSMTPURL(c.SMTPURL); err != nil {
		errs = append(errs, fmt.Errorf("LATCHKEY_SMTP_URL: %w", err))
	}
	if c.MailFrom != "" {
		if _, err := mail.ParseAddress(c.MailFrom); err != nil {
			errs = append(errs, fmt.Errorf("LATCHKEY_MAIL_FROM: %w", err))
		}
	}
	if c.FallbackEmail != "" {
		if _, err := mail.ParseAddress(c.FallbackEmail); err != nil {
			errs = append(errs, fmt.Errorf("LATCHKEY_FALLBACK_EMAIL: %w", err))
		}
	}
	if c.ConsoleURL != "" {
		if u, err := url.Parse(c.ConsoleURL); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			errs = append(errs, fmt.Errorf("LATCHKEY_CONSOLE_URL: %q is no http or https address", c.ConsoleURL))
		}
	}
	if _, err := time.LoadLocation(c.TimeZone); err != nil {
		errs = append(errs, fmt.Errorf("LATCHKEY_MAIL_TIMEZONE: %w", err))
	}
	return errors.Join(errs...)
}

// smtpServer is what SMTPURL says; nil means that no mail is sent.
type smtpServer struct {
	host           string
	port           int
	user, password string
	implicitTLS    bool
	// starttls is "required", "opportunistic" or "off".
	starttls string
	helo     string
	auth     string
}

func parseSMTPURL(raw string) (*smtpServer, error) {
	if raw == "none" {
		return nil, nil
	}
	if raw == "" {
		return nil, errors.New(`name a mail server, "smtp://user:password@host:587", or "none"`)
	}
	u, err := url.Parse(raw)
	if err != nil {
		// The error of url.Parse repeats the URL, password and all.
		return nil, errors.New("is no URL; escape special characters of the password, as in p%40ss")
	}
	if u.Scheme != "smtp" && u.Scheme != "smtps" || u.Hostname() == "" {
		return nil, errors.New("is neither smtp://host:port nor smtps://host:port")
	}
	s := &smtpServer{host: u.Hostname(), user: u.User.Username(), implicitTLS: u.Scheme == "smtps"}
	s.password, _ = u.User.Password()
	q := u.Query()
	for name := range q {
		if name != "starttls" && name != "helo" && name != "auth" {
			return nil, fmt.Errorf("parameter %q is unknown", name)
		}
	}
	s.helo, s.auth, s.starttls = q.Get("helo"), strings.ToLower(q.Get("auth")), q.Get("starttls")
	return s, errors.Join(s.setPort(u.Port()), s.setStartTLS(), s.checkAuth())
}

func (s *smtpServer) setPort(port string) error {
	switch {
	case port != "":
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return fmt.Errorf("port %q is no port", port)
		}
		s.port = int(n)
	case s.implicitTLS:
		s.port = 465
	case s.user != "":
		s.port = 587
	default:
		s.port = 25
	}
	return nil
}

// setStartTLS never lets a password travel in clear by default, except to this
// machine.
func (s *smtpServer) setStartTLS() error {
	switch s.starttls {
	case "required", "opportunistic", "off":
		if s.implicitTLS {
			return errors.New("starttls goes with smtp:// only")
		}
	case "":
		s.starttls = "opportunistic"
		if s.user != "" && !s.loopback() {
			s.starttls = "required"
		}
	default:
		return fmt.Errorf("starttls=%q is not required, opportunistic or off", s.starttls)
	}
	return nil
}

func (s *smtpServer) checkAuth() error {
	switch s.auth {
	case "", "plain", "login", "cram-md5", "scram-sha-256", "xoauth2":
		return nil
	}
	return fmt.Errorf("auth=%q is not plain, login, cram-md5, scram-sha-256 or xoauth2", s.auth)
}

func (s *smtpServer) loopback() bool {
	if s.host == "localhost" {
		return true
	}
	ip := net.ParseIP(s.host)
	return ip != nil && ip.IsLoopback()
}

// addr is for logs: no user, no password.
func (s *smtpServer) addr() string { return net.JoinHostPort(s.host, strconv.Itoa(s.port)) }
