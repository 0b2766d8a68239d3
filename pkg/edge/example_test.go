package edge_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/schemas/key"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// printer is a Recorder; a gateway takes a *usage.Publisher of pkg/usage.
type printer struct{}

func (printer) Enqueue(e *usage.Event) bool {
	fmt.Printf("event: %s %s %s %d %s %q\n", e.KeyID, e.Method, e.Route, e.Status, e.Decision, e.DenyReason)
	return true
}

// exampleKeys is a set with one key. A gateway fills its set from NATS:
//
//	keys := edge.NewKeyset()
//	go keys.Watch(ctx, js, edge.WatchOptions{Log: log})
func exampleKeys() (*edge.Keyset, string) {
	k, err := apikey.Generate(apikey.Live)
	if err != nil {
		panic(err)
	}
	keys := edge.NewKeyset()
	_, err = keys.Apply(&key.Record{
		ID: "key_1", OrgID: "org_acme", Name: "checkout", Hash: apikey.Sum(k.Secret()).String(),
		Scopes: []string{"orders:write"}, Status: key.Active,
	}, 1)
	if err != nil {
		panic(err)
	}
	keys.MarkSynced(time.Now())
	return keys, k.Secret()
}

func ExampleEdge_RequireScope() {
	keys, secret := exampleKeys()
	e := edge.New(keys, edge.Options{Recorder: printer{}, Gateway: "shop-1"})
	mux := http.NewServeMux()
	mux.Handle("POST /v1/orders/{id}", e.RequireScope("orders:write")(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "hello,", edge.KeyFrom(r.Context()).Name())
	})))
	mux.Handle("DELETE /v1/orders/{id}", e.RequireScope("orders:delete")(http.NotFoundHandler()))

	for _, method := range []string{"POST", "DELETE"} {
		r := httptest.NewRequest(method, "/v1/orders/42", nil)
		r.Header.Set("Authorization", "Bearer "+secret)
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		fmt.Printf("answer: %d, challenge %q\n", w.Code, w.Header().Get("WWW-Authenticate"))
	}
	// Output:
	// event: key_1 POST /v1/orders/{id} 200 allow ""
	// answer: 200, challenge ""
	// event: key_1 DELETE /v1/orders/{id} 403 deny "insufficient_scope"
	// answer: 403, challenge "Bearer realm=\"latchkey\", error=\"insufficient_scope\", scope=\"orders:delete\""
}

func ExampleEdge_Decide() {
	keys, secret := exampleKeys()
	e := edge.New(keys, edge.Options{})
	source := netip.MustParseAddr("203.0.113.7")

	v := e.Decide(secret, source, edge.Require("orders:write"))
	fmt.Println(v.Allowed(), v.Key.ID())
	v = e.Decide("lk_live_madeup", source, edge.Require("orders:write"))
	fmt.Println(v.Allowed(), v.Reason)
	// Output:
	// true key_1
	// false invalid_key
}

func ExampleClientIP() {
	trusted, err := edge.ParseProxies([]string{"127.0.0.1", "10.0.0.0/8"})
	if err != nil {
		panic(err)
	}
	gateway := netip.MustParseAddr("127.0.0.1")
	// The client itself wrote 6.6.6.6, a load balancer at 10.0.0.5 the rest.
	fmt.Println(edge.ClientIP(gateway, []string{"6.6.6.6, 203.0.113.7, 10.0.0.5"}, trusted))
	fmt.Println(edge.ClientIP(gateway, []string{"203.0.113.7"}, nil))
	// Output:
	// 203.0.113.7
	// 127.0.0.1
}
