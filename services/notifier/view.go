package notifier

import (
	"embed"
	"fmt"
	"html/template"
	"net/url"
	"strings"
	texttemplate "text/template"
	"time"
	_ "time/tzdata" // LATCHKEY_MAIL_TIMEZONE on machines without zone files

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/wording"
)

//go:embed templates
var templateFiles embed.FS

var (
	htmlTemplates = template.Must(template.ParseFS(templateFiles, "templates/*.html.tmpl"))
	textTemplates = texttemplate.Must(texttemplate.New("").Funcs(texttemplate.FuncMap{
		"wrap": wrap, "rule": func(s string) string { return strings.Repeat("-", len([]rune(s))) },
	}).ParseFS(templateFiles, "templates/*.txt.tmpl"))
)

// keyView is a key as mails name it.
type keyView struct {
	ID      string
	Name    string // the id where Latchkey does not manage the key
	Masked  string // "lk_live_ab12…", empty if unknown
	Managed bool
	Scopes  string
	// State says what was already done: still active, revoked, …
	State string
	// Active keys can still be used by whoever holds them.
	Active bool
}

// row is one line of facts.
type row struct{ Label, Value string }

// evidenceView is one trigger's observation against what is usual.
type evidenceView struct {
	Title, Observed, Usual, Rarity string
}

// mailView is what the templates of all mails get. Everything in it is clean.
type mailView struct {
	Subject    string
	Preheader  string
	Severity   string // "high", for colours
	Badge      string // "High"
	Headline   string
	Summary    string
	Key        keyView
	Facts      []row
	Evidence   []evidenceView
	Steps      []step
	URL        string // page that only shows
	URLLabel   string
	ConsoleURL string // to type by hand
	CheckID    string // to find there
	OrgName    string
	To         string
	Why        string // why this address got the mail
	Lines      []digestLine
	More       int
}

// step is one thing to do, with a command to type if there is one.
type step struct{ Title, Text, Command string }

// renderer makes letters.
type renderer struct {
	consoleURL string
	zone       *time.Location
	mailer     *mailer
}

// alertSubject is CONVENTIONS "Alert mail" 1: severity, name, plain reason.
func alertSubject(a *alert.Alert, k keyView) string {
	what := "is behaving unlike itself"
	if len(a.Triggers) > 0 {
		what = wording.Reason(a.Triggers[0])
		if len(a.Triggers) > 1 {
			what += " and " + wording.Reason(a.Triggers[1])
		}
	}
	name := k.Name
	if k.Masked != "" {
		name += " (" + k.Masked + ")"
	}
	return headerText(fmt.Sprintf("%s: %s, %s", wording.Severity(a.Severity), name, what))
}

// alertLetter makes the mail of an alert. org and rec may be nil: many keys are
// kept elsewhere.
func (r *renderer) alertLetter(a *alert.Alert, org *key.Org, rec *key.Record, to string, created time.Time) (*letter, error) {
	k := viewKey(a.KeyID, rec, created)
	v := &mailView{
		Subject: alertSubject(a, k), Severity: severityClass(a.Severity), Badge: wording.Severity(a.Severity), Key: k,
		Headline: wording.Headline(k.Name, a), Summary: clean(a.Summary, 600), Facts: r.facts(a, org, k),
		URL: r.page("alerts", a.ID), URLLabel: "See the alert", CheckID: ident(a.ID),
	}
	v.Preheader = v.Summary
	for _, e := range a.Evidence {
		v.Evidence = append(v.Evidence, evidenceView{
			Title: wording.Trigger(e.Trigger), Observed: clean(e.Observed, 300), Usual: clean(e.Usual, 300), Rarity: wording.Rarity(e.PValue),
		})
	}
	v.Steps = alertSteps(k)
	r.address(v, org, to)
	return r.letter("alert", v, &letter{
		To: to, MessageID: r.mailer.messageID(a.ID), Date: created,
		Urgent: a.Severity == alert.High || a.Severity == alert.Critical,
		Headers: map[string]string{
			"X-Latchkey-Alert-Id": a.ID, "X-Latchkey-Key-Id": a.KeyID, "X-Latchkey-Org-Id": a.OrgID,
			"X-Latchkey-Severity": a.Severity, "X-Latchkey-Triggers": strings.Join(a.Triggers, ","),
		},
	})
}

// letter renders both forms into l.
func (r *renderer) letter(name string, v *mailView, l *letter) (*letter, error) {
	var html, text strings.Builder
	if err := htmlTemplates.ExecuteTemplate(&html, name+".html.tmpl", v); err != nil {
		return nil, fmt.Errorf("render %s mail as HTML: %w", name, err)
	}
	if err := textTemplates.ExecuteTemplate(&text, name+".txt.tmpl", v); err != nil {
		return nil, fmt.Errorf("render %s mail as text: %w", name, err)
	}
	l.Subject, l.HTML, l.Text = v.Subject, html.String(), text.String()
	return l, nil
}

