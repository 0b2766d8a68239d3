package edge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/latchkey-dev/latchkey/pkg/usage"
)

// frame is one message for the USAGE stream: the events of one partition.
type frame = usage.Frame

// store keeps frames in order between the queue and JetStream. The disk spool is
// one, memory the other.
type store interface {
	// append adds a frame at the end; errFull if there is no room.
	append(f frame) error
	// next is the first frame that was not yet read, and false if there is none.
	next() (frame, bool, error)
	// release forgets the frame that was read first and not yet released.
	release()
	// rewind makes next begin again at the first frame that was not released.
	rewind()
	// backlog is how much is waiting.
	backlog() (events int, bytes int64)
	close() error
}

var errFull = errors.New("no room left")

// diskSpool is a directory of segment files. A frame is written to the newest
// before it is published, and a segment is deleted when all its frames are
// stored in JetStream. What a killed process had written is found by the next
// one; a frame that it writes twice has one Msg-Id, and its events one id each.
//
// A library was looked at first: tidwall/wal rewrites a segment for every
// truncation of its front and refuses to open a log whose last record is torn,
// which after a crash is the one case that counts.
type diskSpool struct {
	dir      string
	max      int64 // bytes in all segments
	segment  int64 // bytes after which a new segment begins
	log      *slog.Logger
	fileLock io.Closer

	mu       sync.Mutex
	segments []*segment // oldest first
	out      *os.File   // the newest segment
	number   uint64     // of the newest segment
	bytes    int64
	events   int
	reading  int   // index of the segment that next reads
	offset   int64 // in it
	in       *os.File
	read     []place // frames read and not yet released
}

type segment struct {
	path   string
	size   int64
	frames int // not yet released
	sealed bool
}

// place is where a frame lies.
type place struct {
	seg    *segment
	offset int64
	size   int64
	events int
}

const (
	segmentBytes  = 8 << 20
	segmentSuffix = ".seg"
	// recordHead is the length and the CRC-32C of a record's body.
	recordHead = 8
	maxRecord  = 16 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// openSpool opens the spool in dir, and mends what a crash left of it.
func openSpool(dir string, maxBytes int64, log *slog.Logger) (*diskSpool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create spool: %w", err)
	}
	lock, err := lockFile(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("lock spool %s: %w (does another edge use it?)", dir, err)
	}
	s := &diskSpool{dir: dir, max: maxBytes, segment: min(segmentBytes, max(maxBytes/4, 4096)), log: log, fileLock: lock}
	if err := s.recover(); err != nil {
		_ = lock.Close()
		return nil, err
	}
	return s, nil
}

func (s *diskSpool) recover() error {
	names, err := filepath.Glob(filepath.Join(s.dir, "*"+segmentSuffix))
	if err != nil {
		return fmt.Errorf("list spool: %w", err)
	}
	slices.Sort(names)
	for _, name := range names {
		if _, err := fmt.Sscanf(strings.TrimSuffix(filepath.Base(name), segmentSuffix), "%x", &s.number); err != nil {
			return fmt.Errorf("spool has a file of another kind: %s", name)
		}
		seg, events, err := s.check(name)
		if err != nil {
			return err
		}
		if seg.frames == 0 {
			if err := os.Remove(name); err != nil {
				return fmt.Errorf("remove empty segment: %w", err)
			}
			continue
		}
		s.segments = append(s.segments, seg)
		s.bytes += seg.size
		s.events += events
	}
	return nil
}

// check reads a segment through, and cuts off what was not written whole.
func (s *diskSpool) check(name string) (*segment, int, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, 0, fmt.Errorf("read segment: %w", err)
	}
	seg := &segment{path: name, sealed: true}
	events := 0
	for {
		body, ok := record(data[seg.size:])
		if !ok {
			break
		}
		f, err := decodeFrame(body)
		if err != nil {
			break
		}
		seg.size += int64(recordHead + len(body))
		seg.frames++
		events += f.Events
	}
	if rest := int64(len(data)) - seg.size; rest > 0 {
		s.log.Warn("spool segment ends in an unfinished record, which is cut off", "segment", filepath.Base(name), "bytes", rest)
		if err := os.Truncate(name, seg.size); err != nil {
			return nil, 0, fmt.Errorf("cut segment: %w", err)
		}
	}
	return seg, events, nil
}

