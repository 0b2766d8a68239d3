package edge

import (
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

func newSecret(t testing.TB) string {
	t.Helper()
	k, err := apikey.Generate(apikey.Live)
	if err != nil {
		t.Fatal(err)
	}
	return k.Secret()
}

func testRecord(id, secret string, scopes ...string) key.Record {
	return key.Record{
		ID: id, OrgID: "org_acme", Name: "name of " + id, Hash: apikey.Sum(secret).String(),
		Environment: "live", Scopes: scopes, Status: key.Active,
	}
}

func apply(t testing.TB, s *Keyset, rec key.Record, seq uint64) bool {
	t.Helper()
	news, err := s.Apply(&rec, seq)
	if err != nil {
		t.Fatal(err)
	}
	return news
}

func TestKeysetFindsWhatItWasGiven(t *testing.T) {
	t.Parallel()
	s := NewKeyset()
	secrets := make([]string, 5000)
	for i := range secrets {
		secrets[i] = newSecret(t)
		apply(t, s, testRecord(fmt.Sprint("key_", i), secrets[i], "a:b"), uint64(i+1))
	}
	for i, secret := range secrets {
		if k := s.Lookup(apikey.Sum(secret)); k == nil || k.ID() != fmt.Sprint("key_", i) {
			t.Fatalf("key %d not found: %v", i, k)
		}
	}
	if k := s.Lookup(apikey.Sum(newSecret(t))); k != nil {
		t.Fatalf("found %s for a secret that nobody has", k.ID())
	}
	if s.Len() != len(secrets) {
		t.Fatalf("Len is %d", s.Len())
	}
}

func TestKeysetForgetsAnOldHash(t *testing.T) {
	t.Parallel()
	s := NewKeyset()
	before, after := newSecret(t), newSecret(t)
	apply(t, s, testRecord("key_1", before), 1)
	apply(t, s, testRecord("key_1", after), 2)
	if s.Lookup(apikey.Sum(before)) != nil || s.Lookup(apikey.Sum(after)) == nil {
		t.Fatal("the old secret works still, or the new one does not yet")
	}
}

func TestKeysetRefusesASecretThatTwoKeysClaim(t *testing.T) {
	t.Parallel()
	s := NewKeyset()
	secret := newSecret(t)
	apply(t, s, testRecord("key_1", secret), 1)
	apply(t, s, testRecord("key_2", secret), 2)
	if k := s.Lookup(apikey.Sum(secret)); k != nil {
		t.Fatalf("the secret is taken for %s", k.ID())
	}
}

func TestQuarantine(t *testing.T) {
	t.Parallel()
	s := NewKeyset()
	secret := newSecret(t)
	apply(t, s, testRecord("key_1", secret), 1)
	s.quarantine("key_1", 2)
	if k := s.Lookup(apikey.Sum(secret)); k.Active(time.Now()) {
		t.Fatal("a key whose last record cannot be read is active")
	}
	apply(t, s, testRecord("key_1", secret), 3)
	if k := s.Lookup(apikey.Sum(secret)); !k.Active(time.Now()) {
		t.Fatal("a good record does not bring the key back")
	}
}

// TestNoInterleavingBringsAKeyBack delivers the changes of some keys in any
// order, any number of times and from several goroutines, as a watch, a refresh
// from the start and redeliveries would at their worst, and demands what the
// stream's order demands.
func TestNoInterleavingBringsAKeyBack(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		const keys = 3
		type change struct {
			rec key.Record
			seq uint64
		}
		var log []change
		last := map[string]change{}
		revoked := map[string]bool{}
		secrets := make([]string, keys)
		for i := range secrets {
			k, _ := apikey.Generate(apikey.Live)
			secrets[i] = k.Secret()
		}
		for seq := uint64(1); seq <= 12; seq++ {
			i := rapid.IntRange(0, keys-1).Draw(t, "key")
			rec := testRecord(fmt.Sprint("key_", i), secrets[i], "a:b")
			rec.Status = rapid.SampledFrom([]string{key.Active, key.Active, key.Suspended, key.Revoked}).Draw(t, "status")
			revoked[rec.ID] = revoked[rec.ID] || rec.Status == key.Revoked
			log = append(log, change{rec, seq})
			last[rec.ID] = log[len(log)-1]
		}
		s := NewKeyset()
		var wg sync.WaitGroup
		for range 3 {
			order := rapid.Permutation(log).Draw(t, "order")
			cut := rapid.IntRange(0, len(order)).Draw(t, "cut")
			wg.Go(func() {
				for _, c := range order[:cut] {
					_, _ = s.Apply(&c.rec, c.seq)
				}
			})
		}
		wg.Go(func() { // one feed misses nothing
			for _, c := range log {
				_, _ = s.Apply(&c.rec, c.seq)
			}
		})
		wg.Wait()
		for id, c := range last {
			k := s.ByID(id)
			want := c.rec.Status == key.Active && !revoked[id]
			if k.Active(time.Now()) != want {
				t.Fatalf("%s is active: %v, want %v", id, !want, want)
			}
		}
	})
}

// TestRevocationIsSeenAtOnce: a decision that begins after Apply has returned
// sees the change, while the table grows under it.
func TestRevocationIsSeenAtOnce(t *testing.T) {
	t.Parallel()
	s := NewKeyset()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := uint64(1_000_000); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			k, _ := apikey.Generate(apikey.Live)
			rec := testRecord(fmt.Sprint("other_", i), k.Secret())
			_, _ = s.Apply(&rec, i)
		}
	})
	e := New(s, Options{})
	s.MarkSynced(time.Now())
	for i := range uint64(300) {
		secret := newSecret(t)
		rec := testRecord(fmt.Sprint("key_", i), secret)
		apply(t, s, rec, 2*i+1)
		if v := e.Decide(secret, netip.Addr{}, Need{}); !v.Allowed() {
			t.Fatalf("new key refused: %s", v.Reason)
		}
		rec.Status = key.Revoked
		apply(t, s, rec, 2*i+2)
		if v := e.Decide(secret, netip.Addr{}, Need{}); v.Reason != usage.DenyRevokedKey {
			t.Fatalf("revoked key: %q", v.Reason)
		}
	}
	close(stop)
	wg.Wait()
}

func TestKeyIsSmall(t *testing.T) {
	const n = 100_000
	secrets := make([]apikey.Hash, n)
	for i := range secrets {
		secrets[i] = apikey.Sum(fmt.Sprint(i))
	}
	before := heap()
	s := NewKeyset()
	for i, h := range secrets {
		rec := key.Record{
			ID: fmt.Sprintf("key_01JABCDEFGHJKMNPQRST%06d", i), OrgID: fmt.Sprint("org_", i%1000),
			Name: fmt.Sprint("integration number ", i), Hash: h.String(), Environment: "live",
			Scopes: []string{"orders:write", "orders:read"}, Status: key.Active,
		}
		if _, err := s.Apply(&rec, uint64(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	perKey := (heap() - before) / n
	t.Logf("%d bytes a key", perKey)
	if perKey > 500 {
		t.Errorf("%d bytes a key, at most 500 are promised", perKey)
	}
	runtime.KeepAlive(s)
	runtime.KeepAlive(secrets)
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
