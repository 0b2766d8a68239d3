package detector

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/services/internal/api"
)

// listen opens the address for /metrics, /-/healthy and /-/ready, if there is one.
func (s *Service) listen(ctx context.Context, addr string, metrics *prometheus.Registry) error {
	if addr == "" {
		return nil
	}
	var err error
	if s.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", addr); err != nil {
		return fmt.Errorf("listen for health and metrics: %w", err)
	}
	mux := http.NewServeMux()
	s.health.Add("detector", s.Ready)
	if metrics == nil {
		api.Operate(mux, &s.health, nil)
	} else {
		api.Operate(mux, &s.health, metrics)
	}
	s.server = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	return nil
}

// Addr is where /metrics and the health checks are, empty if nowhere.
func (s *Service) Addr() string {
	if s.listener == nil {
		return ""
	}
	return s.listener.Addr().String()
}

// serve answers until the returned function is called.
func (s *Service) serve() (stop func()) {
	if s.server == nil {
		return func() {}
	}
	go func() {
		if err := s.server.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("health and metrics are no longer served", "error", err)
		}
	}()
	return func() { _ = s.server.Close() }
}
