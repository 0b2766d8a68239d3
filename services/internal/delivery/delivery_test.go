package delivery

import (
	"regexp"
	"testing"
)

func TestKeyIsAlwaysValidAndDistinct(t *testing.T) {
	t.Parallel()
	valid := regexp.MustCompile(`^[-/_=.a-zA-Z0-9]+$`)
	seen := map[string]string{}
	for _, id := range []string{"alrt_1", "alrt:1", "alrt.1", "alrt 1", "", "a>b", "ä"} {
		k := Key(Alert, id)
		if !valid.MatchString(k) {
			t.Errorf("Key(%q) = %q is no key of a bucket", id, k)
		}
		if other, ok := seen[k]; ok {
			t.Errorf("%q and %q share the key %q", id, other, k)
		}
		seen[k] = id
	}
	if got, want := Key(Hook, "wh_1", "alrt_1"), "hook.wh_1.alrt_1"; got != want {
		t.Errorf("Key() = %q, want %q", got, want)
	}
}
