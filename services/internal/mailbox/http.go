package mailbox

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"strings"
	"time"
)

//go:embed *.gohtml
var templateFiles embed.FS

var templates = template.Must(template.New("").Funcs(template.FuncMap{
	"clock": func(t time.Time) string { return t.UTC().Format("2 Jan 2006 15:04:05 UTC") },
}).ParseFS(templateFiles, "*.gohtml"))

// Page wraps the body of a page in the surroundings of whoever mounts the
// mailbox. Title is plain text.
type Page func(w http.ResponseWriter, r *http.Request, title string, body template.HTML)

// frameCSP lets the HTML of a mail show itself and nothing else: no script, no
// request to anywhere. Links open elsewhere.
const frameCSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; " +
	"frame-ancestors 'self'; sandbox allow-popups allow-popups-to-escape-sandbox"

// Handler serves /mailbox, /mailbox.json and what lies below. page may be nil:
// then the pages stand alone. It checks no access.
func (m *Mailbox) Handler(page Page) http.Handler {
	if page == nil {
		page = plainPage
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /mailbox", func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.Header.Get("Accept"), "application/json") {
			m.serveJSON(w, r)
			return
		}
		m.render(w, r, page, "Mailbox", "list.gohtml", struct {
			Mails []Summary
			SMTP  string
		}{m.List(), m.Addr().String()})
	})
	mux.HandleFunc("GET /mailbox.json", m.serveJSON)
	mux.HandleFunc("GET /mailbox/{id}", func(w http.ResponseWriter, r *http.Request) { m.serveMail(w, r, page) })
	mux.HandleFunc("GET /mailbox/{id}/html", m.serveHTML)
	mux.HandleFunc("GET /mailbox/{id}/text", m.serveText)
	mux.HandleFunc("GET /mailbox/{id}/raw", m.serveRaw)
	return mux
}

// serveJSON gives all mails, newest first, or those whose recipient is ?to= or
// whose subject holds ?q=.
func (m *Mailbox) serveJSON(w http.ResponseWriter, r *http.Request) {
	to, q := r.URL.Query().Get("to"), strings.ToLower(r.URL.Query().Get("q"))
	mails := []*Mail{}
	for _, s := range m.List() {
		if q != "" && !strings.Contains(strings.ToLower(s.Subject), q) {
			continue
		}
		mail, err := m.Get(s.ID)
		if err != nil { // trimmed since
			continue
		}
		if to != "" && !mail.sentTo(to) {
			continue
		}
		mails = append(mails, mail)
	}
	writeJSON(w, http.StatusOK, struct {
		Total int     `json:"total"`
		Mails []*Mail `json:"mails"`
	}{len(mails), mails})
}

func (m *Mail) sentTo(address string) bool {
	for _, a := range m.Headers[headerDelivered] {
		if strings.EqualFold(a, address) {
			return true
		}
	}
	return false
}

func (m *Mailbox) serveMail(w http.ResponseWriter, r *http.Request, page Page) {
	id, asJSON := strings.CutSuffix(r.PathValue("id"), ".json")
	mail, ok := m.find(w, id)
	if !ok {
		return
	}
	if asJSON || strings.Contains(r.Header.Get("Accept"), "application/json") {
		writeJSON(w, http.StatusOK, mail)
		return
	}
	view := r.URL.Query().Get("view")
	if view != "text" && view != "headers" && mail.HTML != "" {
		view = "html"
	} else if view != "headers" {
		view = "text"
	}
	m.render(w, r, page, mail.Subject, "mail.gohtml", struct {
		*Mail
		View string
	}{mail, view})
}

func (m *Mailbox) serveHTML(w http.ResponseWriter, r *http.Request) {
	mail, ok := m.find(w, r.PathValue("id"))
	if !ok {
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", frameCSP)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	_, _ = w.Write([]byte(openLinksElsewhere(mail.HTML)))
}

// openLinksElsewhere makes links leave the frame, where nothing could load.
func openLinksElsewhere(html string) string {
	const base = `<base target="_blank">`
	lower := strings.ToLower(html)
	if i := strings.Index(lower, "<head>"); i >= 0 {
		return html[:i+6] + base + html[i+6:]
	}
	return base + html
}

func (m *Mailbox) serveText(w http.ResponseWriter, r *http.Request) {
	mail, ok := m.find(w, r.PathValue("id"))
	if !ok {
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write([]byte(mail.Text))
}

func (m *Mailbox) serveRaw(w http.ResponseWriter, r *http.Request) {
	mail, ok := m.find(w, r.PathValue("id"))
	if !ok {
		return
	}
	w.Header().Set("Content-Type", "message/rfc822")
	w.Header().Set("Content-Disposition", `attachment; filename="`+url.PathEscape(mail.ID)+`.eml"`)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(mail.raw)
}

func (m *Mailbox) find(w http.ResponseWriter, id string) (*Mail, bool) {
	mail, err := m.Get(id)
	switch {
	case errors.Is(err, ErrNotFound):
		http.Error(w, "There is no such mail; the oldest are removed when the mailbox is full.", http.StatusNotFound)
	case err != nil:
		m.log.Error("cannot read a mail", "error", err)
		http.Error(w, "The mail cannot be read.", http.StatusInternalServerError)
	}
	return mail, err == nil
}

func (m *Mailbox) render(w http.ResponseWriter, r *http.Request, page Page, title, name string, data any) {
	var body bytes.Buffer
	if err := templates.ExecuteTemplate(&body, name, data); err != nil {
		m.log.Error("cannot render the mailbox", "error", err)
		http.Error(w, "The page cannot be shown.", http.StatusInternalServerError)
		return
	}
	page(w, r, title, template.HTML(body.String())) //nolint:gosec // made by html/template above
}

func plainPage(w http.ResponseWriter, _ *http.Request, title string, body template.HTML) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	_ = templates.ExecuteTemplate(w, "plain.gohtml", struct {
		Title string
		Body  template.HTML
	}{title, body})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v)
}
