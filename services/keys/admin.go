package keys

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// EnsureAdmin sees to the first admin key: it writes a new key with full_access
// over all organizations to path, mode 0600, unless the file already holds one
// that NATS knows. A file whose key was revoked is left alone. The streams must
// exist; see bus.Ensure.
func EnsureAdmin(ctx context.Context, nc *nats.Conn, cfg Config, path string) error {
	format, hasher, err := cfg.format()
	if err != nil {
		return err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("open JetStream: %w", err)
	}
	if err := ensureSystemOrg(ctx, js); err != nil {
		return err
	}
	set, err := api.OpenKeyset(ctx, js, hasher, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer set.Close()
	content, err := os.ReadFile(path)
	if err == nil {
		if record, _, _ := set.Lookup(strings.TrimSpace(string(content)), time.Now()); record.ID != "" {
			return nil
		}
		// A file from another installation, or cut short by a crash: its key opens nothing here.
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read admin key: %w", err)
	}
	secret, err := createAdmin(ctx, nc, js, set, &Service{format: format, hasher: hasher})
	if err != nil {
		return err
	}
	return writeSecret(path, secret)
}

func createAdmin(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, set *api.Keyset, s *Service) (string, error) {
	stream, err := js.Stream(ctx, bus.Keys)
	if err != nil {
		return "", fmt.Errorf("look up stream %s: %w", bus.Keys, err)
	}
	s.now, s.ids = time.Now, &ids{}
	s.store = &records{nc: nc, js: js, stream: stream, set: set, ids: s.ids, now: s.now}
	_, secret, err := s.create(ctx, system, key.Record{
		OrgID: key.SystemOrg, Name: "First admin key", Environment: apikey.Live, Scopes: []string{apikey.FullAccess},
		Description: "Made at the first start; full_access over all organizations.",
	})
	if err != nil {
		return "", fmt.Errorf("create admin key: %w", err)
	}
	return secret, nil
}

func ensureSystemOrg(ctx context.Context, js jetstream.JetStream) error {
	kv, err := js.KeyValue(ctx, bus.Orgs)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", bus.Orgs, err)
	}
	if _, err := kv.Get(ctx, key.SystemOrg); !errors.Is(err, jetstream.ErrKeyNotFound) {
		return err
	}
	org := key.Org{ID: key.SystemOrg, Name: "Latchkey", CreatedAt: time.Now().UTC()}
	body, err := json.Marshal(org)
	if err != nil {
		return fmt.Errorf("encode organization: %w", err)
	}
	s := &Service{js: js, log: slog.New(slog.DiscardHandler), now: time.Now, ids: &ids{}}
	return s.audited(ctx, system, change{typ: "org.created", kind: "org", id: org.ID, org: org.ID, after: org}, func() error {
		if _, err := kv.Create(ctx, org.ID, body); err != nil && !errors.Is(err, jetstream.ErrKeyExists) {
			return fmt.Errorf("create organization %s: %w", org.ID, err)
		}
		return nil
	})
}

// writeSecret writes a file that only its owner may read, whole or not at all.
func writeSecret(path, secret string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make directory of the admin key: %w", err)
	}
	// CreateTemp makes files of mode 0600.
	f, err := os.CreateTemp(filepath.Dir(path), ".admin-key-*")
	if err != nil {
		return fmt.Errorf("write admin key: %w", err)
	}
	_, err = f.WriteString(secret + "\n")
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write admin key: %w", err), os.Remove(f.Name()))
	}
	return nil
}
