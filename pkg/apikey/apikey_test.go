package apikey_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
)

func TestGenerateParse(t *testing.T) {
	t.Parallel()
	own, err := apikey.NewFormat("acme")
	if err != nil {
		t.Fatal(err)
	}
	pattern := regexp.MustCompile(`^` + apikey.Pattern + `$`)
	seen := map[string]bool{}
	for _, env := range []string{apikey.Live, apikey.Test, "a", "staging2", strings.Repeat("e", apikey.MaxNameLen)} {
		for range 200 {
			k, err := apikey.Generate(env)
			if err != nil {
				t.Fatal(err)
			}
			if seen[k.Secret()] {
				t.Fatal("the same key twice")
			}
			seen[k.Secret()] = true
			if !pattern.MatchString(k.Secret()) {
				t.Fatalf("%d characters do not match the scanners' pattern", len(k.Secret()))
			}
			back, err := apikey.Parse(k.Secret())
			if err != nil || back != k || back.Environment() != env {
				t.Fatalf("parse: %v, environment %q", err, back.Environment())
			}
			if want := "lk_" + env + "_"; !strings.HasPrefix(k.Masked(), want) || len(k.Masked()) != len(want)+apikey.ShownLen {
				t.Fatalf("masked %q", k.Masked())
			}
			for _, printed := range []string{fmt.Sprint(k), fmt.Sprintf("%+v", k), fmt.Sprintf("%#v", k)} {
				if strings.Contains(printed, k.Secret()) {
					t.Fatal("a printed key shows its secret")
				}
			}
			if _, err := own.Parse(k.Secret()); !errors.Is(err, apikey.ErrMalformed) {
				t.Fatalf("another prefix: %v", err)
			}
		}
	}
	k, err := own.Generate(apikey.Live)
	if err != nil || !strings.HasPrefix(k.Secret(), "acme_live_") || !regexp.MustCompile(own.Pattern()).MatchString(k.Secret()) {
		t.Fatalf("own prefix: %v, %v", k, err)
	}
	if _, err := own.Parse(k.Secret()); err != nil {
		t.Fatal(err)
	}
}

// The checksum is documented as GitHub's; compute it another way.
func TestChecksumIsThatOfTheDocs(t *testing.T) {
	t.Parallel()
	const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	random := strings.Repeat("aZ9", 10)
	sum := uint64(crc32.ChecksumIEEE([]byte(random)))
	var text string
	for range apikey.ChecksumLen {
		text = string(alphabet[sum%62]) + text
		sum /= 62
	}
	if _, err := apikey.Parse("lk_live_" + random + text); err != nil {
		t.Fatal(err)
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	k, err := apikey.Generate(apikey.Live)
	if err != nil {
		t.Fatal(err)
	}
	s := k.Secret()
	for i := len("lk_live_"); i < len(s); i++ {
		other := byte('x')
		if s[i] == other {
			other = 'y'
		}
		if _, err := apikey.Parse(s[:i] + string(other) + s[i+1:]); !errors.Is(err, apikey.ErrChecksum) {
			t.Fatalf("character %d changed: %v", i, err)
		}
	}
	for _, bad := range []string{
		"", "lk", "lk_", "lk_live_", s[:len(s)-1], s + "0", " " + s, s + "\n", strings.ToUpper(s), "lk__" + s[8:],
		"lk_Live_" + s[8:], "lk_1ive_" + s[8:], "lk_li_ve_" + s[8:], "lk_live-" + s[8:], "lk-live_" + s[8:],
		"lk_" + strings.Repeat("e", apikey.MaxNameLen+1) + "_" + s[8:], s[:20] + "ü" + s[22:], strings.Repeat("a", 1<<16),
	} {
		if _, err := apikey.Parse(bad); !errors.Is(err, apikey.ErrMalformed) {
			t.Errorf("%.60q: %v", bad, err)
		}
	}
	for _, bad := range []string{"", "Live", "li_ve", "1", strings.Repeat("e", apikey.MaxNameLen+1)} {
		if _, err := apikey.Generate(bad); err == nil {
			t.Errorf("environment %q taken", bad)
		}
	}
}

func TestHasher(t *testing.T) {
	t.Parallel()
	const secret = "lk_live_some secret"
	old, current, long := []byte("an old pepper of enough bytes"), []byte("the pepper of today, longer"), []byte(strings.Repeat("p", 100))
	h, err := apikey.NewHasher([][]byte{current, old, long}, true)
	if err != nil {
		t.Fatal(err)
	}
	want := []apikey.Hash{mac(current, secret), mac(old, secret), mac(long, secret), sha256.Sum256([]byte(secret))}
	for i, w := range want {
		if got := h.At(i, secret); got != w {
			t.Errorf("hash %d: %s, not %s", i, got, w)
		}
	}
	if h.Len() != len(want) || h.Sum(secret) != want[0] {
		t.Error("the first pepper is not the one for new keys")
	}
	var zero apikey.Hasher
	if zero.Len() != 1 || zero.Sum(secret) != apikey.Sum(secret) {
		t.Error("the zero hasher is not plain SHA-256")
	}
	if back, err := apikey.ParseHash(want[0].String()); err != nil || back != want[0] {
		t.Errorf("read back: %v", err)
	}
	if _, err := apikey.NewHasher([][]byte{[]byte("short")}, false); err == nil {
		t.Error("a short pepper is taken")
	}
	if _, err := apikey.DecodePeppers([]string{"not hex"}); err == nil || strings.Contains(err.Error(), "not hex\"") {
		t.Errorf("bad hex: %v", err)
	}
}

func mac(pepper []byte, s string) (h apikey.Hash) {
	m := hmac.New(sha256.New, pepper)
	m.Write([]byte(s))
	m.Sum(h[:0])
	return h
}

func TestScopes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		held     []string
		required string
		want     bool
	}{
		{nil, "", true},
		{nil, "orders:read", false},
		{[]string{"orders:read"}, "orders:read", true},
		{[]string{"orders:read"}, "orders:write", false},
		{[]string{"orders:read"}, "orders:*", false},
		{[]string{"orders:read"}, "orders:reader", false},
		{[]string{"orders:*"}, "orders:write", true},
		{[]string{"orders:*"}, "orders:*", true},
		{[]string{"orders:*"}, "orders:", false},
		{[]string{"orders:*"}, "orders", false},
		{[]string{"orders:*"}, "ordersX:read", false},
		{[]string{"orders:*"}, apikey.FullAccess, false},
		{[]string{apikey.FullAccess}, "orders:write", true},
		{[]string{apikey.FullAccess}, apikey.FullAccess, true},
		{[]string{"telemetry:write", "commands:read", "ingest:write"}, "commands:read", true},
		{[]string{"telemetry:write", "commands:read", "ingest:write"}, "commands:write", false},
	} {
		set, err := apikey.CompileScopes(c.held)
		if err != nil {
			t.Fatal(err)
		}
		if got := set.Covers(c.required); got != c.want {
			t.Errorf("%v covers %q: %v", c.held, c.required, got)
		}
	}
	for _, bad := range []string{"", "orders", ":read", "orders:", "*:read", "*:*", "*", "a:b:c", "or ders:read", "a:r*", "Full_Access", "a:" + strings.Repeat("x", 200)} {
		if _, err := apikey.CompileScopes([]string{"fine:read", bad}); err == nil {
			t.Errorf("scope %.40q taken", bad)
		}
	}
	set, err := apikey.CompileScopes([]string{"b:read", "a:write", "a:*", "b:read"})
	if err != nil || !slices.Equal(set.List(), []string{"a:*", "b:read"}) {
		t.Errorf("compiled to %v, %v", set.List(), err)
	}
	if got := set.Missing([]string{"a:x", "b:write", "b:read", apikey.FullAccess}); !slices.Equal(got, []string{"b:write", apikey.FullAccess}) {
		t.Errorf("missing %v", got)
	}
}

