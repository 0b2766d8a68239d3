package anomaly

import (
	"bytes"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// TestDecodesEarlierVersions reads a baseline as the earlier versions wrote it.
func TestDecodesEarlierVersions(t *testing.T) {
	t.Parallel()
	for version := byte(1); version < codecVersion; version++ {
		e := New(Options{})
		ev := usage.Event{OrgID: "org", KeyID: "key", Method: "GET", Route: "/v1/orders", Decision: usage.Allow}
		for i := range 24 * 30 {
			ev.Time = time.Date(2026, 3, 2, i, 0, 0, 0, time.UTC)
			e.Observe(&ev, false)
		}
		now := e.Encode("key")
		old := append([]byte{version}, now[1:1+stateSizes[version]]...)
		old = append(old, now[1+stateSize:]...)
		twin := New(Options{})
		if err := twin.Decode("key", old); err != nil {
			t.Fatal(err)
		}
		ev.Time = ev.Time.Add(time.Hour)
		for _, x := range []*Engine{e, twin} {
			if alerts := x.Observe(&ev, false); len(alerts) > 0 {
				t.Fatalf("an ordinary event after the decoding raised %v", alerts)
			}
			x.keys.get("key").volumeSurge = volumeSurge{} // of which the earlier versions know nothing
		}
		if !bytes.Equal(e.Encode("key"), twin.Encode("key")) {
			t.Errorf("a baseline of version %d goes on otherwise than one of today", version)
		}
		if err := twin.Decode("key", old[:len(old)-1]); err == nil {
			t.Error("a baseline cut short was taken")
		}
	}
}
