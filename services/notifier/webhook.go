package notifier

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
)

// Types of webhook events beside those of schemas/key.
const (
	alertCreated = "alert.created"
	alertUpdated = "alert.updated"
)

// maxAnswer is how much of an endpoint's answer is kept.
const maxAnswer = 200

// hooks knows the endpoints and calls them, as Standard Webhooks says.
type hooks struct {
	log   *slog.Logger
	allow []netip.Prefix
	// secure calls https anywhere that is public or allowed, plain calls http
	// where it is allowed by name.
	secure, plain *http.Client

	mu    sync.RWMutex
	byID  map[string]key.Webhook
	known chan struct{} // closed once the bucket was read
}

func newHooks(cfg Config, log *slog.Logger) *hooks {
	h := &hooks{log: log, allow: cfg.WebhookAllow, byID: make(map[string]key.Webhook), known: make(chan struct{})}
	h.secure = newHookClient(cfg.WebhookTimeout, h.control)
	h.plain = newHookClient(cfg.WebhookTimeout, h.controlPlain)
	return h
}

func newHookClient(timeout time.Duration, control func(network, address string, c syscall.RawConn) error) *http.Client {
	dialer := &net.Dialer{Timeout: timeout, Control: control}
	return &http.Client{
		Timeout: timeout,
		Transport: &http.Transport{
			// No proxy: the address that is checked is the one that is dialled.
			DialContext: dialer.DialContext, ForceAttemptHTTP2: true, TLSHandshakeTimeout: timeout,
			MaxIdleConnsPerHost: 2, IdleConnTimeout: 30 * time.Second, MaxResponseHeaderBytes: 64 << 10,
		},
		// A redirect is a failure: it could lead anywhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// watchHooks keeps the endpoints current.
func (s *Service) watchHooks(ctx context.Context) error {
	defer s.hooks.secure.CloseIdleConnections()
	defer s.hooks.plain.CloseIdleConnections()
	kv, err := s.js.KeyValue(ctx, bus.Webhooks)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", bus.Webhooks, err)
	}
	watcher, err := kv.WatchAll(ctx)
	if err != nil {
		return fmt.Errorf("watch webhooks: %w", err)
	}
	defer func() { _ = watcher.Stop() }()
	first := sync.OnceFunc(func() { close(s.hooks.known) })
	for {
		select {
		case <-ctx.Done():
			return nil
		case entry, ok := <-watcher.Updates():
			switch {
			case !ok && ctx.Err() != nil:
				return nil
			case !ok:
				return errors.New("watch webhooks: the watch ended")
			case entry == nil:
				first()
			default:
				s.hooks.set(entry)
			}
		}
	}
}

func (h *hooks) set(entry jetstream.KeyValueEntry) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var w key.Webhook
	if entry.Operation() != jetstream.KeyValuePut {
		delete(h.byID, entry.Key())
		return
	}
	if err := json.Unmarshal(entry.Value(), &w); err != nil {
		h.log.Error("cannot read a webhook", "webhook", entry.Key(), "error", err)
		return
	}
	h.byID[entry.Key()] = w
}

// listening are the endpoints of an organization that hear a type of event.
func (h *hooks) listening(ctx context.Context, orgID, event string) ([]key.Webhook, error) {
	select {
	case <-h.known:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	h.mu.RLock()
	defer h.mu.RUnlock()
	var out []key.Webhook
	for _, w := range h.byID {
		if hears(w, orgID) && !w.Disabled && (len(w.Events) == 0 || slices.Contains(w.Events, event)) {
			out = append(out, w)
		}
	}
	return out, nil
}

// hears reports whether an endpoint is told of an organization's events: its own
// organization's, or all for an endpoint of the installation itself.
func hears(w key.Webhook, orgID string) bool {
	return w.OrgID == orgID || w.OrgID == key.SystemOrg
}

func (h *hooks) get(id string) (key.Webhook, bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	w, ok := h.byID[id]
	return w, ok
}

func (s *Service) hookAlert(ctx context.Context, a *alert.Alert) error {
	event := alertCreated
	if a.Revision > 1 {
		event = alertUpdated
	}
	data, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("encode alert: %w", err)
	}
	id := a.ID
	if a.Revision > 1 {
		id += "." + strconv.Itoa(a.Revision)
	}
	return s.enqueueHooks(ctx, event, id, a.OrgID, a.KeyID, a.DetectedAt, data)
}

