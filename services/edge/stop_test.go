package edge

import (
	"context"
	"testing"
)

// TestClosedTwice: the second close must not give memory back that has another
// owner by then.
func TestClosedTwice(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	nc, _ := srv.connect()
	first, _ := testOutbox(t, nc, nil)
	if err := first.close(context.Background()); err != nil {
		t.Fatal(err)
	}
	second, _ := testOutbox(t, nc, nil)
	if err := first.close(context.Background()); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if !second.Enqueue(numbered("key_1", i)) || first.Enqueue(numbered("key_1", i)) {
			t.Fatal("the wrong one is closed")
		}
	}
	first.flush()
	second.flush()
}