// record is the body of the record that data begins with.
func record(data []byte) ([]byte, bool) {
	if len(data) < recordHead {
		return nil, false
	}
	size := binary.LittleEndian.Uint32(data)
	if size > maxRecord || int(size) > len(data)-recordHead {
		return nil, false
	}
	body := data[recordHead : recordHead+int(size)]
	return body, crc32.Checksum(body, castagnoli) == binary.LittleEndian.Uint32(data[4:])
}

func encodeRecord(f frame) []byte {
	b := make([]byte, recordHead, recordHead+32+len(f.ID)+len(f.Subject)+len(f.ContentType)+len(f.Data))
	b = binary.AppendUvarint(b, uint64(f.Events))
	for _, text := range []string{f.ID, f.Subject, f.ContentType} {
		b = binary.AppendUvarint(b, uint64(len(text)))
		b = append(b, text...)
	}
	b = append(b, f.Data...)
	binary.LittleEndian.PutUint32(b, uint32(len(b)-recordHead))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[recordHead:], castagnoli))
	return b
}

var errFrame = errors.New("record is no frame")

func decodeFrame(b []byte) (frame, error) {
	var f frame
	events, n := binary.Uvarint(b)
	if n <= 0 || events > 1<<24 {
		return f, errFrame
	}
	b = b[n:]
	f.Events = int(events)
	for _, text := range []*string{&f.ID, &f.Subject, &f.ContentType} {
		size, n := binary.Uvarint(b)
		if n <= 0 || size > uint64(len(b)-n) {
			return f, errFrame
		}
		*text = string(b[n : n+int(size)])
		b = b[n+int(size):]
	}
	f.Data = b
	return f, nil
}

func (s *diskSpool) append(f frame) error {
	rec := encodeRecord(f)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes+int64(len(rec)) > s.max {
		return errFull
	}
	if s.out == nil || s.segments[len(s.segments)-1].size >= s.segment {
		if err := s.roll(); err != nil {
			return err
		}
	}
	seg := s.segments[len(s.segments)-1]
	if n, err := s.out.Write(rec); err != nil {
		// Half a record would hide what comes behind it.
		if n > 0 {
			if cut := s.out.Truncate(seg.size); cut != nil {
				err = errors.Join(err, cut)
				seg.sealed, s.out = true, nil
			}
		}
		return fmt.Errorf("write spool: %w", err)
	}
	seg.size += int64(len(rec))
	seg.frames++
	s.bytes += int64(len(rec))
	s.events += f.Events
	return nil
}

// roll begins a new segment.
func (s *diskSpool) roll() error {
	path := filepath.Join(s.dir, fmt.Sprintf("%016x%s", s.number+1, segmentSuffix))
	// Appending, so that a truncated segment goes on at its end.
	out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("begin spool segment: %w", err)
	}
	if s.out != nil {
		s.segments[len(s.segments)-1].sealed = true
		_ = s.out.Close()
	}
	s.number++
	s.out = out
	s.segments = append(s.segments, &segment{path: path})
	s.dropEmpty()
	return nil
}

func (s *diskSpool) next() (frame, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.reading < len(s.segments) {
		seg := s.segments[s.reading]
		if s.offset >= seg.size {
			if s.reading == len(s.segments)-1 {
				return frame{}, false, nil
			}
			s.seek(s.reading+1, 0)
			continue
		}
		if s.in == nil {
			in, err := os.Open(seg.path)
			if err != nil {
				return frame{}, false, fmt.Errorf("open spool segment: %w", err)
			}
			s.in = in
		}
		f, size, err := readFrame(s.in, s.offset)
		if err != nil {
			return frame{}, false, fmt.Errorf("read %s at %d: %w", filepath.Base(seg.path), s.offset, err)
		}
		s.read = append(s.read, place{seg, s.offset, size, f.Events})
		s.offset += size
		return f, true, nil
	}
	return frame{}, false, nil
}