func (s *Service) hookNotice(ctx context.Context, n *key.Notice, data []byte) error {
	return s.enqueueHooks(ctx, n.Type, n.ID, n.OrgID, n.KeyID, n.Time, data)
}

// enqueueHooks records a call of every endpoint that hears the event.
func (s *Service) enqueueHooks(ctx context.Context, event, id, orgID, keyID string, at time.Time, data json.RawMessage) error {
	endpoints, err := s.hooks.listening(ctx, orgID, event)
	if err != nil || len(endpoints) == 0 {
		return err
	}
	body, err := json.Marshal(struct {
		Type      string          `json:"type"`
		Timestamp time.Time       `json:"timestamp"`
		Data      json.RawMessage `json:"data"`
	}{event, at.UTC(), data})
	if err != nil {
		return fmt.Errorf("encode webhook: %w", err)
	}
	for _, w := range endpoints {
		d := &delivery.Delivery{
			ID: id, Kind: delivery.Hook, OrgID: orgID, KeyID: keyID, WebhookID: w.ID, To: hostOf(w.URL),
			State: delivery.Pending, CreatedAt: s.now().UTC(), Payload: body,
			// The same through all retries, and its own for every endpoint.
			MessageID: "msg_" + w.ID + "_" + id,
		}
		created, err := s.outbox.add(ctx, delivery.Key(delivery.Hook, w.ID, id), d)
		if err != nil {
			return err
		}
		if created {
			s.metrics.intent(d)
		}
	}
	return nil
}

func hostOf(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return ""
	}
	return u.Host
}

// callHook makes one call. The endpoint is read anew: it may have been moved,
// disabled or deleted since.
func (s *Service) callHook(ctx context.Context, d *delivery.Delivery) outcome {
	w, ok := s.hooks.get(d.WebhookID)
	switch {
	case !ok || !hears(w, d.OrgID):
		return outcome{refused: true, answer: "the webhook was deleted"}
	case w.Disabled:
		return outcome{refused: true, answer: "the webhook is disabled: " + w.DisabledReason}
	}
	status, answer, err := s.hooks.call(ctx, w, d.MessageID, d.Payload, s.now())
	switch {
	case errors.Is(err, errForbidden):
		return outcome{refused: true, answer: err.Error()}
	case err != nil:
		return outcome{answer: err.Error()}
	case status >= 200 && status < 300:
		return outcome{sent: true, answer: answer}
	case status == http.StatusGone:
		if err := s.disableHook(ctx, w.ID, "the endpoint answered 410 Gone"); err != nil {
			return outcome{answer: err.Error()}
		}
		return outcome{refused: true, answer: answer}
	}
	return outcome{answer: answer}
}

// errForbidden tells that an endpoint's address may not be called.
var errForbidden = errors.New("the address of the webhook is not allowed")

