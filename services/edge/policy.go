package edge

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/pkg/edge"
)

// policyFile is a policy as it is written; README.md explains it.
type policyFile struct {
	// Default is what becomes of a request that no rule matches: "deny" (the
	// default) or "allow", which lets any valid key through.
	Default string       `yaml:"default"`
	Rules   []policyRule `yaml:"rules"`
}

type policyRule struct {
	// Match is a pattern of http.ServeMux: "[METHOD ][HOST]/PATH".
	Match string `yaml:"match"`
	// Route is the route template of the events; the pattern's path by default.
	Route string `yaml:"route"`
	// Scope and Scopes are required, all of them; neither means any valid key.
	Scope  string   `yaml:"scope"`
	Scopes []string `yaml:"scopes"`
	// Public lets requests through that carry no key at all.
	Public bool `yaml:"public"`
}

// policy says what a request requires. It is immutable: a reload makes another.
type policy struct {
	mux   *http.ServeMux
	rules map[string]*rule // by pattern
	other *rule            // no rule matched; nil refuses
}

// rule is what one pattern requires. It is a handler only so that the mux can
// hold it.
type rule struct {
	route  string // "" folds the path
	need   edge.Need
	public bool
}

func (*rule) ServeHTTP(http.ResponseWriter, *http.Request) {}

// openPolicy is that of an edge without a policy file: any valid key may do
// anything that its X-Required-Scope allows.
func openPolicy() *policy { return &policy{other: &rule{}} }

// loadPolicy reads a policy file.
func loadPolicy(file string) (*policy, []byte, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, fmt.Errorf("read policy: %w", err)
	}
	p, err := parsePolicy(text)
	if err != nil {
		return nil, text, fmt.Errorf("policy %s: %w", file, err)
	}
	return p, text, nil
}

// parsePolicy reads a policy, and reports everything that is wrong with it.
func parsePolicy(text []byte) (p *policy, err error) {
	// A parser of so large a language as YAML is not to be trusted with the process.
	defer func() {
		if r := recover(); r != nil {
			p, err = nil, fmt.Errorf("not readable as YAML: %v", r)
		}
	}()
	if len(text) > maxPolicy {
		return nil, fmt.Errorf("is %d bytes long, at most %d are allowed", len(text), maxPolicy)
	}
	var file policyFile
	if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict(), yaml.DisallowUnknownField()).Decode(&file); err != nil {
		return nil, fmt.Errorf("not readable: %s", yaml.FormatError(err, false, true))
	}
	p = &policy{mux: http.NewServeMux(), rules: map[string]*rule{}}
	var errs []error
	switch file.Default {
	case "", "deny":
	case "allow":
		p.other = &rule{}
	default:
		errs = append(errs, fmt.Errorf(`default %q is neither "allow" nor "deny"`, file.Default))
	}
	for i, r := range file.Rules {
		if err := p.add(r); err != nil {
			errs = append(errs, fmt.Errorf("rule %d (%s): %w", i+1, r.Match, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return p, nil
}

const maxPolicy = 4 << 20

func (p *policy) add(r policyRule) (err error) {
	if r.Match == "" {
		return errors.New("match is required")
	}
	scopes := r.Scopes
	if r.Scope != "" {
		scopes = append([]string{r.Scope}, scopes...)
	}
	for _, s := range scopes {
		if err := apikey.CheckScope(s); err != nil {
			return err
		}
	}
	if r.Public && len(scopes) > 0 {
		return errors.New("a public rule requires no scope")
	}
	compiled := &rule{route: r.Route, need: edge.Require(scopes...), public: r.Public}
	if compiled.route == "" {
		compiled.route = routeTemplate(r.Match)
	}
	// The mux panics on a pattern that it cannot read or that conflicts with another.
	defer func() {
		if reason := recover(); reason != nil {
			err = fmt.Errorf("%v", reason)
		}
	}()
	p.mux.Handle(r.Match, compiled)
	p.rules[r.Match] = compiled
	return nil
}

// routeTemplate is the path of a pattern: "POST /v1/{rest...}" is "/v1/{rest...}".
func routeTemplate(pattern string) string {
	if i := strings.IndexByte(pattern, '/'); i >= 0 {
		return strings.TrimSuffix(pattern[i:], "{$}")
	}
	return pattern
}

// match finds the rule for a request whose path was cleaned; nil refuses it.
func (p *policy) match(method, host, cleaned string) *rule {
	if p.mux == nil {
		return p.other
	}
	r := http.Request{Method: method, Host: host, URL: &url.URL{Path: cleaned}}
	h, pattern := p.mux.Handler(&r)
	if found, ok := h.(*rule); ok {
		return found
	}
	// "/tree" where only "/tree/" is known: the mux would redirect.
	if found, ok := p.rules[pattern]; ok {
		return found
	}
	return p.other
}

var errAmbiguous = errors.New("path can be read in more than one way")

// cleanPath is the path of a request target as an upstream will most likely read
// it: decoded, without query. A path that gateways and upstreams are known to
// read differently (dot segments, encoded or backward slashes, control
// characters, a fragment, which no request has) is refused: what is checked here must be what is served there.
func cleanPath(target string) (string, error) {
	target, _, _ = strings.Cut(target, "?")
	if strings.Contains(target, "#") {
		return "", errAmbiguous
	}
	if isPlain(target) {
		return target, nil
	}
	if !strings.HasPrefix(target, "/") {
		// The absolute form, "http://host/path", and "*" of OPTIONS.
		u, err := url.Parse(target)
		if err != nil || u.Scheme == "" && target != "*" && target != "" {
			return "", errAmbiguous
		}
		target = "/" + strings.TrimPrefix(u.EscapedPath(), "/")
		if target == "/*" {
			target = "/"
		}
	}
	lower := strings.ToLower(target)
	if strings.Contains(lower, "%2f") || strings.Contains(lower, "%5c") {
		return "", errAmbiguous
	}
	decoded, err := url.PathUnescape(target)
	if err != nil {
		return "", errAmbiguous
	}
	if strings.ContainsFunc(decoded, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }) {
		return "", errAmbiguous
	}
	segments := strings.Split(decoded, "/")
	if slices.ContainsFunc(segments, isDots) {
		return "", errAmbiguous
	}
	if strings.Contains(decoded, "//") {
		trailing := strings.HasSuffix(decoded, "/")
		if decoded = path.Clean(decoded); trailing && decoded != "/" {
			decoded += "/"
		}
	}
	return decoded, nil
}

// isPlain reports whether a path reads the same for everybody, which most do.
func isPlain(target string) bool {
	if target == "" || target[0] != '/' {
		return false
	}
	for i := range len(target) {
		switch c := target[i]; {
		case c == '%', c == '\\', c < ' ', c == 0x7f:
			return false
		case c == '/' && i+1 < len(target) && (target[i+1] == '/' || target[i+1] == '.'):
			return false
		}
	}
	return true
}

// isDots finds "." and "..", also with the path parameters ("..;x") that some
// servers drop before they resolve them.
func isDots(segment string) bool {
	name, _, _ := strings.Cut(segment, ";")
	return name == "." || name == ".."
}
