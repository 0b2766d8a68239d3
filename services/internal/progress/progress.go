// Package progress shows how far something is: a bar on a terminal, a line
// every ten seconds elsewhere, nothing for what is over at once.
package progress

import (
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// Unit is what is counted.
type Unit int

// Units of a Bar.
const (
	Items Unit = iota
	Bytes
)

// Bar is one running task. Its methods may be called from several goroutines.
type Bar struct {
	name   string
	unit   Unit
	total  int64
	out    io.Writer
	start  time.Time
	done   atomic.Int64
	stop   chan struct{}
	once   sync.Once
	shower sync.WaitGroup
	bar    *progressbar.ProgressBar
}

// Start begins to show a task on stderr. total < 0 means that it is not known.
func Start(name string, total int64, unit Unit) *Bar {
	return start(os.Stderr, term.IsTerminal(int(os.Stderr.Fd())), name, total, unit)
}

func start(out io.Writer, terminal bool, name string, total int64, unit Unit) *Bar {
	b := &Bar{name: name, unit: unit, total: total, out: out, start: time.Now(), stop: make(chan struct{})}
	interval := 10 * time.Second
	if terminal {
		interval = 100 * time.Millisecond
		b.bar = progressbar.NewOptions64(total,
			progressbar.OptionSetWriter(out), progressbar.OptionSetDescription(name),
			progressbar.OptionShowBytes(unit == Bytes), progressbar.OptionShowCount(),
			progressbar.OptionSetPredictTime(true), progressbar.OptionFullWidth(), progressbar.OptionClearOnFinish())
	}
	b.shower.Go(func() { b.show(interval) })
	return b
}

// Add counts n more.
func (b *Bar) Add(n int64) { b.done.Add(n) }

// Set counts n in all.
func (b *Bar) Set(n int64) { b.done.Store(n) }

// Write counts the bytes, so that a Bar can stand in an io.TeeReader.
func (b *Bar) Write(p []byte) (int, error) {
	b.Add(int64(len(p)))
	return len(p), nil
}

// Finish stops showing; it may be called twice.
func (b *Bar) Finish() {
	b.once.Do(func() { close(b.stop) })
	b.shower.Wait()
	if b.bar != nil {
		_ = b.bar.Finish()
	}
}

func (b *Bar) show(interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-b.stop:
			return
		case <-ticker.C:
		}
		if b.bar != nil {
			_ = b.bar.Set64(b.done.Load())
			continue
		}
		fmt.Fprintln(b.out, b.line(time.Since(b.start)))
	}
}

func (b *Bar) line(elapsed time.Duration) string {
	done := b.done.Load()
	rate := float64(done) / elapsed.Seconds()
	s := fmt.Sprintf("%s: %s", b.name, b.amount(float64(done)))
	if b.total > 0 {
		s += fmt.Sprintf(" of %s (%d %%)", b.amount(float64(b.total)), 100*done/b.total)
	}
	return s + fmt.Sprintf(", %s/s", b.amount(rate))
}

func (b *Bar) amount(n float64) string {
	if b.unit == Bytes {
		return fmt.Sprintf("%.1f MB", n/1e6)
	}
	return fmt.Sprintf("%.0f", n)
}