// call posts a body, signed. status is 0 if no answer came.
func (h *hooks) call(ctx context.Context, w key.Webhook, id string, body []byte, now time.Time) (status int, answer string, err error) {
	u, err := url.Parse(w.URL)
	if err != nil || u.Host == "" {
		return 0, "", fmt.Errorf("%w: %q is no URL", errForbidden, w.URL)
	}
	client := h.secure
	switch {
	case u.Scheme == "http" && len(h.allow) > 0:
		client = h.plain
	case u.Scheme != "https":
		return 0, "", fmt.Errorf("%w: %q is not https", errForbidden, u.Scheme)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.URL, bytes.NewReader(body))
	if err != nil {
		return 0, "", fmt.Errorf("%w: %w", errForbidden, err)
	}
	timestamp := strconv.FormatInt(now.Unix(), 10)
	signature, err := signatures(w, id, timestamp, body, now)
	if err != nil {
		return 0, "", fmt.Errorf("%w: %w", errForbidden, err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "Latchkey-Webhooks/1")
	req.Header.Set("Webhook-Id", id)
	req.Header.Set("Webhook-Timestamp", timestamp)
	req.Header.Set("Webhook-Signature", signature)
	res, err := client.Do(req)
	if err != nil {
		var urlErr *url.Error // repeats the URL, which may hold a token
		if errors.As(err, &urlErr) {
			err = urlErr.Err
		}
		return 0, "", fmt.Errorf("call webhook: %w", err)
	}
	defer func() { _ = res.Body.Close() }()
	text, _ := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	return res.StatusCode, strings.TrimSpace(res.Status + " " + headerText(string(text))), nil
}

// signatures signs with the current secret and, while receivers change over,
// with the one before.
func signatures(w key.Webhook, id, timestamp string, body []byte, now time.Time) (string, error) {
	secrets := []string{w.Secret}
	if w.PreviousSecret != "" && w.PreviousUntil != nil && now.Before(*w.PreviousUntil) {
		secrets = append(secrets, w.PreviousSecret)
	}
	var out []string
	for _, secret := range secrets {
		raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
		if err != nil || len(raw) == 0 {
			return "", errors.New("the webhook's secret is no base64")
		}
		mac := hmac.New(sha256.New, raw)
		fmt.Fprintf(mac, "%s.%s.%s", id, timestamp, body)
		out = append(out, "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	}
	return strings.Join(out, " "), nil
}

// control looks at the very address that is about to be dialled, after the name
// was resolved, so that no name can lead into this network.
func (h *hooks) control(_, address string, _ syscall.RawConn) error {
	ip, err := dialled(address)
	if err != nil || h.allowed(ip) || public(ip) {
		return err
	}
	return fmt.Errorf("%w: %s is not public (LATCHKEY_WEBHOOK_ALLOW names exceptions)", errForbidden, ip)
}

func (h *hooks) controlPlain(_, address string, _ syscall.RawConn) error {
	ip, err := dialled(address)
	if err != nil || h.allowed(ip) {
		return err
	}
	return fmt.Errorf("%w: %s is not in LATCHKEY_WEBHOOK_ALLOW, only https may go there", errForbidden, ip)
}

func dialled(address string) (netip.Addr, error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%w: %s", errForbidden, address)
	}
	return ap.Addr().Unmap().WithZone(""), nil
}

func (h *hooks) allowed(ip netip.Addr) bool {
	return slices.ContainsFunc(h.allow, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// special are ranges of the IANA special-purpose registries that netip does not
// name, and those that carry an IPv4 address inside.
var special = func() (out []netip.Prefix) {
	for _, p := range []string{
		"0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
		"64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16",
	} {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}()

// public reports whether an address belongs to the internet at large.
func public(ip netip.Addr) bool {
	if !ip.IsGlobalUnicast() || ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() {
		return false
	}
	for _, p := range special {
		if p.Contains(ip) {
			return false
		}
	}
	return true
}

// disableHook marks an endpoint as gone.
func (s *Service) disableHook(ctx context.Context, id, why string) error {
	kv, err := s.js.KeyValue(ctx, bus.Webhooks)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", bus.Webhooks, err)
	}
	entry, err := kv.Get(ctx, id)
	if err != nil {
		return fmt.Errorf("read webhook: %w", err)
	}
	var w key.Webhook
	if err := json.Unmarshal(entry.Value(), &w); err != nil {
		return fmt.Errorf("decode webhook: %w", err)
	}
	w.Disabled, w.DisabledReason = true, why
	data, err := json.Marshal(w)
	if err != nil {
		return fmt.Errorf("encode webhook: %w", err)
	}
	if _, err := kv.Update(ctx, id, data, entry.Revision()); err != nil && !errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
		return fmt.Errorf("disable webhook: %w", err)
	}
	return nil
}
