package anomaly

import (
	"bytes"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// TestDecodesVersion1 reads a baseline as the first version wrote it.
func TestDecodesVersion1(t *testing.T) {
	t.Parallel()
	e := New(Options{})
	ev := usage.Event{OrgID: "org", KeyID: "key", Method: "GET", Route: "/v1/orders", Decision: usage.Allow}
	for i := range 24 * 30 {
		ev.Time = time.Date(2026, 3, 2, i, 0, 0, 0, time.UTC)
		e.Observe(&ev, false)
	}
	now := e.Encode("key")
	old := append([]byte{1}, now[1:1+stateSizeV1]...)
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
	}
	if !bytes.Equal(e.Encode("key"), twin.Encode("key")) {
		t.Error("a baseline of version 1 goes on otherwise than one of today")
	}
	if err := twin.Decode("key", old[:len(old)-1]); err == nil {
		t.Error("a baseline cut short was taken")
	}
}
