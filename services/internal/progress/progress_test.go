package progress

import (
	"bytes"
	"testing"
	"time"
)

func TestLine(t *testing.T) {
	t.Parallel()
	b := start(&bytes.Buffer{}, false, "load", 200, Items)
	b.Add(50)
	defer b.Finish()
	if got, want := b.line(10*time.Second), "load: 50 of 200 (25 %), 5/s"; got != want {
		t.Errorf("line = %q, want %q", got, want)
	}
}

func TestShortTaskShowsNothing(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	b := start(&out, false, "load", -1, Bytes)
	b.Set(1)
	b.Finish()
	b.Finish()
	if out.Len() != 0 {
		t.Errorf("a task that ends at once printed %q", out.String())
	}
}