func TestNoAllocations(t *testing.T) {
	k, err := apikey.Generate(apikey.Live)
	if err != nil {
		t.Fatal(err)
	}
	set, err := apikey.CompileScopes([]string{"a:read", "b:read", "orders:*"})
	if err != nil {
		t.Fatal(err)
	}
	peppered, err := apikey.NewHasher([][]byte{[]byte("a pepper of enough bytes")}, false)
	if err != nil {
		t.Fatal(err)
	}
	secret := k.Secret()
	n := testing.AllocsPerRun(100, func() {
		if _, err := apikey.Parse(secret); err != nil {
			t.Fatal(err)
		}
		if apikey.Sum(secret) == peppered.Sum(secret) {
			t.Fatal("a pepper does nothing")
		}
		if !set.Covers("orders:write") || set.Covers("b:write") {
			t.Fatal("scopes")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzParse(f *testing.F) {
	k, err := apikey.Generate(apikey.Live)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(k.Secret())
	f.Add("lk_live_000000000000000000000000000000000000")
	f.Add("lk__")
	f.Add("")
	pattern := regexp.MustCompile(`^` + apikey.Pattern + `$`)
	f.Fuzz(func(t *testing.T, s string) {
		k, err := apikey.Parse(s)
		if err == nil && (k.Secret() != s || !pattern.MatchString(s)) {
			t.Fatalf("took %q", s)
		}
		if errors.Is(err, apikey.ErrChecksum) && !pattern.MatchString(s) {
			t.Fatalf("found the form of a key in %q", s)
		}
	})
}

func FuzzScopes(f *testing.F) {
	f.Add("orders:*", "orders:read")
	f.Add("full_access", "x")
	f.Add("a:b", "a:b:c")
	f.Fuzz(func(t *testing.T, held, required string) {
		set, err := apikey.CompileScopes([]string{held})
		if err != nil {
			return
		}
		if !set.Covers(held) {
			t.Fatalf("%q does not cover itself", held)
		}
		again, err := apikey.CompileScopes(set.List())
		if err != nil || again.Covers(required) != set.Covers(required) {
			t.Fatalf("%q: the shortest form covers other things (%v)", held, err)
		}
		if set.Covers(required) && required != "" && held != apikey.FullAccess {
			resource, _, _ := strings.Cut(held, ":")
			if !strings.HasPrefix(required, resource+":") {
				t.Fatalf("%q covers %q", held, required)
			}
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	k, err := apikey.Generate(apikey.Live)
	if err != nil {
		b.Fatal(err)
	}
	secret := k.Secret()
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := apikey.Parse(secret); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("sha256", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			apikey.Sum(secret)
		}
	})
}

func ExampleParse() {
	_, err := apikey.Parse("lk_live_mistyped")
	fmt.Println(err)
	// Output: not of the form of a key
}

func ExampleScopes_Covers() {
	// The scopes of InventoryOS, a fleet of devices that report what they hold.
	device, _ := apikey.CompileScopes([]string{"telemetry:write", "commands:read"})
	fmt.Println(device.Covers("telemetry:write"), device.Covers("ingest:write"))
	// Output: true false
}
