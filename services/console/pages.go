package console

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"html/template"
	"io/fs"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/baseline"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/api"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/delivery"
	"github.com/latchkey-dev/latchkey/services/internal/mailbox"
	"github.com/latchkey-dev/latchkey/services/internal/wording"
)

var (
	//go:embed templates static
	files embed.FS
	// Parsed once and never executed: each page clones them for its own clock.
	templates = template.Must(template.New("").Funcs(functions(time.Time{})).ParseFS(files, "templates/*.gohtml"))
)

// pageCSP lets pages load what is served here and nothing else.
const pageCSP = "default-src 'none'; style-src 'self'; img-src 'self' data:; script-src 'self'; connect-src 'self'; frame-src 'self'; " +
	"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// Mount puts the pages onto a mux whose API is server, and the mailbox, if there
// is one, behind the same guard. It is called once.
func (s *Service) Mount(mux *http.ServeMux, server *api.Server, box *mailbox.Mailbox) {
	s.api, s.mailbox = server, box
	static, err := fs.Sub(files, "static")
	if err != nil {
		panic(err) // embedded above
	}
	mux.Handle("GET /static/", cacheStatic(http.StripPrefix("/static/", http.FileServerFS(static))))
	mux.HandleFunc("GET /favicon.ico", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/static/icon.svg", http.StatusMovedPermanently)
	})
	mux.HandleFunc("GET /login", s.loginPage)
	mux.HandleFunc("POST /login", s.loginPage)
	mux.HandleFunc("POST /logout", s.logout)
	mux.HandleFunc("GET /{$}", s.guard("keys:read", s.overviewPage))
	mux.HandleFunc("GET /keys", s.guard("keys:read", s.keysPage))
	mux.HandleFunc("GET /keys/{id}", s.guard("keys:read", s.keyPage))
	mux.HandleFunc("GET /alerts", s.guard("alerts:read", s.alertsPage))
	mux.HandleFunc("GET /alerts/{id}", s.guard("alerts:read", s.alertPage))
	mux.HandleFunc("POST /alerts/{id}/verdict", s.guard("alerts:write", s.postVerdict))
	mux.HandleFunc("GET /audit", s.guard("audit:read", s.auditPage))
	mux.HandleFunc("GET /", s.guard("keys:read", func(w http.ResponseWriter, r *http.Request) {
		s.showError(w, r, http.StatusNotFound, "There is no such page", "")
	}))
	if box != nil {
		pages := s.everything(box.Handler(s.framed).ServeHTTP)
		mux.HandleFunc("GET /mailbox", pages)
		mux.HandleFunc("GET /mailbox.json", pages)
		mux.HandleFunc("GET /mailbox/", pages)
	}
}

func cacheStatic(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "public, max-age=300")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		h.ServeHTTP(w, r)
	})
}

// layout is what surrounds every page.
type layout struct {
	Title  string
	Active string // the part of the navigation
	Body   template.HTML
	Viewer *viewer
	// OrgName is the one organization that the viewer sees.
	OrgName  string
	Mailbox  bool
	OpenHigh int
	Token    string
	// Away tells what is missing while ClickHouse does not answer.
	Away bool
	// Live pages refresh themselves where scripts run.
	Live bool
}

// render makes a page from the template of that name.
func (s *Service) render(w http.ResponseWriter, r *http.Request, status int, name, title string, data any) {
	s.renderPage(w, r, status, name, layout{Title: title, Active: name}, data)
}

func (s *Service) renderPage(w http.ResponseWriter, r *http.Request, status int, name string, l layout, data any) {
	var body bytes.Buffer
	if err := s.execute(&body, name, data); err != nil {
		s.log.Error("cannot render a page", "page", name, "error", err)
		http.Error(w, "The page cannot be shown; the log says why.", http.StatusInternalServerError)
		return
	}
	l.Body = template.HTML(body.String()) //nolint:gosec // made by html/template above
	s.frame(w, r, status, l)
}

func (s *Service) execute(w *bytes.Buffer, name string, data any) error {
	t, err := templates.Clone()
	if err != nil {
		return err
	}
	return t.Funcs(functions(s.now())).ExecuteTemplate(w, name+".gohtml", data)
}

