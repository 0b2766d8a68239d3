package run

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
)

func TestGroupStopsInReverseOrder(t *testing.T) {
	t.Parallel()
	var stopped []string
	g := NewGroup()
	for _, name := range []string{"nats", "collector", "edge"} {
		g.Go(name, func(ctx context.Context) error {
			<-ctx.Done()
			stopped = append(stopped, name) // ordered by Stop itself: one after the other
			return ctx.Err()
		})
	}
	g.OnStop("spool", func() error { return errors.New("disk is full") })
	err := g.Stop()
	if want := []string{"edge", "collector", "nats"}; !slices.Equal(stopped, want) {
		t.Errorf("stopped %v, want %v", stopped, want)
	}
	if err == nil || err.Error() != "stop spool: disk is full" {
		t.Errorf("Stop() = %v, want only the spool's error", err)
	}
	if err := g.Stop(); err != nil {
		t.Errorf("second Stop() = %v", err)
	}
}

func TestGroupWaitNamesWhatEnded(t *testing.T) {
	t.Parallel()
	g := NewGroup()
	g.Go("edge", func(context.Context) error { return errors.New("address in use") })
	err := g.Wait(t.Context())
	if err == nil || !strings.Contains(err.Error(), "edge: address in use") {
		t.Errorf("Wait() = %v", err)
	}
	if err := g.Stop(); err != nil {
		t.Errorf("Stop() = %v, an error must be told once", err)
	}
}

func TestLoadFromReportsAllErrorsAtOnce(t *testing.T) {
	t.Parallel()
	var cfg struct {
		Size int    `env:"SIZE,required"`
		Addr string `env:"ADDR,required"`
	}
	err := LoadFrom(&cfg, map[string]string{"LATCHKEY_SIZE": "many"})
	if err == nil || !strings.Contains(err.Error(), "SIZE") && !strings.Contains(err.Error(), "Size") || !strings.Contains(err.Error(), "LATCHKEY_ADDR") {
		t.Errorf("LoadFrom() = %v, want both variables named", err)
	}
}

func TestEnvironmentReadsSecretsFromFiles(t *testing.T) {
	path := t.TempDir() + "/key"
	if err := os.WriteFile(path, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("LATCHKEY_PEPPER_FILE", path)
	vars, err := Environment()
	if err != nil || vars["LATCHKEY_PEPPER"] != "s3cret" {
		t.Errorf("LATCHKEY_PEPPER = %q, %v", vars["LATCHKEY_PEPPER"], err)
	}
	t.Setenv("LATCHKEY_PEPPER", "other")
	if _, err := Environment(); err == nil {
		t.Error("both forms set must be an error")
	}
}
