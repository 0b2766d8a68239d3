package notifier

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/services/internal/delivery"
)

// ownerPrefix begins the keys of owners' windows in the bucket.
const ownerPrefix = "owner."

// maxHeld bounds what a digest lists; further alerts are counted.
const maxHeld = 200

// window is an address's current hour: how many mails it got, and what is held
// back for the digest. It lies in the bucket, so that a restart forgets nothing
// and several notifiers share it.
type window struct {
	To   string     `json:"to"`
	End  time.Time  `json:"end"`
	Sent int        `json:"sent"`
	Held []heldLine `json:"held,omitempty"`
	More int        `json:"more,omitempty"`
	// Closing is the digest of the hour before until its delivery is recorded.
	Closing *digest `json:"closing,omitempty"`
}

type heldLine struct {
	ID      string    `json:"id"`
	Time    time.Time `json:"time"`
	Subject string    `json:"subject"`
}

func (w *window) held() int { return len(w.Held) + w.More }

// digest is the payload of a digest's delivery.
type digest struct {
	ID    string     `json:"id"`
	Sent  int        `json:"sent"`
	Lines []heldLine `json:"lines"`
	More  int        `json:"more"`
}

func ownerKey(address string) string {
	sum := sha256.Sum256([]byte(strings.ToLower(address)))
	return ownerPrefix + hex.EncodeToString(sum[:16])
}

// admit counts a mail to an address; false tells that it goes into the digest,
// where line stands for it. Called twice for one line, it holds it once.
func (s *Service) admit(ctx context.Context, address string, line heldLine) (bool, error) {
	bucketKey := ownerKey(address)
	for {
		w, revision, err := s.readWindow(ctx, bucketKey)
		if err != nil {
			return false, err
		}
		now := s.now()
		if !now.Before(w.End) && w.held() == 0 && w.Closing == nil {
			w = window{To: address, End: now.Add(s.window)}
		}
		admitted := w.Sent < s.cfg.MaxPerHour && now.Before(w.End)
		if admitted {
			w.Sent++
		} else if !w.hold(line) {
			return false, nil
		}
		// Revision 0 is what a new key must have, which is how a bucket creates one.
		_, err = s.outbox.update(ctx, bucketKey, &w, revision)
		if errors.Is(err, errTaken) {
			continue
		}
		return admitted, err
	}
}

// hold adds a line unless it is there.
func (w *window) hold(line heldLine) bool {
	for _, h := range w.Held {
		if h.ID == line.ID {
			return false
		}
	}
	if len(w.Held) == maxHeld {
		w.More++
		return true
	}
	w.Held = append(w.Held, line)
	return true
}

func (s *Service) readWindow(ctx context.Context, bucketKey string) (w window, revision uint64, err error) {
	entry, err := s.outbox.kv.Get(ctx, bucketKey)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return window{}, 0, nil
	}
	if err != nil {
		return window{}, 0, fmt.Errorf("read an owner's window: %w", err)
	}
	if err := json.Unmarshal(entry.Value(), &w); err != nil {
		return window{}, entry.Revision(), nil //nolint:nilerr // begin anew over what cannot be read
	}
	return w, entry.Revision(), nil
}

// closeWindow ends an owner's hour: what was held goes into one digest. The
// digest is first set aside in the window, so that alerts which are held
// meanwhile belong to the next, and its id follows from the window, so that a
// crash in between makes no second.
func (s *Service) closeWindow(ctx context.Context, bucketKey string) error {
	w, revision, err := s.readWindow(ctx, bucketKey)
	if err != nil {
		return err
	}
	if w.Closing == nil {
		if w.held() == 0 || s.now().Before(w.End) {
			return nil
		}
		id := fmt.Sprintf("digest_%s_%d", strings.TrimPrefix(bucketKey, ownerPrefix), w.End.UnixNano())
		w = window{
			To: w.To, End: s.now().Add(s.window), Sent: 1,
			Closing: &digest{ID: id, Sent: w.Sent, Lines: w.Held, More: w.More},
		}
		if revision, err = s.outbox.update(ctx, bucketKey, &w, revision); err != nil {
			return ignoreTaken(err) // the change brings it up again
		}
	}
	payload, err := json.Marshal(w.Closing)
	if err != nil {
		return fmt.Errorf("encode digest: %w", err)
	}
	_, err = s.outbox.add(ctx, delivery.Key(delivery.Digest, w.Closing.ID), &delivery.Delivery{
		ID: w.Closing.ID, Kind: delivery.Digest, To: w.To, State: delivery.Pending, CreatedAt: s.now(),
		MessageID: s.mailer.messageID(w.Closing.ID), Payload: payload,
	})
	if err != nil {
		return err
	}
	w.Closing = nil
	_, err = s.outbox.update(ctx, bucketKey, &w, revision)
	return ignoreTaken(err)
}

func ignoreTaken(err error) error {
	if errors.Is(err, errTaken) {
		return nil
	}
	return err
}
