package detector

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// An organization's budget rules its keys, a key's own goes before it, and a
// change of either rules from then on.
func TestBudgetsOfKeysAndOrganizations(t *testing.T) {
	t.Parallel()
	const strict = 1e-30
	events := traffic(6, 21)
	attack := slices.IndexFunc(events, func(ev usage.Event) bool { return ev.Route == "/v1/users" })
	server, js := serve(t)
	setOrg := func(budget float64) {
		kv, err := js.KeyValue(t.Context(), bus.Orgs)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kv.Put(t.Context(), "org_0", encode(t, key.Org{ID: "org_0", Policy: key.Policy{AlertBudget: budget}})); err != nil {
			t.Fatal(err)
		}
	}
	// Keys 0 and 3 are attacked, both of org_0.
	setOrg(strict)
	setKey(t, js, "key_3", 1)
	publish(t, js, events[:attack], true)
	in := start(t, server)
	caughtUp(t, js)
	from := events[attack-1].Time.Add(time.Second)
	publish(t, js, stolen(from, 0, 3), false)
	caughtUp(t, js)
	if got := alerted(t, js); got != "key_3" {
		t.Errorf("with a strict organization and a key of its own mind, alerts of %q", got)
	}
	setOrg(0)
	eventually(t, "the organization's budget is known", func() bool { return in.budgets.of("org_0", "key_0") == 0 })
	// One ordinary event of every key: a partition does what it was told before it reads on.
	ordinary := map[string]usage.Event{}
	for _, ev := range events[:attack] {
		ordinary[ev.KeyID] = ev
	}
	for id, ev := range ordinary {
		ev.ID, ev.Time = "ordinary-"+id, from.Add(time.Minute)
		publish(t, js, []usage.Event{ev}, false)
	}
	caughtUp(t, js)
	publish(t, js, stolen(from.Add(time.Hour), 0), false)
	caughtUp(t, js)
	in.end(t)
	if got := alerted(t, js); got != "key_0 key_3" {
		t.Errorf("with the default, alerts of %q", got)
	}
}

// stolen are requests from elsewhere for something else.
func stolen(at time.Time, keys ...int) []usage.Event {
	var out []usage.Event
	for _, k := range keys {
		for i := range 5 {
			out = append(out, usage.Event{
				ID: fmt.Sprintf("stolen-%d-%d-%d", k, i, at.Unix()), Time: at.Add(time.Duration(i) * time.Second), OrgID: "org_0", KeyID: fmt.Sprint("key_", k),
				SourceIP: netip.AddrFrom4([4]byte{203, 0, 113, byte(k)}), Method: "GET", Route: "/v1/users", Status: 200, Decision: usage.Allow,
			})
		}
	}
	return out
}

func setKey(t *testing.T, js jetstream.JetStream, id string, budget float64) {
	t.Helper()
	change := key.Change{Type: key.Updated, Record: key.Record{ID: id, Policy: key.Policy{AlertBudget: budget}}}
	if _, err := js.Publish(t.Context(), bus.KeySubject(id), encode(t, change)); err != nil {
		t.Fatal(err)
	}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	body, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// alerted are the keys with alerts.
func alerted(t *testing.T, js jetstream.JetStream) string {
	t.Helper()
	var keys []string
	for _, a := range alerts(t, js) {
		var v struct {
			KeyID string `json:"key_id"`
		}
		if err := json.Unmarshal([]byte(a), &v); err != nil {
			t.Fatal(err)
		}
		keys = append(keys, v.KeyID)
	}
	slices.Sort(keys)
	return strings.Join(slices.Compact(keys), " ")
}
