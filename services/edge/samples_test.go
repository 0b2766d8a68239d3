package edge

import (
	"os"
	"path/filepath"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"github.com/goccy/go-yaml"
	"google.golang.org/protobuf/encoding/protojson"
)

func sample(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "deploy", "gateways", name))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestEnvoySample reads the sample as Envoy does: as its bootstrap message, every
// extension by its type.
func TestEnvoySample(t *testing.T) {
	t.Parallel()
	text, err := yaml.YAMLToJSON(sample(t, "envoy/envoy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var b bootstrapv3.Bootstrap
	if err := protojson.Unmarshal(text, &b); err != nil {
		t.Fatal(err)
	}
	if err := b.ValidateAll(); err != nil {
		t.Error(err)
	}
}

// TestTraefikSample demands that every identity header and the secret's are
// replaced by the edge's.
func TestTraefikSample(t *testing.T) {
	t.Parallel()
	var file struct {
		HTTP struct {
			Middlewares map[string]struct {
				ForwardAuth struct {
					Address             string   `yaml:"address"`
					AuthResponseHeaders []string `yaml:"authResponseHeaders"`
				} `yaml:"forwardAuth"`
			} `yaml:"middlewares"`
		} `yaml:"http"`
	}
	if err := yaml.Unmarshal(sample(t, "traefik/latchkey.yaml"), &file); err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, h := range file.HTTP.Middlewares["latchkey"].ForwardAuth.AuthResponseHeaders {
		named[h] = true
	}
	for _, f := range (identity{{name: headerKeyID}, {name: headerOrgID}, {name: headerKeyName}, {name: headerEnvironment}, {name: headerScopes}, {name: headerRoute}, {name: headerClientIP}, {name: headerDenyReason}}) {
		if !named[f.name] {
			t.Errorf("%s is not replaced", f.name)
		}
	}
	if !named["Authorization"] || !named["X-Api-Key"] {
		t.Error("the secret goes upstream")
	}
}

func TestPolicySample(t *testing.T) {
	t.Parallel()
	p, err := parsePolicy(sample(t, "policy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if r := p.match("POST", "api.example.com", "/v1/devices/d1/telemetry"); r == nil || r.need.String() != "telemetry:write" || r.route != "/v1/devices/{id}/telemetry" {
		t.Errorf("%+v", r)
	}
}
