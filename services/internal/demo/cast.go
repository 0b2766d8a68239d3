package demo

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// member is one key of the demo organization.
type member struct {
	name, description, owner string
	scopes                   []string
	// age is how long before the demo the key was made, rotated how long before
	// it was last rotated (0: never).
	age, rotated time.Duration
	// expires is how long after the demo began the key expires (0: never).
	expires time.Duration
	// since and until bound its history before the demo began; until is more
	// than 0 for a key that has fallen asleep.
	since, until time.Duration
	habit        habit
}

const (
	day     = 24 * time.Hour
	history = 30 * day
)

func get(route, scope string, weight float64) call { return call{"GET", route, scope, weight} }

func post(route, scope string, weight float64) call { return call{"POST", route, scope, weight} }

// victims are the four keys that things happen to. Each run of the demo but the
// first brings its own, because what was woken is not asleep any more.
func victims() map[string]member {
	return map[string]member{
		stolen: {
			name: "checkout-api", description: "Shop backend, two servers in Falkenstein", owner: "payments",
			scopes: []string{"orders:read", "orders:write"}, age: 64 * day, since: history,
			habit: habit{
				perDay: 1400, weekend: 1.2, agent: "checkout/4.2 (go1.26)",
				places: []place{{"159.69.33.7/32", 3}, {"159.69.33.8/32", 2}},
				calls: []call{
					get("/v1/orders/{id}", "orders:read", 6), post("/v1/orders", "orders:write", 3),
					get("/v1/products", "orders:read", 2),
				},
			},
		},
		flooding: {
			name: "report-builder", description: "Builds the weekly figures", owner: "analytics",
			scopes: []string{"reports:read", "orders:read"}, age: 118 * day, since: history,
			habit: habit{
				perDay: 420, weekend: 0.5, agent: "report-builder/1.8 python-httpx/0.28",
				places: []place{{"116.203.14.20/32", 1}},
				calls:  []call{get("/v1/reports/{id}", "reports:read", 5), get("/v1/orders", "orders:read", 3)},
			},
		},
		turning: {
			name: "sensor-ingest", description: "Writes telemetry of the cold stores", owner: "iot",
			scopes: []string{"telemetry:write", "users:read"}, age: 40 * day, since: history,
			habit: habit{
				perDay: 1900, weekend: 1, agent: "sensord/0.9",
				places: []place{{"78.46.120.0/24", 1}, {"78.46.121.0/24", 1}},
				calls:  []call{post("/v1/telemetry", "telemetry:write", 30), post("/v1/telemetry/batch", "telemetry:write", 4)},
			},
		},
		waking: {
			name: "legacy-migration", description: "The move from the old shop, done in spring", owner: "platform",
			scopes: []string{"full_access"}, age: 410 * day, since: 140 * day, until: 88 * day,
			habit: habit{
				perDay: 35, weekend: 1, agent: "curl/8.5.0",
				places: []place{{"88.198.7.40/32", 1}},
				calls:  []call{get("/v1/orders", "orders:read", 4), get("/v1/users", "users:read", 1)},
			},
		},
	}
}

// quiet are the keys that nothing happens to, each with a habit that rules of
// thumb mistake for an attack.
func quiet() []member {
	return []member{
		{
			name: "field-app", description: "Drivers' phones, on three carriers", owner: "logistics",
			scopes: []string{"tours:read", "tours:write"}, age: 85 * day, since: history,
			habit: habit{
				perDay: 800, weekend: 0.3, from: 4, to: 20, agent: "FieldApp/3.1 (Android 16)",
				places: []place{{"80.187.64.0/18", 4}, {"109.40.0.0/17", 3}, {"176.0.0.0/15", 3}},
				calls:  []call{get("/v1/tours/{id}", "tours:read", 5), post("/v1/tours/{id}/events", "tours:write", 4)},
			},
		},
		{
			name: "nightly-export", description: "Everything to the warehouse at 6 am", owner: "analytics",
			scopes: []string{"orders:read", "invoices:read"}, age: 200 * day, rotated: 20 * day, since: history,
			habit: habit{
				every: day, offset: 6 * time.Hour, burst: 180, agent: "airflow/3.0",
				places: []place{{"116.203.14.21/32", 1}},
				calls:  []call{get("/v1/orders", "orders:read", 3), get("/v1/invoices", "invoices:read", 2)},
			},
		},
		{
			name: "hourly-sync", description: "Stock levels to the marketplace", owner: "shop",
			scopes: []string{"stock:read"}, age: 150 * day, rotated: 61 * day, since: history,
			habit: habit{
				every: time.Hour, offset: 5 * time.Minute, burst: 14, agent: "stock-sync/2.0",
				places: []place{{"49.12.5.90/32", 1}}, calls: []call{get("/v1/stock", "stock:read", 1)},
			},
		},
		{
			name: "ci-runner", description: "End-to-end tests on cloud runners", owner: "platform",
			scopes: []string{"orders:read", "orders:write", "users:read"}, age: 30 * day, since: history, expires: 11 * day,
			habit: habit{
				perDay: 520, weekend: 0.1, from: 6, to: 19, agent: "e2e/1.0 node-fetch",
				places: []place{{"3.120.0.0/14", 4}, {"18.184.0.0/15", 3}, {"52.28.0.0/16", 2}},
				calls: []call{
					get("/v1/orders/{id}", "orders:read", 4), post("/v1/orders", "orders:write", 2),
					get("/v1/users/{id}", "users:read", 1),
				},
			},
		},
		{
			name: "partner-feed", description: "A partner who grows by a percent a day", owner: "partners",
			scopes: []string{"products:read"}, age: 75 * day, since: history,
			habit: habit{
				perDay: 700, weekend: 0.8, growth: 0.01, agent: "PartnerBot/1.4",
				places: []place{{"51.15.20.0/24", 1}},
				calls:  []call{get("/v1/products", "products:read", 3), get("/v1/products/{id}", "products:read", 5)},
			},
		},
		{
			name: "dana-laptop", description: "A person, at the office and at home", owner: "dana",
			scopes: []string{"orders:read", "users:read"}, age: 55 * day, since: history,
			habit: habit{
				perDay: 90, weekend: 0.1, from: 7, to: 17, agent: "httpie/3.2",
				places: []place{{"217.86.130.12/32", 5}, {"2003:e7:4f00:1200::/64", 3}},
				calls:  []call{get("/v1/orders/{id}", "orders:read", 5), get("/v1/users/{id}", "users:read", 2)},
			},
		},
		{
			name: "old-importer", description: "Nobody remembers what it imported", owner: "platform",
			scopes: []string{"products:write"}, age: 300 * day, rotated: 70 * day, since: 140 * day, until: 66 * day,
			habit: habit{
				perDay: 20, weekend: 0.2, from: 6, to: 18, agent: "importer/0.3",
				places: []place{{"65.108.9.3/32", 1}}, calls: []call{post("/v1/products", "products:write", 1)},
			},
		},
		{
			name: "terraform", description: "Applied by hand, a few times a week", owner: "platform",
			scopes: []string{"full_access"}, age: 170 * day, since: history,
			habit: habit{
				perDay: 12, weekend: 0.1, from: 8, to: 16, agent: "terraform/1.9",
				places: []place{{"217.86.130.12/32", 1}},
				calls:  []call{get("/v1/webhooks", "webhooks:read", 3), post("/v1/webhooks", "webhooks:write", 1)},
			},
		},
	}
}

