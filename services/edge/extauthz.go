package edge

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/latchkey-dev/latchkey/pkg/edge"
	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// newGRPC serves envoy.service.auth.v3.Authorization and grpc.health.v1.Health.
func (s *Service) newGRPC() *grpc.Server {
	g := grpc.NewServer(grpc.MaxRecvMsgSize(1 << 20))
	authv3.RegisterAuthorizationServer(g, &extAuthz{service: s})
	healthv1.RegisterHealthServer(g, health.NewServer())
	return g
}

// extAuthz answers Envoy. The client's address is the one that Envoy names as
// the source of the request: Envoy is the gateway here and says so itself, not
// through a header that a client could have written. If that address is a
// trusted proxy, X-Forwarded-For is walked on from there.
type extAuthz struct {
	authv3.UnimplementedAuthorizationServer
	service *Service
}

// Names in the context_extensions of a route in Envoy's configuration.
const (
	extensionScope = "scope" // required beside the policy file's, blank-delimited
	extensionRoute = "route" // the route template of the events
)

// Check judges one request.
func (a *extAuthz) Check(_ context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	s := a.service
	attributes := req.GetAttributes()
	in := attributes.GetRequest().GetHttp()
	headers := headersOf(in)
	j := judged{
		original: original{method: in.GetMethod(), host: in.GetHost(), target: in.GetPath(), wants503: true},
		source:   edge.ClientIP(socketAddr(attributes.GetSource().GetAddress()), headers["X-Forwarded-For"], s.proxies),
	}
	extensions := attributes.GetContextExtensions()
	s.judge(&j, s.edge.Secret(headers), func(n edge.Need) edge.Need {
		if scope := extensions[extensionScope]; scope != "" {
			n = n.And(strings.Fields(scope)...)
		}
		return withRequired(n, headers)
	})
	if route := extensions[extensionRoute]; route != "" {
		j.route = route
	}
	if j.verdict.Allowed() {
		s.record(&j, headers.Get("User-Agent"), 0)
		return s.pass(&j), nil
	}
	answer := s.answer(&j)
	s.record(&j, headers.Get("User-Agent"), answer.Status)
	answer.Problem.Instance = instance(j.target)
	return s.refuse(&j, answer), nil
}

// headersOf is the request's headers in canonical form, from either of the two
// forms in which Envoy sends them.
func headersOf(in *authv3.AttributeContext_HttpRequest) http.Header {
	h := make(http.Header, len(in.GetHeaders()))
	for name, value := range in.GetHeaders() {
		h[http.CanonicalHeaderKey(name)] = []string{value}
	}
	for _, f := range in.GetHeaderMap().GetHeaders() {
		value := f.GetValue()
		if value == "" {
			value = string(f.GetRawValue())
		}
		h.Add(f.GetKey(), value)
	}
	return h
}

func socketAddr(a *corev3.Address) netip.Addr {
	ip, err := netip.ParseAddr(a.GetSocketAddress().GetAddress())
	if err != nil {
		return netip.IPv6Unspecified() // a Unix socket: the client is this machine
	}
	return ip.Unmap()
}

// pass lets a request through: identity headers that overwrite the client's, the
// secret taken away.
func (s *Service) pass(j *judged) *authv3.CheckResponse {
	id := identify(j.verdict, j)
	ok := &authv3.OkHttpResponse{
		Headers:         make([]*corev3.HeaderValueOption, 0, len(id)),
		HeadersToRemove: []string{"authorization", "x-api-key"},
	}
	for _, f := range id {
		ok.Headers = append(ok.Headers, overwrite(f.name, f.value))
	}
	if s.cfg.KeyHeader != "" {
		ok.HeadersToRemove = append(ok.HeadersToRemove, strings.ToLower(s.cfg.KeyHeader))
	}
	return &authv3.CheckResponse{
		Status:          &status.Status{Code: int32(codes.OK)},
		HttpResponse:    &authv3.CheckResponse_OkResponse{OkResponse: ok},
		DynamicMetadata: metadata(j),
	}
}

func (s *Service) refuse(j *judged, answer edge.Answer) *authv3.CheckResponse {
	body, err := json.Marshal(answer.Problem)
	if err != nil { // strings and a number always encode
		body = nil
	}
	denied := &authv3.DeniedHttpResponse{
		Status: &typev3.HttpStatus{Code: typev3.StatusCode(answer.Status)},
		Headers: []*corev3.HeaderValueOption{
			overwrite("Content-Type", "application/problem+json"),
			overwrite("Cache-Control", "no-store"),
		},
		Body: string(body) + "\n",
	}
	if answer.Challenge != "" {
		denied.Headers = append(denied.Headers, overwrite("WWW-Authenticate", answer.Challenge))
	}
	if answer.Status == http.StatusServiceUnavailable {
		denied.Headers = append(denied.Headers, overwrite("Retry-After", "1"))
	}
	for _, f := range identify(j.verdict, j) {
		denied.Headers = append(denied.Headers, overwrite(f.name, f.value))
	}
	return &authv3.CheckResponse{
		Status:          &status.Status{Code: int32(grpcCode(answer.Status))},
		HttpResponse:    &authv3.CheckResponse_DeniedResponse{DeniedResponse: denied},
		DynamicMetadata: metadata(j),
	}
}

func grpcCode(httpStatus int) codes.Code {
	switch httpStatus {
	case http.StatusUnauthorized:
		return codes.Unauthenticated
	case http.StatusServiceUnavailable:
		return codes.Unavailable
	}
	return codes.PermissionDenied
}

// overwrite sets a header in place of any that is there, also with nothing.
func overwrite(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:         &corev3.HeaderValue{Key: strings.ToLower(name), Value: value},
		AppendAction:   corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		KeepEmptyValue: true,
	}
}

// metadata is what Envoy's access log and other filters may know. The client
// does not see it, so it names the key and the true reason of a denial.
func metadata(j *judged) *structpb.Struct {
	text := structpb.NewStringValue
	fields := map[string]*structpb.Value{
		"decision": text(usage.Allow), "route": text(j.route), "client_ip": text(j.source.String()),
		"deny_reason": text(j.verdict.Reason), "key_id": text(""), "org_id": text(""), "scopes": text(""),
	}
	if !j.verdict.Allowed() {
		fields["decision"] = text(usage.Deny)
	}
	if k := j.verdict.Key; k != nil {
		fields["key_id"], fields["org_id"], fields["scopes"] = text(k.ID()), text(k.OrgID()), text(k.ScopeText())
	}
	return &structpb.Struct{Fields: fields}
}
