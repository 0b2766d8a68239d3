package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	natsserver "github.com/nats-io/nats-server/v2/server"
)

const repository = "../.."

func loadCompose(t *testing.T) *types.Project {
	t.Helper()
	opts, err := cli.NewProjectOptions([]string{filepath.Join(repository, "docker-compose.yml")},
		cli.WithWorkingDirectory(repository), cli.WithName("latchkey"))
	if err != nil {
		t.Fatal(err)
	}
	project, err := opts.LoadProject(t.Context())
	if err != nil {
		t.Fatalf("docker-compose.yml: %v", err)
	}
	return project
}

func TestComposeRunsEveryService(t *testing.T) {
	t.Parallel()
	project := loadCompose(t)
	root := newRootCmd()
	for _, name := range []string{"edge", "keys", "collector", "detector", "notifier", "console", "migrate"} {
		service, err := project.GetService(name)
		if err != nil {
			t.Errorf("service %s: %v", name, err)
			continue
		}
		cmd, rest, err := root.Find(service.Command)
		if err != nil || cmd == root || len(rest) > 0 {
			t.Errorf("service %s runs %q, which the binary does not know: %v", name, service.Command, err)
		}
		if h := service.HealthCheck; h != nil {
			if cmd, _, err := root.Find(h.Test[2:]); err != nil || cmd.Name() != "health" {
				t.Errorf("service %s: health check %q is no command of the binary", name, h.Test)
			}
		}
	}
}

func TestComposeKnowsEveryVariable(t *testing.T) {
	t.Parallel()
	known := variables(t)
	for name, service := range loadCompose(t).Services {
		for variable := range service.Environment {
			if strings.HasPrefix(variable, "LATCHKEY_") && !slices.Contains(known, variable) {
				t.Errorf("service %s sets %s, which nothing reads", name, variable)
			}
		}
	}
}

func TestComposePublishesOnLoopbackOnly(t *testing.T) {
	t.Parallel()
	for name, service := range loadCompose(t).Services {
		for _, port := range service.Ports {
			if port.HostIP != "127.0.0.1" {
				t.Errorf("service %s publishes port %s on %q", name, port.Published, port.HostIP)
			}
		}
		for _, v := range service.Volumes {
			if v.Type != types.VolumeTypeBind {
				continue
			}
			if _, err := os.Stat(v.Source); err != nil {
				t.Errorf("service %s mounts a file that is not there: %v", name, err)
			}
		}
		if service.Image == "" || strings.HasSuffix(service.Image, ":latest") {
			t.Errorf("service %s has image %q, which names no version", name, service.Image)
		}
	}
}

// TestNATSConfigIsRead reads deploy/nats/nats.conf as the server would.
func TestNATSConfigIsRead(t *testing.T) {
	for variable := range loadCompose(t).Services["nats"].Environment {
		t.Setenv(variable, "secret")
	}
	opts, err := natsserver.ProcessConfigFile(filepath.Join(repository, "deploy/nats/nats.conf"))
	if err != nil {
		t.Fatal(err)
	}
	if !opts.JetStream || !opts.SyncAlways || len(opts.Users) < 6 {
		t.Errorf("JetStream %t, sync always %t, %d users", opts.JetStream, opts.SyncAlways, len(opts.Users))
	}
	for _, u := range opts.Users {
		if u.Permissions == nil || u.Permissions.Publish == nil {
			t.Errorf("user %s may publish anything", u.Username)
		}
	}
}
