package edge

import (
	"errors"
	"net/http"
	"strings"

	"github.com/latchkey-dev/latchkey/pkg/edge"
)

// original is the request that a gateway asks about.
type original struct {
	method, host, target string
	// wants503 says that the gateway passes a 503 on; nginx makes a 500 of it.
	wants503 bool
}

var errConflict = errors.New("the gateway's and the client's headers about the request contradict each other")

// The headers in which gateways name the request, in canonical form: nginx by
// its configuration, Traefik and Caddy by themselves.
const (
	headerOriginalMethod  = "X-Original-Method"
	headerOriginalURI     = "X-Original-Uri"
	headerForwardedMethod = "X-Forwarded-Method"
	headerForwardedURI    = "X-Forwarded-Uri"
	headerForwardedHost   = "X-Forwarded-Host"
)

// originalOf reads the request that r asks about.
//
// A client can send these headers too, and a gateway passes on those that it
// does not set itself: nginx passes X-Forwarded-Uri, Traefik passes
// X-Original-Uri. Whichever family were preferred, a client could choose the
// path that is checked through the other. So two families that do not say the
// same are refused.
func originalOf(r *http.Request) (original, error) {
	h := r.Header
	om, err1 := single(h, headerOriginalMethod)
	ou, err2 := single(h, headerOriginalURI)
	fm, err3 := single(h, headerForwardedMethod)
	fu, err4 := single(h, headerForwardedURI)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return original{}, errConflict
	}
	o := original{method: r.Method, host: r.Host, target: "/"}
	originalFamily, forwardedFamily := om != "" || ou != "", fm != "" || fu != ""
	switch {
	case originalFamily && forwardedFamily && (om != fm || ou != fu):
		return o, errConflict
	case originalFamily:
		o.method, o.target = or(om, r.Method), or(ou, "/")
	case forwardedFamily:
		o.method, o.target, o.wants503 = or(fm, r.Method), or(fu, "/"), true
		host, err := single(h, headerForwardedHost)
		if err != nil {
			return o, errConflict
		}
		o.host = or(host, r.Host)
	}
	return o, nil
}

// single is the one value of a header, and an error if there are several that differ.
func single(h http.Header, canonical string) (string, error) {
	values := h[canonical]
	for _, v := range values[min(1, len(values)):] {
		if v != values[0] {
			return "", errConflict
		}
	}
	if len(values) == 0 {
		return "", nil
	}
	return values[0], nil
}

func or(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}

// headerRequiredScope adds scopes to what the policy requires, delimited by
// blanks or commas.
const headerRequiredScope = "X-Required-Scope"

// withRequired is need and what X-Required-Scope adds. Several header lines all
// count: a client that adds one can only make it harder for itself.
func withRequired(need edge.Need, h http.Header) edge.Need {
	values := h[headerRequiredScope]
	if len(values) == 0 {
		return need
	}
	var more []string
	for _, v := range values {
		more = append(more, strings.FieldsFunc(v, func(r rune) bool { return r == ' ' || r == ',' || r == '\t' })...)
	}
	return need.And(more...)
}