// The four things that happen, which are also the victims' parts.
const (
	stolen   = "stolen"
	flooding = "flooding"
	turning  = "turning"
	waking   = "waking"
)

// attack is one of the four: requests of one key, as somebody else makes them.
type attack struct {
	part string
	// trigger is what the detector must name.
	trigger string
	// title is what the terminal says when it begins.
	title string
	// starts is how long after the live traffic began.
	starts time.Duration
	// requests are made over lasts.
	requests int
	lasts    time.Duration
	habit    func(usual habit, run int) habit
}

// thieves are rented servers in other countries; each run takes the next.
var thieves = []string{"46.166.128.0/24", "45.32.100.0/24", "51.81.0.0/24", "149.56.0.0/24", "45.63.24.0/24"}

func attacks() []attack {
	return []attack{
		{
			part: stolen, trigger: "new_ip_range", title: "is stolen: used from another country",
			starts: 6 * time.Second, requests: 12, lasts: 12 * time.Second,
			habit: func(usual habit, run int) habit {
				usual.places = []place{{thieves[run%len(thieves)], 1}}
				return usual
			},
		},
		{
			part: turning, trigger: "endpoint_mix", title: "turns to other endpoints: an ingest key lists users",
			starts: 16 * time.Second, requests: 15, lasts: 12 * time.Second,
			habit: func(usual habit, _ int) habit {
				usual.calls = []call{get("/v1/users", "users:read", 2), get("/v1/users/{id}", "users:read", 3)}
				return usual
			},
		},
		{
			part: waking, trigger: "dormant_key", title: "wakes after 88 days",
			starts: 26 * time.Second, requests: 5, lasts: 10 * time.Second,
			habit: func(usual habit, _ int) habit { return usual },
		},
		{
			part: flooding, trigger: "volume_spike", title: "floods: far more requests than it ever made in an hour",
			starts: 36 * time.Second, requests: 900, lasts: 18 * time.Second,
			habit: func(usual habit, _ int) habit { return usual },
		},
	}
}

// span is the events of a member between two instants, day by day.
func (m member) span(keyID, orgID string, began, from, to time.Time, emit func([]usage.Event) error) error {
	first := began.Add(-m.since)
	last := to
	if m.until > 0 {
		last = began.Add(-m.until)
	}
	if from.Before(first) {
		from = first
	}
	for d := from.UTC().Truncate(day); d.Before(last) && d.Before(to); d = d.Add(day) {
		events := m.habit.day(keyID, orgID, d, first.Truncate(day))
		kept := events[:0]
		for _, e := range events {
			if !e.Time.Before(from) && e.Time.Before(to) && e.Time.Before(last) {
				kept = append(kept, e)
			}
		}
		if err := emit(kept); err != nil {
			return err
		}
	}
	return nil
}

// Policy is the edge's policy file for the demo's API.
func Policy() string {
	var b strings.Builder
	b.WriteString("# Written by latchkey up --demo: the routes of a made-up shop.\ndefault: deny\nrules:\n")
	seen := map[string]bool{}
	add := func(c call) {
		match := c.method + " " + c.route
		if !seen[match] {
			seen[match] = true
			fmt.Fprintf(&b, "  - match: %q\n    scope: %q\n", match, c.scope)
		}
	}
	parts := victims()
	for _, a := range attacks() {
		for _, c := range slices.Concat(parts[a.part].habit.calls, a.habit(parts[a.part].habit, 1).calls) {
			add(c)
		}
	}
	for _, m := range quiet() {
		for _, c := range m.habit.calls {
			add(c)
		}
	}
	return b.String()
}
