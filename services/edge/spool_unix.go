//go:build unix

package edge

import (
	"fmt"
	"io"
	"os"
	"syscall"
	"unsafe"
)

// lockFile holds an advisory lock until it is closed or the process dies.
func lockFile(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock: %w", err)
	}
	return f, nil
}

// openTally maps the counters into memory: the operating system keeps them when
// the process is killed, at the price of an addition.
func openTally(path string) (*tally, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open tally: %w", err)
	}
	defer f.Close()
	const size = int(unsafe.Sizeof(counters{}))
	if err := f.Truncate(int64(size)); err != nil {
		return nil, fmt.Errorf("size tally: %w", err)
	}
	mem, err := syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map tally: %w", err)
	}
	return &tally{counters: (*counters)(unsafe.Pointer(&mem[0])), unmap: func() error { return syscall.Munmap(mem) }}, nil
}
