// Package natstest starts embedded NATS servers for tests.
package natstest

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd"
)

// Start runs a server in a directory of the test and stops it afterwards.
func Start(t testing.TB) *natsd.Server {
	t.Helper()
	s, err := natsd.Start(t.Context(), natsd.Options{DataDir: t.TempDir(), Addr: "127.0.0.1:0", Sync: time.Minute})
	if err != nil {
		t.Fatalf("start NATS: %v", err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

// Connect is a connection inside the process, closed before the server stops.
func Connect(t testing.TB, s *natsd.Server) *nats.Conn {
	t.Helper()
	nc, err := s.Connect(t.Name())
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// Bus is a server of its own with all streams, in one call.
func Bus(t testing.TB, cfg bus.Config) (*nats.Conn, jetstream.JetStream) {
	t.Helper()
	nc := Connect(t, Start(t))
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatalf("open JetStream: %v", err)
	}
	if err := bus.Ensure(t.Context(), js, cfg); err != nil {
		t.Fatalf("ensure streams: %v", err)
	}
	return nc, js
}
