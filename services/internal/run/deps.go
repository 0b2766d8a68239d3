// Package run is how every service is configured, built and stopped.
package run

import (
	"log/slog"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// Deps is what every service is given: a connection, a logger and a registry.
// The service owns none of them.
type Deps struct {
	NATS    *nats.Conn
	Log     *slog.Logger
	Metrics *prometheus.Registry
	// Bus is the layout of the streams, for bus.Ensure.
	Bus bus.Config
}