func readFrame(in io.ReaderAt, offset int64) (frame, int64, error) {
	var head [recordHead]byte
	if _, err := in.ReadAt(head[:], offset); err != nil {
		return frame{}, 0, err
	}
	size := binary.LittleEndian.Uint32(head[:])
	if size > maxRecord {
		return frame{}, 0, errFrame
	}
	body := make([]byte, size)
	if _, err := in.ReadAt(body, offset+recordHead); err != nil {
		return frame{}, 0, err
	}
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
		return frame{}, 0, errors.New("checksum does not match")
	}
	f, err := decodeFrame(body)
	return f, recordHead + int64(size), err
}

func (s *diskSpool) seek(index int, offset int64) {
	if s.in != nil && index != s.reading {
		_ = s.in.Close()
		s.in = nil
	}
	s.reading, s.offset = index, offset
}

func (s *diskSpool) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.read[0]
	s.read = s.read[1:]
	p.seg.frames--
	s.events -= p.events
	s.dropEmpty()
}

// dropEmpty deletes the oldest segments that hold nothing any more. The newest
// is still written to; it goes when it is sealed, or empty and large enough to
// be worth it.
func (s *diskSpool) dropEmpty() {
	for len(s.segments) > 0 {
		seg := s.segments[0]
		if seg.frames > 0 {
			return
		}
		if !seg.sealed {
			if seg.size < s.segment/8 {
				return
			}
			_ = s.out.Close()
			s.out = nil
		}
		if err := os.Remove(seg.path); err != nil {
			s.log.Error("remove spool segment", "error", err)
		}
		s.bytes -= seg.size
		s.segments = s.segments[1:]
		if s.reading > 0 {
			s.reading--
			continue
		}
		if s.in != nil {
			_ = s.in.Close()
			s.in = nil
		}
		s.offset = 0
	}
}

func (s *diskSpool) rewind() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.read) == 0 {
		return
	}
	first := s.read[0]
	s.read = nil
	s.seek(slices.Index(s.segments, first.seg), first.offset)
}

// skip gives up the rest of the segment that cannot be read, and says how many
// frames that costs.
func (s *diskSpool) skip() (frames int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reading >= len(s.segments) {
		return 0
	}
	seg := s.segments[s.reading]
	unread := seg.frames
	for _, p := range s.read {
		if p.seg == seg {
			unread--
		}
	}
	seg.frames -= unread
	if s.reading == len(s.segments)-1 && s.out != nil {
		seg.sealed = true
		_ = s.out.Close()
		s.out = nil
	}
	s.offset = seg.size
	s.dropEmpty()
	return unread
}

func (s *diskSpool) backlog() (int, int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.events, s.bytes
}

func (s *diskSpool) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if s.in != nil {
		errs = append(errs, s.in.Close())
	}
	if s.out != nil {
		errs = append(errs, s.out.Close())
	}
	// Nothing unsent: leave nothing behind that the next start would send again.
	if s.events == 0 {
		for _, seg := range s.segments {
			errs = append(errs, os.Remove(seg.path))
		}
	}
	s.in, s.out, s.segments = nil, nil, nil
	return errors.Join(append(errs, s.fileLock.Close())...)
}

// memoryStore is the store of an edge without a spool directory.
type memoryStore struct {
	max int64

	mu     sync.Mutex
	frames []frame
	read   int
	bytes  int64
	events int
}

func (m *memoryStore) append(f frame) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bytes+int64(len(f.Data)) > m.max {
		return errFull
	}
	m.frames = append(m.frames, f)
	m.bytes += int64(len(f.Data))
	m.events += f.Events
	return nil
}

func (m *memoryStore) next() (frame, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.read >= len(m.frames) {
		return frame{}, false, nil
	}
	m.read++
	return m.frames[m.read-1], true, nil
}

func (m *memoryStore) release() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bytes -= int64(len(m.frames[0].Data))
	m.events -= m.frames[0].Events
	m.frames[0] = frame{}
	m.frames = m.frames[1:]
	m.read--
}

func (m *memoryStore) rewind() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.read = 0
}

func (m *memoryStore) backlog() (int, int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.events, m.bytes
}

func (m *memoryStore) close() error { return nil }
