package edge

import (
	"encoding/json"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/key"
)

// FuzzChange: the reader makes the same of a change as encoding/json, or both
// refuse it.
func FuzzChange(f *testing.F) {
	for _, s := range []string{
		`{"id":"evt_1","type":"api_key.created","time":"2026-11-21T12:00:00Z","record":{"id":"key_1","org_id":"org_1","name":"Zürich","hash":"ab",` +
			`"environment":"live","scopes":["a:b","c:*"],"status":"active","allowed_cidrs":["10.0.0.0/8","::ffff:1.2.3.4/128"],` +
			`"expires_at":"2026-12-01T00:00:00.5+01:00","metadata":{"A":"\u00e4\"\\","b":[1,-2.5e+3,true,false,null,{}]},"rotation_days":90},"before":null}`,
		`{"record":{"id":"a","id":"b"}}`, `{"record":{"ID":"a"},"Record":{"id":"b"}}`, `{"record":{"\u0069d":"a"}}`, "{\"record\":{\"\u017ftatus\":\"x\"}}",
		`{"record":null}`, `null`, `{"record":{"scopes":null,"expires_at":null,"id":null}}`, `{"record":{"scopes":[null,"a"]}}`, `{"record":{"name":"\ud800"}}`,
		"{\"record\":{\"name\":\"\xff\",\"tags\":\"\xff\"}}", `{"record":{"n":01}}`, `{"record":{"n":1.}}`, `{"record":{"n":-}} `, " {\"x\" : [ ] , \"record\" : { } }\n",
		`{"record":{"allowed_cidrs":["","x"]}}`, `{"record":{"expires_at":"2026-13-01T00:00:00Z"}}`, `{"record":{"expires_at":""}}`, `{"record":{}} {}`,
	} {
		f.Add([]byte(s))
	}
	var r changeReader
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := r.read(slices.Clone(data))
		want, wantErr := decodeChange(data)
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("error %v, encoding/json says %v", err, wantErr)
		}
		if err == nil && !sameRecord(got, &want) {
			t.Fatalf("read %+v, encoding/json reads %+v", *got, want)
		}
	})
}

func sameRecord(a, b *record) bool {
	if (a.ExpiresAt == nil) != (b.ExpiresAt == nil) || a.ExpiresAt != nil && !a.ExpiresAt.Equal(*b.ExpiresAt) {
		return false
	}
	return a.ID == b.ID && a.OrgID == b.OrgID && a.Name == b.Name && a.Hash == b.Hash && a.Environment == b.Environment &&
		a.Status == b.Status && slices.Equal(a.Scopes, b.Scopes) && slices.Equal(a.AllowedCIDRs, b.AllowedCIDRs)
}

// TestChangeReaderReadsWhatIsWritten: what the keys service writes needs no help
// of encoding/json, and no memory.
func TestChangeReaderReadsWhatIsWritten(t *testing.T) {
	expires := time.Date(2027, 1, 2, 3, 4, 5, 6, time.UTC)
	rec := testRecord("key_1", newSecret(t), "orders:read", "orders:*")
	rec.ExpiresAt, rec.AllowedCIDRs = &expires, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	rec.Metadata, rec.Tags = map[string]string{"Team": "a <b>"}, []string{"x"}
	data, err := json.Marshal(key.Change{
		ID: "evt_1", Type: key.Updated, Time: expires, Actor: "key_0", ActorIP: netip.MustParseAddr("::1"), Record: rec, Before: &rec,
	})
	if err != nil {
		t.Fatal(err)
	}
	var r changeReader
	r.data = data
	if !r.change() {
		t.Fatalf("left to encoding/json from %q", data[r.pos:])
	}
	got, err := r.read(data)
	if err != nil || got.ID != rec.ID || got.Hash != rec.Hash || !got.ExpiresAt.Equal(expires) || len(got.Scopes) != 2 || len(got.AllowedCIDRs) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	rec.AllowedCIDRs, rec.ExpiresAt = nil, nil
	if data, err = json.Marshal(key.Change{Record: rec}); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = r.read(data) }); n != 0 {
		t.Errorf("%.0f allocations", n)
	}
}

// TestKeysetHoldsNoMessage: a key must not change when the memory of the message
// that brought it does.
func TestKeysetHoldsNoMessage(t *testing.T) {
	t.Parallel()
	for _, first := range []bool{true, false} {
		s := NewKeyset()
		if first {
			s.expect(slabKeys + 1)
		}
		rec := testRecord("key_1", newSecret(t), "orders:read")
		data, err := json.Marshal(key.Change{Record: rec})
		if err != nil {
			t.Fatal(err)
		}
		var r changeReader
		read, err := r.read(data)
		if err != nil {
			t.Fatal(err)
		}
		full := read.full()
		apply(t, s, full, 1)
		for i := range data {
			data[i] = '#'
		}
		k := s.ByID("key_1")
		if k == nil || k.ID() != rec.ID || k.Name() != rec.Name || k.OrgID() != rec.OrgID || k.Environment() != "live" || !k.Allows("orders:read") || k.Scopes()[0] != "orders:read" {
			t.Errorf("the key became %+v", k)
		}
	}
}

// TestKeysetGrantsAreKeptApart: a scope that nobody checked must not pass for two.
func TestKeysetGrantsAreKeptApart(t *testing.T) {
	t.Parallel()
	s := NewKeyset()
	apply(t, s, testRecord("key_1", newSecret(t), "a:b c:d"), 1)
	apply(t, s, testRecord("key_2", newSecret(t), "a:b", "c:d"), 2)
	if s.ByID("key_1").Allows("c:d") || !s.ByID("key_2").Allows("c:d") {
		t.Error("one key has the scopes of another")
	}
}
