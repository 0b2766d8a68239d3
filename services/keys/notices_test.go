package keys

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// notices are those of a key, oldest first.
func (w *world) notices(id string) []key.Notice {
	w.t.Helper()
	var out []key.Notice
	for _, m := range drain(w.t, w.svc.js, bus.Notices) {
		var n key.Notice
		if err := json.Unmarshal([]byte(m[strings.IndexByte(m, ' ')+1:]), &n); err != nil {
			w.t.Fatal(err)
		}
		if n.KeyID == id {
			out = append(out, n)
		}
	}
	return out
}

func types(notices []key.Notice) []string {
	out := []string{}
	for _, n := range notices {
		out = append(out, n.Type)
	}
	return out
}

// A real timer of the real server goes off while the service that set it is
// away, and one of two others says so, once.
func TestTimersSurviveRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	org := w.org("acme")
	expires := time.Now().Add(3 * time.Second)
	id := w.must(201, w.admin, "POST", "/v1/api-keys", object{"org_id": org, "name": "k", "scopes": []string{"a:b"}, "expires_at": expires}).text("id")
	if err := w.svc.evaluate(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	// Setting it anew replaces it.
	if err := w.svc.evaluate(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	timers := drain(t, w.svc.js, bus.Timers)
	if len(timers) != 1 || !strings.HasPrefix(timers[0], timerSet+id) {
		t.Fatalf("timers: %v", timers)
	}
	for range 2 {
		svc, _ := w.start()
		w.run(svc)
	}
	eventually(t, func() bool { return slices.Contains(types(w.notices(id)), key.Expired) })
	got := w.notices(id)
	if last := got[len(got)-1]; last.Data.Status != "expired" || last.OrgID != org || last.Time.Before(expires) {
		t.Errorf("notice %+v", last)
	}
	if err := w.svc.evaluate(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if got := types(w.notices(id)); !slices.Equal(got, []string{key.Created, key.Expired}) {
		t.Errorf("told %v", got)
	}
}

func TestChangesAreTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(w.svc)
	id, _ := w.key(w.org("acme"), "a:b")
	next := w.must(201, w.admin, "POST", "/v1/api-keys/"+id+"/rotate", object{"reason": "habit"}).text("id")
	w.must(200, w.admin, "POST", "/v1/api-keys/"+id+"/suspend", nil)
	w.must(200, w.admin, "POST", "/v1/api-keys/"+id+"/revoke", nil)
	want := []string{key.Created, key.Rotated, key.SuspendEv, key.RevokedEv}
	eventually(t, func() bool { return slices.Equal(types(w.notices(id)), want) && len(w.notices(next)) == 1 })
	rotated := w.notices(id)[1]
	if rotated.Data.SuccessorID != next || rotated.Data.Reason != "habit" || !strings.HasPrefix(rotated.Data.Actor, "key_") {
		t.Errorf("notice %+v", rotated)
	}
	if made := w.notices(next)[0]; made.Data.ParentKeyID != id {
		t.Errorf("notice %+v", made)
	}
}

// Each moment is told when it comes and not again, whatever happens around it.
func TestMoments(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	w.freeze(start)
	org := w.org("acme")
	id := w.must(201, w.admin, "POST", "/v1/api-keys", object{"org_id": org, "name": "k", "scopes": []string{"a:b"}, "expires_at": start.Add(100 * day)}).text("id")
	for _, step := range []struct {
		after time.Duration
		want  []string
	}{
		{0, []string{}},
		{86*day - 1, []string{}},
		{86 * day, []string{key.Expiring}},
		{86*day + time.Hour, []string{key.Expiring}},
		{90 * day, []string{key.Expiring, key.RotationDue}},
		{99 * day, []string{key.Expiring, key.RotationDue}},
		{100 * day, []string{key.Expiring, key.RotationDue, key.Expired}},
		{300 * day, []string{key.Expiring, key.RotationDue, key.Expired}},
	} {
		w.freeze(start.Add(step.after))
		for range 2 {
			if err := w.svc.evaluate(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		if got := types(w.notices(id)); !slices.Equal(got, step.want) {
			t.Fatalf("after %s: told %v, not %v", step.after, got, step.want)
		}
	}
}

func TestScheduledRotation(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	w.freeze(start)
	org := w.org("acme")
	w.must(200, w.admin, "PATCH", "/v1/orgs/"+org, object{"auto_rotate": true, "rotation_days": 30, "rotation_grace": "48h"})
	id, secret := w.key(org, "orgs:read")
	slow := w.must(201, w.admin, "POST", "/v1/api-keys", object{"org_id": org, "name": "own policy", "scopes": []string{"a:b"}, "rotation_days": 60}).text("id")
	w.freeze(start.Add(30 * day))
	for _, k := range []string{id, slow} {
		if err := w.svc.evaluate(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	old := w.must(200, w.admin, "GET", "/v1/api-keys/"+id, nil)
	next := old.text("successor_key_id")
	if next == "" || old.text("expires_at") != start.Add(32*day).Format(time.RFC3339) {
		t.Fatalf("after 30 days: %s", old.body)
	}
	if r := w.must(200, w.admin, "GET", "/v1/api-keys/"+slow, nil); r.text("successor_key_id") != "" {
		t.Errorf("rotated before its own interval: %s", r.body)
	}
	made := w.must(200, w.admin, "GET", "/v1/api-keys/"+next, nil)
	if made.text("parent_key_id") != id || !strings.Contains(string(made.body), `"unclaimed":true`) {
		t.Errorf("successor: %s", made.body)
	}
	claimed := w.must(200, w.admin, "POST", "/v1/api-keys/"+next+"/claim", nil)
	w.must(200, claimed.text("key"), "GET", "/v1/orgs", nil)
	w.must(200, secret, "GET", "/v1/orgs", nil)
	w.must(409, w.admin, "POST", "/v1/api-keys/"+next+"/claim", nil)
	w.freeze(start.Add(32 * day))
	w.must(401, secret, "GET", "/v1/orgs", nil)
	w.must(200, claimed.text("key"), "GET", "/v1/orgs", nil)
}

func TestReactions(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(w.svc)
	org := w.org("acme")
	w.must(200, w.admin, "PATCH", "/v1/orgs/"+org, object{"on_compromise": object{"action": "suspend", "severity": "high"}})
	suspend, _ := w.key(org, "a:b")
	rotate := w.must(201, w.admin, "POST", "/v1/api-keys", object{
		"org_id": org, "name": "k", "scopes": []string{"a:b"}, "rotation_grace": "1h", "on_compromise": object{"action": "rotate", "severity": "medium"},
	}).text("id")
	calm := w.must(201, w.admin, "POST", "/v1/api-keys", object{
		"org_id": org, "name": "k", "scopes": []string{"a:b"}, "on_compromise": object{"action": "notify", "severity": "low"},
	}).text("id")
	raise := func(id, keyID, orgID, severity string, revision int, historical bool) {
		t.Helper()
		body, err := json.Marshal(alert.Alert{ID: id, KeyID: keyID, OrgID: orgID, Severity: severity, Revision: revision, Historical: historical})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.svc.js.Publish(t.Context(), bus.AlertSubject(orgID, keyID), body); err != nil {
			t.Fatal(err)
		}
	}
	settled := func() {
		t.Helper()
		consumer, err := w.svc.js.Consumer(t.Context(), bus.Alerts, "keys-reactions")
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool {
			info, err := consumer.Info(t.Context())
			return err == nil && info.NumPending == 0 && info.NumAckPending == 0
		})
	}
	eventually(t, func() bool { _, err := w.svc.js.Consumer(t.Context(), bus.Alerts, "keys-reactions"); return err == nil })
	raise("alrt_1", suspend, org, alert.Medium, 1, false)   // too weak
	raise("alrt_2", suspend, org, alert.High, 1, true)      // history
	raise("alrt_3", suspend, "other", alert.High, 1, false) // another tenant's
	raise("alrt_4", calm, org, alert.Critical, 1, false)
	raise("alrt_5", "key_unknown", org, alert.Critical, 1, false)
	settled()
	for _, id := range []string{suspend, rotate, calm} {
		if got := w.must(200, w.admin, "GET", "/v1/api-keys/"+id, nil).text("status"); got != "active" {
			t.Fatalf("%s is %s", id, got)
		}
	}
	raise("alrt_6", suspend, org, alert.High, 1, false)
	raise("alrt_7", rotate, org, alert.Medium, 1, false)
	settled()
	if r := w.must(200, w.admin, "GET", "/v1/api-keys/"+suspend, nil); r.text("status") != "suspended" {
		t.Errorf("%s", r.body)
	}
	if r := w.must(200, w.admin, "GET", "/v1/api-keys/"+rotate, nil); r.text("successor_key_id") == "" || r.text("expires_at") == "" {
		t.Errorf("%s", r.body)
	}
	// A person's decision stands, though the episode grows.
	w.must(200, w.admin, "POST", "/v1/api-keys/"+suspend+"/resume", nil)
	raise("alrt_6", suspend, org, alert.Critical, 2, false)
	settled()
	if r := w.must(200, w.admin, "GET", "/v1/api-keys/"+suspend, nil); r.text("status") != "active" {
		t.Errorf("%s", r.body)
	}
	var audit struct{ Events []AuditEvent }
	w.must(200, w.admin, "GET", "/v1/audit?key_id="+suspend, nil).decode(t, &audit)
	if e := audit.Events[1]; e.Type != key.SuspendEv || e.Actor != "system" || !strings.Contains(e.Reason, "alrt_6") {
		t.Errorf("audit: %+v", e)
	}
}