func (r *renderer) address(v *mailView, org *key.Org, to string) {
	v.ConsoleURL, v.To = r.consoleURL, to
	if org != nil {
		v.OrgName = clean(org.Name, 100)
		v.Why = "you are the owner of the organization " + v.OrgName
		return
	}
	v.Why = "its organization is not known to Latchkey and this address is the fallback"
}

func (r *renderer) page(parts ...string) string {
	escaped := []string{r.consoleURL}
	for _, p := range parts {
		escaped = append(escaped, url.PathEscape(p))
	}
	return strings.Join(escaped, "/")
}

func viewKey(id string, rec *key.Record, now time.Time) keyView {
	if rec == nil {
		return keyView{
			ID: ident(id), Name: ident(id),
			State: "Latchkey does not manage this key and has blocked nothing: where you issued it, it works as before.", Active: true,
		}
	}
	k := keyView{ID: ident(id), Name: clean(rec.Name, 80), Masked: masked(rec.Prefix), Managed: true, Scopes: clean(strings.Join(rec.Scopes, ", "), 200)}
	if k.Name == "" {
		k.Name = k.ID
	}
	switch {
	case rec.Status == key.Revoked && rec.RevokedAt != nil:
		k.State = "The key was revoked on " + clock(rec.RevokedAt.UTC()) + "; requests with it are refused."
	case rec.Status == key.Revoked:
		k.State = "The key is revoked; requests with it are refused."
	case rec.Status == key.Suspended:
		k.State = "The key is suspended; requests with it are refused until you resume it."
	case rec.ExpiresAt != nil && !rec.ExpiresAt.After(now):
		k.State = "The key expired on " + clock(rec.ExpiresAt.UTC()) + "; requests with it are refused."
	case rec.SuccessorID != "" && rec.ExpiresAt != nil:
		k.State, k.Active = "The key was rotated and still works until "+clock(rec.ExpiresAt.UTC())+".", true
	default:
		k.State, k.Active = "The key is still active. Nothing was blocked.", true
	}
	return k
}

func (r *renderer) facts(a *alert.Alert, org *key.Org, k keyView) []row {
	rows := []row{{"Key", k.Name}}
	if k.Masked != "" {
		rows = append(rows, row{"Begins with", k.Masked})
	}
	rows = append(rows, row{"Key ID", k.ID})
	if k.Scopes != "" {
		rows = append(rows, row{"Scopes", k.Scopes})
	}
	if org != nil {
		rows = append(rows, row{"Organization", clean(org.Name, 100)})
	} else {
		rows = append(rows, row{"Organization", ident(a.OrgID) + " (not managed here)"})
	}
	rows = append(rows, row{"When", clock(a.Time.UTC())})
	if local := a.Time.In(r.zone); local.Format("-0700") != "+0000" {
		rows = append(rows, row{"Local time", clock(local)})
	}
	rows = append(rows, row{"Where", place(a)})
	if a.SourceIP.IsValid() {
		rows = append(rows, row{"Network", prefixOf(a.SourceIP)})
	}
	if request := strings.TrimSpace(clean(a.Method, 16) + " " + clean(a.Route, 160)); request != "" {
		rows = append(rows, row{"Request", request})
	}
	if a.UserAgent != "" {
		rows = append(rows, row{"Client says", clean(a.UserAgent, 160)})
	}
	names := make([]string, 0, len(a.Triggers))
	for _, t := range a.Triggers {
		names = append(names, clean(t, 64))
	}
	return append(rows, row{"Triggered by", strings.Join(names, ", ")})
}

// alertSteps are CONVENTIONS "Alert mail" 5: if this was you, if it was not.
func alertSteps(k keyView) []step {
	yes := step{
		Title: "If this was you",
		Text:  "Open the alert and say “expected”, or “planned” for something that passes. Latchkey learns it, for a while. Nothing happens before you press a button there.",
	}
	if !k.Managed {
		return []step{
			{
				Title: "If this was not you",
				Text:  "Replace the key where it was issued, take the old one out of service, and look at what it did on the key’s page.",
			}, yes,
		}
	}
	no := step{
		Title:   "If this was not you",
		Text:    "Replace the key at once; the old secret stops working everywhere within a second:",
		Command: "latchkey key rotate " + k.ID + " --grace 0s",
	}
	if !k.Active {
		no = step{
			Title: "If this was not you",
			Text:  "The key no longer works, so nobody gets in with it. Find out where its secret leaked, and look at what it did before on the key’s page.",
		}
	}
	return []step{no, yes}
}

func severityClass(severity string) string {
	switch severity {
	case alert.Critical, alert.High, alert.Medium, alert.Low:
		return severity
	}
	return alert.Medium
}

// wrap breaks text at blanks so that no line is longer than width, each line
// after the first indented.
func wrap(width, indent int, s string) string {
	var b strings.Builder
	column := 0
	for i, word := range strings.Fields(s) {
		n := len([]rune(word))
		switch {
		case i == 0:
		case column+1+n > width:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			column = indent
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += n
	}
	return b.String()
}
