package anomaly

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/usage"
	"github.com/latchkey-dev/latchkey/services/internal/geo"
)

var start = time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC) // a Monday

// world is a Locate for tests: three networks of two countries.
func world(a netip.Addr) geo.Location {
	switch b := a.As16(); b[12] {
	case 84:
		return geo.Location{Country: "DE", ASN: 3320, ASName: "Deutsche Telekom AG"}
	case 49:
		return geo.Location{Country: "DE", ASN: 24940, ASName: "Hetzner Online GmbH", Hosting: true}
	case 145:
		return geo.Location{Country: "NL", ASN: 1136, ASName: "KPN B.V."}
	}
	return geo.Location{}
}

type feed struct {
	*Engine
	n   int
	out []alert.Alert
}

func (f *feed) send(key string, at time.Time, ip, method, route string) []alert.Alert {
	f.n++
	ev := usage.Event{
		ID: fmt.Sprintf("e%d", f.n), Time: at, OrgID: "org", KeyID: key, SourceIP: netip.MustParseAddr(ip),
		Method: method, Route: route, Status: 200, Decision: usage.Allow,
	}
	got := f.Observe(&ev, false)
	f.out = append(f.out, got...)
	return got
}

// month sends 30 days of 30 requests an hour, 97 of 100 of them to one route.
func (f *feed) month(key string) time.Time {
	for i := range 30 * 24 * 30 {
		route := "/v1/readings"
		if i%33 == 7 {
			route = "/v1/devices/" + fmt.Sprint(1000+i)
		}
		f.send(key, start.Add(time.Duration(i)*2*time.Minute), "84.128.1.9", "POST", route)
	}
	return start.Add(30 * 24 * time.Hour)
}

func TestFourTriggers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, want string
		within     int
		locate     func(netip.Addr) geo.Location
		attack     func(f *feed, at time.Time, i int)
	}{
		{"country", alert.NewIPRange, 1, world, func(f *feed, at time.Time, i int) {
			f.send("k", at.Add(time.Duration(i)*time.Minute), "145.10.1.1", "POST", "/v1/readings")
		}},
		{"vps", alert.NewIPRange, 1, world, func(f *feed, at time.Time, i int) {
			f.send("k", at.Add(time.Duration(i)*time.Minute), "49.12.1.1", "POST", "/v1/readings")
		}},
		{"network without geo data", alert.NewIPRange, 1, nil, func(f *feed, at time.Time, i int) {
			f.send("k", at.Add(time.Duration(i)*time.Minute), "49.12.1.1", "POST", "/v1/readings")
		}},
		{"volume", alert.VolumeSpike, 120, world, func(f *feed, at time.Time, i int) {
			f.send("k", at.Add(time.Duration(i)*time.Second), "84.128.1.9", "POST", "/v1/readings")
		}},
		{"never used route", alert.EndpointMix, 4, world, func(f *feed, at time.Time, i int) {
			f.send("k", at.Add(time.Duration(i)*time.Minute), "84.128.1.9", "GET", "/v1/users")
		}},
		{"rare route takes over", alert.EndpointMix, 8, world, func(f *feed, at time.Time, i int) {
			f.send("k", at.Add(time.Duration(i)*2*time.Minute), "84.128.1.9", "POST", fmt.Sprintf("/v1/devices/%d", i))
		}},
		{"dormant", alert.DormantKey, 1, world, func(f *feed, at time.Time, i int) {
			f.send("k", at.Add(30*24*time.Hour+time.Duration(i)*time.Minute), "84.128.1.9", "POST", "/v1/readings")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := &feed{Engine: New(Options{Locate: c.locate})}
			end := f.month("k")
			if len(f.out) != 0 {
				t.Fatalf("quiet month raised %v", f.out[0].Summary)
			}
			for i := 0; i < c.within && len(f.out) == 0; i++ {
				c.attack(f, end, i)
			}
			if len(f.out) == 0 {
				t.Fatalf("no alert within %d events", c.within)
			}
			if !slices.Contains(f.out[0].Triggers, c.want) {
				t.Errorf("triggers %v, want %s", f.out[0].Triggers, c.want)
			}
			j, _ := json.MarshalIndent(f.out[0], "", " ")
			t.Logf("%s", j)
			for i := range 50 {
				c.attack(f, end, c.within+i)
			}
			for _, a := range f.out {
				if a.ID != f.out[0].ID {
					t.Errorf("a second alert: %s", a.Summary)
				}
			}
		})
	}
}

// An address of which the data say nothing is news like any other network, and makes
// the countries that come after it no less so.
func TestAHoleInTheDataCoversNobody(t *testing.T) {
	t.Parallel()
	f := &feed{Engine: New(Options{Locate: world})}
	homes := []string{"84.1.1.9", "84.1.2.9", "84.2.3.9", "84.3.4.9"}
	n := 0
	for day := range 44 {
		for i := range 81 {
			if day%7 > 4 {
				break // a weekend
			}
			at := start.AddDate(0, 0, day).Add(8*time.Hour + time.Duration(i)*400*time.Second)
			f.send("k", at, homes[n/30%len(homes)], "GET", "/v1/users")
			n++
		}
	}
	at := start.AddDate(0, 0, 44).Add(2 * time.Hour)
	for i, ip := range []string{"189.11.189.215", "145.1.1.1"} {
		f.send("k", at.Add(time.Duration(i)*time.Minute), ip, "GET", "/v1/users")
	}
	if len(f.out) == 0 || f.out[0].Country != "NL" && f.out[0].SourceIP != netip.MustParseAddr("189.11.189.215") {
		t.Errorf("a country after an address without one: %v", f.out)
	}
}
