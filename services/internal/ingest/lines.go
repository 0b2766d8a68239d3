package ingest

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// MaxLine is the length in bytes of the longest line that is read.
const MaxLine = 4 << 20

// decompress tells gzip by its first bytes, whatever the file is called.
func decompress(r io.Reader) (io.Reader, error) {
	buffered := bufio.NewReaderSize(r, 1<<18)
	head, err := buffered.Peek(2)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read: %w", err)
	}
	if len(head) < 2 || head[0] != 0x1f || head[1] != 0x8b {
		return buffered, nil
	}
	plain, err := gzip.NewReader(buffered)
	if err != nil {
		return nil, fmt.Errorf("read gzip: %w", err)
	}
	return bufio.NewReaderSize(plain, 1<<18), nil
}

// eachLine calls fn for every line that is not blank, trimmed, numbered from 1.
func eachLine(ctx context.Context, r io.Reader, fn func(number int64, line []byte) error) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 1<<18), MaxLine)
	for number := int64(1); lines.Scan(); number++ {
		if number%4096 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		line := lines.Bytes()
		if number == 1 {
			line = bytes.TrimPrefix(line, []byte("\xef\xbb\xbf"))
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		if err := fn(number, line); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read lines: %w", err)
	}
	return ctx.Err()
}

// ordinals makes ids for records that have none: of the record's bytes, and of
// how many with the same bytes came before in the file. So the same file gives
// the same ids, and two equal lines of one file are two events.
type ordinals struct {
	now, before map[[16]byte]uint32
}

// generation bounds the memory: equal lines that lie further apart than two
// generations count as one, which no log in order of time has.
const generation = 1 << 19

func (o *ordinals) id(salt string, raw []byte) string {
	sum := sha256.New()
	sum.Write([]byte(salt))
	sum.Write([]byte{0})
	sum.Write(raw)
	key := [16]byte(sum.Sum(nil))
	if o.now == nil || len(o.now) >= generation {
		o.now, o.before = make(map[[16]byte]uint32, 1024), o.now
	}
	n, known := o.now[key]
	if !known {
		n = o.before[key]
	}
	o.now[key] = n + 1
	if n > 0 {
		sum.Write([]byte{0})
		sum.Write([]byte(strconv.FormatUint(uint64(n), 10)))
		key = [16]byte(sum.Sum(nil))
	}
	return "imp_" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(key[:]))
}