// framed gives the mailbox's pages the console's surroundings.
func (s *Service) framed(w http.ResponseWriter, r *http.Request, title string, body template.HTML) {
	s.frame(w, r, http.StatusOK, layout{Title: title, Active: "mailbox", Body: body, Live: r.URL.Path == "/mailbox"})
}

func (s *Service) frame(w http.ResponseWriter, r *http.Request, status int, l layout) {
	l.Viewer = viewerOf(r.Context())
	if l.Viewer != nil {
		l.Mailbox = s.mailbox != nil && l.Viewer.all() && l.Viewer.can("full_access")
		if !l.Viewer.all() {
			l.OrgName = s.records.orgName(l.Viewer.Org)
		}
		if !l.Viewer.Local {
			l.Token = s.formToken(w, r)
		}
		open, _ := s.alerts.list(alertFilter{Org: l.Viewer.Org, Since: s.now().AddDate(0, 0, -30), Open: true, Live: true, Limit: 100})
		l.OpenHigh = len(open)
	}
	var page bytes.Buffer
	if err := s.execute(&page, "layout", l); err != nil {
		s.log.Error("cannot render a page", "page", "layout", "error", err)
		http.Error(w, "The page cannot be shown; the log says why.", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", pageCSP)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "same-origin")
	h.Set("Cache-Control", "no-store")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	w.WriteHeader(status)
	_, _ = w.Write(page.Bytes())
}

func (s *Service) showError(w http.ResponseWriter, r *http.Request, status int, title, detail string) {
	s.renderPage(w, r, status, "error", layout{Title: title}, struct{ Title, Detail string }{title, detail})
}

// overview is what the first page shows.
type overview struct {
	Total, Active, Overdue, Dormant, Unused, Unmanaged int
	Minutes                                            []bin
	LastMinute, LastHour                               uint64
	AlertDays                                          []stackBin
	Alerts30, Open                                     int
	Recent                                             []alertRow
	Attention                                          []*keyRow
	Pipeline                                           []stage
	Away                                               bool
}

// PerSecond is the rate of the last minute.
func (o *overview) PerSecond() float64 { return float64(o.LastMinute) / 60 }

// alertRow is an alert in a list.
type alertRow struct {
	episode
	KeyName, Masked, OrgName string
	Headline                 string
}

func (s *Service) alertRow(e episode) alertRow {
	row := alertRow{episode: e, KeyName: e.KeyID, OrgName: s.records.orgName(e.OrgID)}
	// A record is shown to its own organization alone, whatever an event claims.
	if rec, ok := s.keys.Get(e.KeyID); ok && rec.OrgID == e.OrgID {
		if rec.Name != "" {
			row.KeyName = rec.Name
		}
		if rec.Prefix != "" {
			row.Masked = rec.Prefix + "…"
		}
	}
	row.Headline = wording.Headline(row.KeyName, &e.Alert)
	return row
}

func (s *Service) overviewPage(w http.ResponseWriter, r *http.Request) {
	ctx, v := r.Context(), viewerOf(r.Context())
	now := s.now()
	o := overview{}
	rows, err := s.keyRows(ctx, v.Org)
	o.Away = err != nil
	for _, k := range rows {
		o.count(k)
	}
	if o.Minutes, o.LastMinute, err = s.usage.minutes(ctx, v.Org, now); err != nil {
		o.Away = true
	}
	for _, b := range o.Minutes {
		o.LastHour += b.Events
	}
	if v.can("alerts:read") {
		alerts, _ := s.alerts.list(alertFilter{Org: v.Org, Since: now.AddDate(0, 0, -30), Live: true, Limit: maxAlerts})
		o.addAlerts(s, alerts, now)
	}
	if v.all() {
		o.Pipeline = s.pipeline(ctx)
	}
	s.renderPage(w, r, http.StatusOK, "overview", layout{Title: "Overview", Active: "overview", Away: o.Away, Live: true}, &o)
}

func (o *overview) count(k *keyRow) {
	o.Total++
	if k.State == key.Active {
		o.Active++
	}
	if k.State == "unmanaged" {
		o.Unmanaged++
	}
	if k.Overdue {
		o.Overdue++
	}
	if k.Dormant {
		o.Dormant++
	}
	if k.Unused {
		o.Unused++
	}
	if k.urgency() >= 2 && len(o.Attention) < 6 {
		o.Attention = append(o.Attention, k)
	}
}

func (o *overview) addAlerts(s *Service, alerts []episode, now time.Time) {
	const days = 30
	start := binTime(now, 24*time.Hour).AddDate(0, 0, 1-days)
	o.AlertDays = make([]stackBin, days)
	for i := range o.AlertDays {
		o.AlertDays[i].Time = start.AddDate(0, 0, i)
	}
	o.Alerts30 = len(alerts)
	for _, a := range alerts {
		if a.Verdict == nil {
			o.Open++
		}
		if i := int(a.Time.Sub(start) / (24 * time.Hour)); i >= 0 && i < days {
			b := &o.AlertDays[i]
			switch a.Severity {
			case alert.Critical:
				b.Critical++
			case alert.High:
				b.High++
			case alert.Medium:
				b.Medium++
			default:
				b.Low++
			}
		}
		if len(o.Recent) < 6 {
			o.Recent = append(o.Recent, s.alertRow(a))
		}
	}
}

// stage is one part of the pipeline on the overview.
type stage struct {
	Name, State, Detail string // State is ok, warn or bad
}

// pipeline asks the parts of the pipeline how they are.
func (s *Service) pipeline(ctx context.Context) []stage {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	out := []stage{}
	if err := s.Check(ctx); err != nil {
		return append(out, stage{"NATS", "bad", "not connected"})
	}
	out = append(out, stage{"NATS", "ok", "connected"})
	waiting := map[string]uint64{}
	for _, name := range []string{bus.Usage, bus.Alerts, bus.Notices} {
		s.countWaiting(ctx, name, waiting)
	}
	services := make([]string, 0, len(waiting))
	for name := range waiting {
		services = append(services, name)
	}
	slices.Sort(services)
	for _, name := range services {
		st := stage{strings.ToUpper(name[:1]) + name[1:], "ok", "has read everything"}
		if n := waiting[name]; n > 0 {
			st.Detail = wording.Grouped(n) + " messages waiting"
			if n > 10_000 {
				st.State = "warn"
			}
		}
		out = append(out, st)
	}
	ch := stage{"ClickHouse", "ok", "answers"}
	if _, err := remember(ctx, s.usage, "ping", func(ctx context.Context) (bool, error) { return true, s.usage.check(ctx) }); err != nil {
		ch.State, ch.Detail = "bad", "does not answer; nothing is lost meanwhile"
		if errors.Is(err, errNoClickHouse) {
			ch.State, ch.Detail = "warn", "not configured"
		}
	}
	out = append(out, ch)
	if stream, err := s.js.Stream(ctx, bus.Dead); err == nil {
		if n := stream.CachedInfo().State.Msgs; n > 0 {
			out = append(out, stage{"Dead letters", "warn", wording.Grouped(n) + " to look at: latchkey dead list"})
		} else {
			out = append(out, stage{"Dead letters", "ok", "none"})
		}
	}
	return out
}

// countWaiting adds what each service's consumers on a stream have yet to read.
func (s *Service) countWaiting(ctx context.Context, name string, waiting map[string]uint64) {
	stream, err := s.js.Stream(ctx, name)
	if err != nil {
		return
	}
	list := stream.ListConsumers(ctx)
	for info := range list.Info() {
		service, _, _ := strings.Cut(strings.TrimRight(info.Name, "0123456789-_"), "-")
		if info.Config.Durable == "" || service == "" {
			continue
		}
		waiting[service] += info.NumPending + uint64(max(info.NumAckPending, 0))
	}
}

// pageSize is how many rows a list shows at once.
const pageSize = 100

func (s *Service) keysPage(w http.ResponseWriter, r *http.Request) {
	ctx, v := r.Context(), viewerOf(r.Context())
	q := r.URL.Query()
	f := keyFilter{Query: q.Get("q"), State: q.Get("state")}
	rows, err := s.keyRows(ctx, v.Org)
	away := err != nil
	counts := map[string]int{}
	var shownRows []*keyRow
	for _, k := range rows {
		for _, st := range keyStates {
			if (&keyFilter{Query: f.Query, State: st.ID}).keeps(k) {
				counts[st.ID]++
			}
		}
		if f.keeps(k) {
			shownRows = append(shownRows, k)
		}
	}
	total := len(shownRows)
	page := max(1, atoi(q.Get("page")))
	shownRows = shownRows[min((page-1)*pageSize, total):min(page*pageSize, total)]
	if days, err := s.usage.daily(ctx, v.Org, s.now()); err == nil {
		for _, k := range shownRows {
			if k.Use != nil {
				k.Days = days[k.ID]
			}
		}
	} else {
		away = true
	}
	next := ""
	if page*pageSize < total {
		next = pageLink(r, page+1)
	}
	s.renderPage(w, r, http.StatusOK, "keys", layout{Title: "Keys", Active: "keys", Away: away}, map[string]any{
		"Rows": shownRows, "Total": total, "Filter": f, "States": keyStates, "Counts": counts, "All": v.all(), "Next": next, "Away": away,
	})
}

func pageLink(r *http.Request, page int) string {
	q := r.URL.Query()
	q.Set("page", strconv.Itoa(page))
	return r.URL.Path + "?" + q.Encode()
}

func atoi(s string) int {
	n, _ := strconv.Atoi(s)
	return min(n, 1_000_000)
}

// keyDetail is what is known of one key.
type keyDetail struct {
	*keyRow
	Org      string
	Lineage  []*keyRow // the keys before and after, oldest first
	Chart    template.HTML
	Heat     template.HTML
	Baseline *baseline.Row
	Habits   []habit
	Recent   []requestLine
	Alerts   []alertRow
	Changes  []auditLine
	Away     bool
}

// habit is one kind of what is usual for a key.
type habit struct {
	Title  string
	Shares []baseline.Share
}

func (s *Service) keyPage(w http.ResponseWriter, r *http.Request) {
	ctx, v := r.Context(), viewerOf(r.Context())
	id, now := r.PathValue("id"), s.now()
	org, ok, err := s.keyOwner(ctx, id, v.sees, v.Org)
	if !ok {
		if err != nil {
			s.showError(w, r, http.StatusServiceUnavailable, "The key is not known here, and ClickHouse does not answer", "Keys that are managed elsewhere are known from their use alone. Try again in a moment.")
			return
		}
		s.showError(w, r, http.StatusNotFound, "There is no such key", "")
		return
	}
	d := &keyDetail{Org: org}
	d.keyRow, d.Away = s.oneKey(ctx, id, org)
	d.Lineage = s.lineage(d.keyRow)
	from := now.AddDate(0, 0, -29)
	if v.can("alerts:read") {
		episodes, _ := s.alerts.list(alertFilter{Org: org, Key: id, Limit: 50})
		for _, e := range episodes {
			d.Alerts = append(d.Alerts, s.alertRow(e))
		}
	}
	if v.can("usage:read") {
		s.addUse(ctx, d, from, now)
	}
	d.Changes = s.records.latest(20, func(l auditLine) bool { return l.Kind == "api_key" && l.Subject == id && v.can("audit:read") })
	s.renderPage(w, r, http.StatusOK, "key", layout{Title: d.NameLine, Active: "keys", Away: d.Away}, d)
}

func (s *Service) addUse(ctx context.Context, d *keyDetail, from, now time.Time) {
	day := 24 * time.Hour
	var err error
	if d.Days, err = s.usage.activity(ctx, d.Org, d.ID, from, now, day); err == nil {
		marks := []mark{}
		for _, a := range d.Alerts {
			if !a.Historical {
				marks = append(marks, mark{a.Time, a.Severity, a.Summary})
			}
		}
		d.Chart = columns(d.Days, day, marks, "Requests a day over the last 30 days")
	} else {
		d.Away = true
	}
	if d.Recent, err = s.usage.recent(ctx, d.Org, d.ID, 50); err != nil {
		d.Away = true
	}
	if d.Baseline, err = s.usage.baseline(ctx, d.Org, d.ID); err != nil {
		d.Away = true
	}
	if b := d.Baseline; b != nil {
		d.Heat = weekHeat(b.HourOfWeek, "Usual requests by hour of the week, UTC")
		for _, h := range []habit{{"Networks", b.Networks}, {"Operators", b.ASNs}, {"Countries", b.Countries}, {"Routes", b.Routes}} {
			if len(h.Shares) > 0 {
				h.Shares = h.Shares[:min(6, len(h.Shares))]
				d.Habits = append(d.Habits, h)
			}
		}
	}
}

// oneKey is a key's row; away tells that its use is not known.
func (s *Service) oneKey(ctx context.Context, id, org string) (row *keyRow, away bool) {
	now := s.now()
	uses, err := s.usage.keyUses(ctx, org)
	use, used := uses[id]
	rec, managed := s.keys.Get(id)
	switch {
	case managed && rec.OrgID == org:
		row = s.keyRow(rec, now)
		if used {
			row.Use = &use
		}
	default:
		if !used {
			use = keyUse{KeyID: id, OrgID: org, First: now, Last: now}
		}
		row = s.unmanagedRow(id, use, now)
	}
	open, _ := s.alerts.list(alertFilter{Org: org, Key: id, Since: now.AddDate(0, 0, -30), Open: true, Live: true, Limit: 1000})
	row.Open = len(open)
	row.finish(now, err == nil, s.dormantAfter())
	return row, err != nil
}

// lineage are the keys that a key replaced and that replaced it, oldest first,
// with itself; empty if there are no others.
func (s *Service) lineage(k *keyRow) []*keyRow {
	if !k.Managed {
		return nil
	}
	now := s.now()
	line := []*keyRow{k}
	step := func(id string) *keyRow {
		rec, ok := s.keys.Get(id)
		if !ok || rec.OrgID != k.OrgID {
			return nil
		}
		row := s.keyRow(rec, now)
		row.finish(now, false, s.dormantAfter())
		return row
	}
	for before := step(k.ParentKeyID); before != nil && len(line) < 10; before = step(before.ParentKeyID) {
		line = append([]*keyRow{before}, line...)
	}
	for after := step(k.SuccessorID); after != nil && len(line) < 20; after = step(after.SuccessorID) {
		line = append(line, after)
	}
	if len(line) == 1 {
		return nil
	}
	return line
}

func (s *Service) alertsPage(w http.ResponseWriter, r *http.Request) {
	v, q := viewerOf(r.Context()), r.URL.Query()
	before, _ := readCursor(q.Get("cursor"))
	f := alertFilter{
		Org: v.Org, Trigger: q.Get("trigger"), Severity: q.Get("severity"), Key: q.Get("key"), Open: q.Get("open") == "1",
		Live: q.Get("history") != "1", Before: before, Limit: pageSize,
	}
	page, more := s.alerts.list(f)
	rows := make([]alertRow, len(page))
	for i, e := range page {
		rows[i] = s.alertRow(e)
	}
	next := ""
	if more {
		q.Set("cursor", writeCursor(&page[len(page)-1].Alert))
		next = "/alerts?" + q.Encode()
	}
	s.renderPage(w, r, http.StatusOK, "alerts", layout{Title: "Alerts", Active: "alerts", Live: before.ID == ""}, map[string]any{
		"Rows": rows, "Filter": f, "All": v.all(), "Next": next, "History": !f.Live, "First": before.ID == "",
		"Triggers":   []string{alert.NewIPRange, alert.VolumeSpike, alert.EndpointMix, alert.DormantKey, alert.KeyGuessing, alert.RevokedKey, alert.ScopeProbing},
		"Severities": []string{alert.Critical, alert.High, alert.Medium, alert.Low},
	})
}

// alertDetail is one alert with everything about it.
type alertDetail struct {
	alertRow
	Key      *keyRow
	Others   []alertRow
	Chart    template.HTML
	Mail     *delivery.Delivery
	MailTo   string // empty if the viewer may not read addresses
	Rotate   string // the command to type, empty if the key is not managed or ended
	MayJudge bool
	Token    string
	Said     string // the verdict just given
}

func (s *Service) alertPage(w http.ResponseWriter, r *http.Request) {
	ctx, v := r.Context(), viewerOf(r.Context())
	e, ok := s.alerts.get(r.PathValue("id"))
	if !ok || !v.sees(e.OrgID) {
		s.showError(w, r, http.StatusNotFound, "There is no such alert", "If it is very old, it is in ClickHouse, table alerts.")
		return
	}
	d := &alertDetail{alertRow: s.alertRow(e), MayJudge: v.can("alerts:write"), Said: r.URL.Query().Get("said")}
	if d.MayJudge {
		d.Token = s.formToken(w, r)
	}
	var away bool
	d.Key, away = s.oneKey(ctx, e.KeyID, e.OrgID)
	if d.Key.Managed && d.Key.State == key.Active && d.Key.SuccessorID == "" {
		d.Rotate = "latchkey key rotate " + e.KeyID + " --grace 0s"
	}
	others, _ := s.alerts.list(alertFilter{Org: e.OrgID, Key: e.KeyID, Limit: 6})
	for _, o := range others {
		if o.ID != e.ID && len(d.Others) < 5 {
			d.Others = append(d.Others, s.alertRow(o))
		}
	}
	if v.can("usage:read") {
		d.Chart, away = s.around(ctx, &e, away)
	}
	mail, err := s.records.delivery(ctx, e.ID)
	if err != nil {
		s.log.Warn("cannot read what became of a mail", "alert", e.ID, "error", err)
	}
	d.Mail = mail
	s.renderPage(w, r, http.StatusOK, "alert", layout{Title: d.Headline, Active: "alerts", Away: away}, d)
}

// around draws the key's hours around an alert.
func (s *Service) around(ctx context.Context, e *episode, away bool) (template.HTML, bool) {
	to := e.Time.Add(24 * time.Hour)
	if now := s.now(); to.After(now) {
		to = now
	}
	from := to.Add(-72 * time.Hour)
	bins, err := s.usage.activity(ctx, e.OrgID, e.KeyID, from, to, time.Hour)
	if err != nil {
		return "", true
	}
	return columns(bins, time.Hour, []mark{{e.Time, e.Severity, "This alert"}}, "Requests an hour around the alert"), away
}

func (s *Service) postVerdict(w http.ResponseWriter, r *http.Request) {
	v := viewerOf(r.Context())
	if !s.ownForm(r) {
		s.showError(w, r, http.StatusForbidden, "The form was too old, or came from elsewhere", "Go back, load the page again and try once more.")
		return
	}
	e, ok := s.alerts.get(r.PathValue("id"))
	if !ok || !v.sees(e.OrgID) {
		s.showError(w, r, http.StatusNotFound, "There is no such alert", "")
		return
	}
	word := r.PostFormValue("verdict")
	if _, err := s.judge(r.Context(), &e, word, v); err != nil {
		var problem *api.Problem
		if errors.As(err, &problem) {
			s.showError(w, r, problem.Status, "This verdict cannot be given", problem.Detail)
			return
		}
		s.log.Error("cannot write a verdict", "alert", e.ID, "error", err)
		s.showError(w, r, http.StatusServiceUnavailable, "The verdict could not be stored", "Nothing was changed. Try again in a moment.")
		return
	}
	http.Redirect(w, r, "/alerts/"+url.PathEscape(e.ID)+"?said="+url.QueryEscape(word), http.StatusSeeOther)
}

func (s *Service) auditPage(w http.ResponseWriter, r *http.Request) {
	v, q := viewerOf(r.Context()), strings.ToLower(r.URL.Query().Get("q"))
	lines := s.records.latest(200, func(l auditLine) bool {
		if !v.sees(l.OrgID) {
			return false
		}
		return q == "" || strings.Contains(strings.ToLower(strings.Join([]string{l.Type, l.Actor, l.Subject, l.Name, l.Reason, l.IP, l.OrgID}, " ")), q)
	})
	for i := range lines {
		lines[i].OrgID = s.records.orgName(lines[i].OrgID)
	}
	s.renderPage(w, r, http.StatusOK, "audit", layout{Title: "Audit", Active: "audit"}, map[string]any{"Lines": lines, "Query": r.URL.Query().Get("q"), "All": v.all()})
}

func splitPath(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}
