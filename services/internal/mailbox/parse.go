package mailbox

import (
	"bytes"
	"errors"
	"io"
	"mime"
	"net/mail"
	"net/textproto"
	"strings"
	"time"

	"github.com/emersion/go-message"
	_ "github.com/emersion/go-message/charset" // mails in other charsets than UTF-8
)

// Summary is what the list shows of a mail.
type Summary struct {
	ID      string    `json:"id"`
	From    string    `json:"from"`
	To      []string  `json:"to"`
	Subject string    `json:"subject"`
	Date    time.Time `json:"date"`
	// ReceivedAt is the clock of the sink.
	ReceivedAt time.Time `json:"received_at"`
	Size       int64     `json:"size"`
	// Copies is how often the mail came, 1 unless a sender had to try again.
	Copies int `json:"copies"`
}

// Mail is a whole mail. Headers are decoded, their names in canonical form.
type Mail struct {
	Summary
	Text    string              `json:"text"`
	HTML    string              `json:"html"`
	Headers map[string][]string `json:"headers"`
	raw     []byte
}

// maxParts bounds the work that one mail's MIME tree can ask for.
const maxParts = 100

// parse reads a mail and never fails: what cannot be read is shown as it came.
func parse(id string, raw []byte) *Mail {
	m := &Mail{Summary: Summary{ID: id, Size: int64(len(raw)), Copies: 1, ReceivedAt: idTime(id), To: []string{}}, raw: raw, Headers: map[string][]string{}}
	m.Date = m.ReceivedAt
	entity, err := message.Read(bytes.NewReader(raw))
	if entity == nil || (err != nil && !message.IsUnknownCharset(err) && !message.IsUnknownEncoding(err)) {
		m.Subject, m.Text = "(unreadable mail)", strings.ToValidUTF8(string(raw), "�")
		return m
	}
	m.readHeader(entity)
	parts := 0
	_ = entity.Walk(func(_ []int, part *message.Entity, err error) error {
		if parts++; parts > maxParts {
			return errors.New("too many parts")
		}
		if err != nil && !message.IsUnknownCharset(err) && !message.IsUnknownEncoding(err) {
			return err
		}
		m.readPart(part)
		return nil
	})
	return m
}

func (m *Mail) readHeader(entity *message.Entity) {
	decoder := mime.WordDecoder{CharsetReader: message.CharsetReader}
	fields := entity.Header.Fields()
	for fields.Next() {
		value := fields.Value()
		if decoded, err := decoder.DecodeHeader(value); err == nil {
			value = decoded
		}
		k := textproto.CanonicalMIMEHeaderKey(fields.Key())
		m.Headers[k] = append(m.Headers[k], strings.ToValidUTF8(value, "�"))
	}
	m.Subject = first(m.Headers["Subject"])
	m.From = strings.Join(splitAddresses(entity.Header.Values("From")), ", ")
	if to := entity.Header.Values("To"); len(to) > 0 {
		m.To = splitAddresses(to)
	} else {
		m.To = append(m.To, m.Headers[headerDelivered]...)
	}
	if date, err := mail.ParseDate(first(m.Headers["Date"])); err == nil {
		m.Date = date.UTC()
	}
}

// readPart keeps the first text and the first HTML that are not attachments.
func (m *Mail) readPart(part *message.Entity) {
	kind, _, err := part.Header.ContentType()
	if err != nil || strings.HasPrefix(kind, "multipart/") {
		return
	}
	if disposition, _, _ := part.Header.ContentDisposition(); disposition == "attachment" {
		return
	}
	var target *string
	switch kind {
	case "text/plain", "":
		target = &m.Text
	case "text/html":
		target = &m.HTML
	default:
		return
	}
	if *target != "" {
		return
	}
	body, err := io.ReadAll(part.Body)
	if err != nil && len(body) == 0 {
		return
	}
	*target = strings.ToValidUTF8(strings.ReplaceAll(string(body), "\r\n", "\n"), "�")
}

func first(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[0]
}

// idTime is the time of arrival that the id begins with.
func idTime(id string) time.Time {
	var nanos int64
	for _, c := range []byte(id[:min(16, len(id))]) {
		switch {
		case '0' <= c && c <= '9':
			nanos = nanos<<4 | int64(c-'0')
		case 'a' <= c && c <= 'f':
			nanos = nanos<<4 | int64(c-'a'+10)
		}
	}
	return time.Unix(0, nanos).UTC()
}
