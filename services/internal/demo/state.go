package demo

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// state is what the demo remembers between two starts, in DIR/demo.json. It
// holds secrets, of a made-up organization, because the demo calls the edge
// with them as its clients would.
type state struct {
	OrgID string `json:"org_id"`
	// Runs is how often the demo was started.
	Runs int        `json:"runs"`
	Keys []keyState `json:"keys"`

	path string
}

type keyState struct {
	Name   string `json:"name"`
	ID     string `json:"id"`
	Secret string `json:"secret"`
	// Part is the attack that the key is made for in run Run, empty for a quiet key.
	Part string `json:"part,omitempty"`
	Run  int    `json:"run"`
	// Began is when the key's history ended and its live traffic began.
	Began time.Time `json:"began"`
	// Until is up to when its events have been sent.
	Until time.Time `json:"until"`
}

func loadState(dir string) (*state, error) {
	s := &state{path: filepath.Join(dir, "demo.json")}
	content, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the demo's state: %w", err)
	}
	if err := json.Unmarshal(content, s); err != nil {
		return nil, fmt.Errorf("read %s: %w (remove the data directory to begin anew)", s.path, err)
	}
	return s, nil
}

func (s *state) save() error {
	content, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.path+".new", content, 0o600); err != nil {
		return fmt.Errorf("save the demo's state: %w", err)
	}
	return os.Rename(s.path+".new", s.path)
}

// member is the cast's description of a key of the state.
func (k keyState) member() (member, error) {
	if k.Part != "" {
		return victims()[k.Part], nil
	}
	for _, m := range quiet() {
		if m.name == k.Name {
			return m, nil
		}
	}
	return member{}, fmt.Errorf("the demo's state names key %q, which this version does not know (remove the data directory to begin anew)", k.Name)
}
