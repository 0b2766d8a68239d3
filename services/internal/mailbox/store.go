package mailbox

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/mail"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// ErrNotFound tells that no mail has the id.
var ErrNotFound = errors.New("no such mail")

const (
	mailSuffix = ".eml"
	// Trace fields that the sink puts before a mail, as a delivery agent does.
	headerReturnPath = "Return-Path"
	headerDelivered  = "Delivered-To"
)

// envelope is what SMTP said beside the mail itself.
type envelope struct {
	From   string
	To     []string
	Remote string
	Helo   string
	Time   time.Time
}

// store keeps mails as files; the index in memory is made from the files.
type store struct {
	dir      string
	maxMails int
	maxBytes int64

	mu    sync.Mutex
	index []entry // oldest first
	bytes int64
	seen  map[string]string // identity → id, see [identity]
}

type entry struct {
	Summary
	identity string
}

func openStore(dir string, maxMails int, maxBytes int64) (*store, error) {
	s := &store{dir: dir, maxMails: maxMails, maxBytes: maxBytes, seen: make(map[string]string)}
	for _, sub := range []string{"tmp", "new"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("create mailbox: %w", err)
		}
	}
	// What lies in tmp was never accepted.
	leftovers, _ := filepath.Glob(filepath.Join(dir, "tmp", "*"+mailSuffix))
	for _, f := range leftovers {
		_ = os.Remove(f)
	}
	files, err := os.ReadDir(filepath.Join(dir, "new"))
	if err != nil {
		return nil, fmt.Errorf("read mailbox: %w", err)
	}
	for _, f := range files { // by name, which begins with the time of arrival
		id, ok := strings.CutSuffix(f.Name(), mailSuffix)
		if !ok || !validID(id) {
			continue
		}
		m, err := s.read(id)
		if err != nil {
			continue
		}
		s.add(m)
	}
	s.trim()
	return s, nil
}

// put stores a mail and returns once it is on disk. A mail that is here already
// is counted and not stored again.
func (s *store) put(env envelope, body []byte) (id string, copies int, err error) {
	raw := append(env.header(), body...)
	id = newID(env.Time)
	m := parse(id, raw)
	identity := m.identity()

	s.mu.Lock()
	defer s.mu.Unlock()
	if first, ok := s.seen[identity]; ok && identity != "" {
		for i := range s.index {
			if s.index[i].ID == first {
				s.index[i].Copies++
				return first, s.index[i].Copies, nil
			}
		}
	}
	if err := writeFile(s.dir, id+mailSuffix, raw); err != nil {
		return "", 0, err
	}
	s.add(m)
	s.trim()
	return id, 1, nil
}

// add puts a stored mail into the index; the caller holds mu or is alone.
func (s *store) add(m *Mail) {
	e := entry{Summary: m.Summary, identity: m.identity()}
	s.index = append(s.index, e)
	s.bytes += e.Size
	if e.identity != "" {
		s.seen[e.identity] = e.ID
	}
}

// trim removes the oldest mails until the bounds hold; the newest always stays.
func (s *store) trim() {
	n := 0
	for len(s.index)-n > 1 && (len(s.index)-n > s.maxMails || s.bytes > s.maxBytes) {
		e := s.index[n]
		_ = os.Remove(s.path(e.ID))
		s.bytes -= e.Size
		if s.seen[e.identity] == e.ID {
			delete(s.seen, e.identity)
		}
		n++
	}
	s.index = slices.Delete(s.index, 0, n)
}

func (s *store) list() []Summary {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Summary, 0, len(s.index))
	for _, e := range slices.Backward(s.index) {
		out = append(out, e.Summary)
	}
	return out
}

func (s *store) get(id string) (*Mail, error) {
	if !validID(id) {
		return nil, ErrNotFound
	}
	m, err := s.read(id)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.index {
		if s.index[i].ID == id {
			m.Copies = s.index[i].Copies
		}
	}
	return m, nil
}

func (s *store) read(id string) (*Mail, error) {
	raw, err := os.ReadFile(s.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("read mail: %w", err)
	}
	return parse(id, raw), nil
}

func (s *store) path(id string) string { return filepath.Join(s.dir, "new", id+mailSuffix) }

// header is what a delivery agent writes before the mail: return path,
// recipients and the hop it came over.
func (e envelope) header() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s: <%s>\r\n", headerReturnPath, oneLine(e.From))
	for _, to := range e.To {
		fmt.Fprintf(&b, "%s: %s\r\n", headerDelivered, oneLine(to))
	}
	fmt.Fprintf(&b, "Received: from %s (%s) by latchkey.localhost (Latchkey mailbox);\r\n\t%s\r\n",
		oneLine(e.Helo), oneLine(e.Remote), e.Time.Format("Mon, 02 Jan 2006 15:04:05 -0700"))
	return b.Bytes()
}

// oneLine keeps what a client said from starting a header of its own.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, s)
	return s[:min(len(s), 900)]
}

// newID is sortable by time of arrival and cannot be guessed.
func newID(t time.Time) string {
	var random [6]byte
	_, _ = rand.Read(random[:])
	return fmt.Sprintf("%016x-%s", t.UnixNano(), hex.EncodeToString(random[:]))
}

func validID(id string) bool {
	if len(id) != 16+1+12 || id[16] != '-' {
		return false
	}
	return strings.Trim(id, "0123456789abcdef-") == "" && strings.Count(id, "-") == 1
}

// writeFile makes dir/new/name appear whole or not at all, and survive a crash.
func writeFile(dir, name string, data []byte) error {
	tmp := filepath.Join(dir, "tmp", name)
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("create mail: %w", err)
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, filepath.Join(dir, "new", name))
	}
	if err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("write mail: %w", err)
	}
	return syncDir(filepath.Join(dir, "new"))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open mailbox: %w", err)
	}
	err = errors.Join(d.Sync(), d.Close())
	if err != nil {
		return fmt.Errorf("sync mailbox: %w", err)
	}
	return nil
}

// identity is what two copies of one mail share: the Message-ID and the
// recipients. Empty if the mail has no Message-ID.
func (m *Mail) identity() string {
	ids := m.Headers["Message-Id"]
	if len(ids) == 0 || ids[0] == "" {
		return ""
	}
	rcpts := slices.Clone(m.Headers[headerDelivered])
	slices.Sort(rcpts)
	return ids[0] + "\x00" + strings.Join(rcpts, "\x00")
}

func splitAddresses(values []string) []string {
	out := []string{}
	for _, v := range values {
		list, err := mail.ParseAddressList(v)
		if err != nil {
			out = append(out, v)
			continue
		}
		for _, a := range list {
			out = append(out, displayAddress(a))
		}
	}
	return out
}

func displayAddress(a *mail.Address) string {
	if a.Name == "" {
		return a.Address
	}
	return a.Name + " <" + a.Address + ">"
}
