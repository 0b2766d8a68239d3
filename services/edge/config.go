package edge

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/apikey"
	"github.com/latchkey-dev/latchkey/pkg/edge"
)

// Config of an edge. Variables begin with LATCHKEY_.
type Config struct {
	// Addr is where forward-auth, POST /v1/usage, metrics and health are served.
	Addr string `env:"EDGE_ADDR" envDefault:"127.0.0.1:8081"`
	// GRPCAddr is where Envoy's ext_authz is served; empty for not at all.
	GRPCAddr string `env:"EDGE_GRPC_ADDR" envDefault:"127.0.0.1:8082"`
	// Name is the gateway of the events; the host's name by default.
	Name string `env:"EDGE_NAME"`
	// Realm is that of WWW-Authenticate.
	Realm string `env:"EDGE_REALM" envDefault:"latchkey"`
	// Policy is the path of the policy file; without one any valid key is allowed.
	Policy string `env:"EDGE_POLICY"`
	// PolicyCheck is how often the policy file is looked at for a change; it counts
	// once two looks have found the same.
	PolicyCheck time.Duration `env:"EDGE_POLICY_CHECK" envDefault:"500ms"`
	// KeyHeader is one more header that may carry the key.
	KeyHeader string `env:"EDGE_KEY_HEADER"`
	// TrustedProxies are the addresses and prefixes whose X-Forwarded-For is
	// believed: the gateways. None by default, also not this machine.
	TrustedProxies []string `env:"EDGE_TRUSTED_PROXIES"`
	// FailClosedAfter refuses everything once the keys were not proven fresh for
	// so long; 0 never does.
	FailClosedAfter time.Duration `env:"EDGE_FAIL_CLOSED_AFTER" envDefault:"0"`

	// Spool is the directory in which events wait for NATS; without one they wait
	// in memory, and a process that dies takes them along.
	Spool string `env:"EDGE_SPOOL"`
	// SpoolMaxBytes is how large the spool may grow.
	SpoolMaxBytes int64 `env:"EDGE_SPOOL_MAX_BYTES" envDefault:"1073741824"`
	// MemoryMaxBytes is how much may wait in memory where there is no spool.
	MemoryMaxBytes int64 `env:"EDGE_MEMORY_MAX_BYTES" envDefault:"67108864"`
	// FlushInterval is how long an event waits in memory before it is written
	// down and published: what a killed process can lose.
	FlushInterval time.Duration `env:"EDGE_FLUSH_INTERVAL" envDefault:"100ms"`
	// Queue is how many events may wait for the next flush.
	Queue int `env:"EDGE_QUEUE" envDefault:"65536"`

	// MaxBody is the largest body of POST /v1/usage, in bytes, unpacked.
	MaxBody int64 `env:"EDGE_MAX_BODY" envDefault:"67108864"`
	// MaxBodies is how many bytes of such bodies are worked on at once.
	MaxBodies int64 `env:"EDGE_MAX_BODIES" envDefault:"268435456"`
	// DenialsPerSecond, DenialsBurst and DenialsTotal limit the events of denied
	// attempts: per source address, and of all sources together per second.
	DenialsPerSecond float64 `env:"EDGE_DENIALS_PER_SECOND" envDefault:"5"`
	DenialsBurst     float64 `env:"EDGE_DENIALS_BURST" envDefault:"200"`
	DenialsTotal     float64 `env:"EDGE_DENIALS_TOTAL" envDefault:"1000"`

	// Peppers and PlainHashes are those of the keys service.
	Peppers     []string `env:"KEY_PEPPERS"`
	PlainHashes bool     `env:"KEY_PLAIN_HASHES" envDefault:"true"`

	// Clock is the time, time.Now if nil.
	Clock func() time.Time `env:"-"`
}

// Validate reports everything that is wrong with the configuration.
func (c *Config) Validate() error {
	_, _, err := c.read()
	var errs []error
	for name, bad := range map[string]bool{
		"EDGE_FLUSH_INTERVAL":   c.FlushInterval <= 0,
		"EDGE_QUEUE":            c.Queue <= 0,
		"EDGE_SPOOL_MAX_BYTES":  c.SpoolMaxBytes <= 0,
		"EDGE_MEMORY_MAX_BYTES": c.MemoryMaxBytes <= 0,
		"EDGE_MAX_BODY":         c.MaxBody <= 0,
		"EDGE_POLICY_CHECK":     c.PolicyCheck <= 0,
	} {
		if bad {
			errs = append(errs, fmt.Errorf("%s must be more than 0", name))
		}
	}
	if strings.ContainsAny(c.Policy, "\n\r") {
		errs = append(errs, errors.New("EDGE_POLICY is the path of the policy file, not its text"))
	}
	return errors.Join(append(errs, err)...)
}

// read is what of the configuration is written as text.
func (c *Config) read() ([]netip.Prefix, apikey.Hasher, error) {
	proxies, err := edge.ParseProxies(c.TrustedProxies)
	if err != nil {
		err = fmt.Errorf("EDGE_TRUSTED_PROXIES: %w", err)
	}
	peppers, pepperErr := apikey.DecodePeppers(c.Peppers)
	hasher, hasherErr := apikey.NewHasher(peppers, c.PlainHashes)
	if pepperErr = errors.Join(pepperErr, hasherErr); pepperErr != nil {
		pepperErr = fmt.Errorf("KEY_PEPPERS: %w", pepperErr)
	}
	return proxies, hasher, errors.Join(err, pepperErr)
}

// DefaultConfig is the configuration of an empty environment.
func DefaultConfig() Config {
	return Config{
		Addr: "127.0.0.1:8081", GRPCAddr: "127.0.0.1:8082", Realm: "latchkey", PolicyCheck: 500 * time.Millisecond,
		SpoolMaxBytes: 1 << 30, MemoryMaxBytes: 64 << 20, FlushInterval: 100 * time.Millisecond, Queue: 65536,
		MaxBody: 64 << 20, MaxBodies: 256 << 20, DenialsPerSecond: 5, DenialsBurst: 200, DenialsTotal: 1000, PlainHashes: true,
	}
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "edge"
	}
	return name
}
