package edge

import (
	"encoding/json"
	"net/http"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/schemas/key"
	schema "github.com/latchkey-dev/latchkey/schemas/usage"
)

// envoy is a request as Envoy describes it.
func envoy(method, path, source string, headers map[string]string) *authv3.CheckRequest {
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source: &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{Address: source, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 4711}},
		}}},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: method, Path: path, Host: "api.example.com", Headers: headers,
		}},
	}}
}

func dialGRPC(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func headersIn(options []*corev3.HeaderValueOption) map[string]string {
	out := map[string]string{}
	for _, o := range options {
		out[o.GetHeader().GetKey()] = o.GetHeader().GetValue()
	}
	return out
}

func TestExtAuthzAllows(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(c *Config) { c.TrustedProxies, c.KeyHeader = []string{"10.0.0.0/8"}, "X-Acme-Key" })
	rec, secret := newKey(t, "key_1", "org_acme", "orders:write")
	h.put(rec)
	client := authv3.NewAuthorizationClient(dialGRPC(t, h.GRPCAddr()))
	req := envoy("POST", "/v1/orders/42?x=1", "10.0.0.1", map[string]string{
		"authorization": "Bearer " + secret, "x-forwarded-for": "1.2.3.4,203.0.113.7,10.0.0.2", "user-agent": "curl/8",
		"x-latchkey-key-id": "key_smuggled", "x-required-scope": "orders:write",
	})
	req.Attributes.ContextExtensions = map[string]string{"scope": "orders:write", "route": "/v1/orders/{order}"}
	res, err := client.Check(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	ok := res.GetOkResponse()
	if codes.Code(res.GetStatus().GetCode()) != codes.OK || ok == nil {
		t.Fatalf("%v", res)
	}
	for _, name := range []string{"authorization", "x-api-key", "x-acme-key"} {
		if !slices.Contains(ok.GetHeadersToRemove(), name) {
			t.Errorf("%s goes upstream", name)
		}
	}
	sent := headersIn(ok.GetHeaders())
	if len(sent) != len(identity{}) || sent["x-latchkey-key-id"] != "key_1" || sent["x-latchkey-scopes"] != "orders:write" {
		t.Errorf("headers %v", sent)
	}
	for _, o := range ok.GetHeaders() {
		if o.GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD || !o.GetKeepEmptyValue() {
			t.Errorf("%s does not replace the client's", o.GetHeader().GetKey())
		}
	}
	if f := res.GetDynamicMetadata().GetFields(); f["org_id"].GetStringValue() != "org_acme" || f["decision"].GetStringValue() != "allow" {
		t.Errorf("metadata %v", f)
	}
	ev := h.events(1)[0]
	if ev.SourceIP.String() != "203.0.113.7" || ev.Route != "/v1/orders/{order}" || ev.Method != "POST" || ev.UserAgent != "curl/8" {
		t.Errorf("event %+v", ev)
	}
}

func TestExtAuthzDenies(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	rec, secret := newKey(t, "key_1", "org_acme", "orders:read")
	h.put(rec)
	gone, goneSecret := newKey(t, "key_2", "org_acme", "orders:read")
	gone.Status = key.Revoked
	h.put(gone)
	client := authv3.NewAuthorizationClient(dialGRPC(t, h.GRPCAddr()))
	for name, c := range map[string]struct {
		header, value, path string
		status              int
		code                codes.Code
		reason              string
	}{
		"none":      {"accept", "*/*", "/x", 401, codes.Unauthenticated, schema.DenyMissingKey},
		"unknown":   {"x-api-key", "lk_live_nothing", "/x", 401, codes.Unauthenticated, schema.DenyInvalidKey},
		"revoked":   {"x-api-key", goneSecret, "/x", 401, codes.Unauthenticated, schema.DenyRevokedKey},
		"scope":     {"x-api-key", secret, "/x", 403, codes.PermissionDenied, schema.DenyInsufficientScope},
		"ambiguous": {"x-api-key", secret, "/x/%2e%2e/y", 403, codes.PermissionDenied, reasonBadRequest},
	} {
		req := envoy("GET", c.path, "203.0.113.7", map[string]string{c.header: c.value, "x-forwarded-for": "1.2.3.4", "x-required-scope": "orders:delete"})
		res, err := client.Check(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		denied := res.GetDeniedResponse()
		if codes.Code(res.GetStatus().GetCode()) != c.code || int(denied.GetStatus().GetCode()) != c.status {
			t.Errorf("%s: %v", name, res)
			continue
		}
		sent := headersIn(denied.GetHeaders())
		if sent["content-type"] != "application/problem+json" || sent["x-latchkey-key-id"] != "" || c.status == 401 && sent["www-authenticate"] == "" {
			t.Errorf("%s: headers %v", name, sent)
		}
		var p edge.Problem
		if err := json.Unmarshal([]byte(denied.GetBody()), &p); err != nil || p.Status != c.status {
			t.Errorf("%s: body %s", name, denied.GetBody())
		}
		if got := res.GetDynamicMetadata().GetFields()["deny_reason"].GetStringValue(); got != c.reason {
			t.Errorf("%s: reason %q", name, got)
		}
	}
	for _, ev := range h.events(4) {
		if ev.SourceIP.String() != "203.0.113.7" {
			t.Errorf("a client's X-Forwarded-For is believed: %s", ev.SourceIP)
		}
	}
}

func TestExtAuthzUnavailable(t *testing.T) {
	t.Parallel()
	clock := time.Now()
	h := newHouse(t, func(c *Config) {
		c.FailClosedAfter = time.Minute
		c.Clock = func() time.Time { return clock }
	})
	rec, secret := newKey(t, "key_1", "org_acme")
	h.put(rec)
	h.stop()
	s := h.Service
	clock = clock.Add(time.Hour)
	res, err := (&extAuthz{service: s}).Check(t.Context(), envoy("GET", "/", "203.0.113.7", map[string]string{"x-api-key": secret}))
	if err != nil || res.GetDeniedResponse().GetStatus().GetCode() != http.StatusServiceUnavailable {
		t.Errorf("%v %v", res, err)
	}
}

func TestGRPCHealth(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	res, err := healthv1.NewHealthClient(dialGRPC(t, h.GRPCAddr())).Check(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil || res.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("%v %v", res, err)
	}
}

func FuzzExtAuthz(f *testing.F) {
	f.Add("GET", "/v1/x?y", "1.2.3.4", "Bearer x", "1.1.1.1, 2.2.2.2", "a:b")
	s := bareService(f)
	f.Fuzz(func(t *testing.T, method, path, source, authorization, forwarded, scope string) {
		res, err := (&extAuthz{service: s}).Check(t.Context(), envoy(method, path, source, map[string]string{
			"authorization": authorization, "x-forwarded-for": forwarded, "x-required-scope": scope,
		}))
		if err != nil || res.GetOkResponse() != nil {
			t.Fatalf("%v %v", res, err)
		}
	})
}
