package main

import (
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
	"github.com/latchkey-dev/latchkey/services/internal/natsd/natstest"
	"github.com/latchkey-dev/latchkey/services/internal/pipeline"
)

func TestDeadLettersListAndReplay(t *testing.T) {
	t.Parallel()
	_, js := natstest.Bus(t, bus.Config{Partitions: 2})
	for i, body := range []string{"first", "second"} {
		m := &nats.Msg{Subject: bus.DeadSubject(bus.Collector), Data: []byte(body), Header: nats.Header{}}
		m.Header.Set("Content-Type", "application/json")
		m.Header.Set(bus.HeaderReason, "not valid JSON")
		m.Header.Set(bus.HeaderStream, bus.Usage)
		m.Header.Set(bus.HeaderSubject, "usage.v1.1")
		m.Header.Set(bus.HeaderSequence, "7")
		if i == 1 {
			m.Header.Set(bus.HeaderIndex, "3")
		}
		if _, err := js.PublishMsg(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	var letters []deadLetter
	if err := eachDead(t.Context(), js, func(d deadLetter) error {
		letters = append(letters, d)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(letters) != 2 || letters[0].Index != nil || *letters[1].Index != 3 || letters[1].Body != "second" ||
		letters[0].Reason != "not valid JSON" || letters[0].Sequence != 7 || letters[0].Service != "collector" {
		t.Fatalf("%+v", letters)
	}
	if n, err := replayDead(t.Context(), js, map[uint64]bool{2: true}); n != 1 || err != nil {
		t.Fatalf("replayed %d, %v", n, err)
	}
	if _, err := replayDead(t.Context(), js, map[uint64]bool{2: true}); err == nil {
		t.Error("a dead letter was replayed twice")
	}
	s, err := pipeline.Source{JS: js}.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s.Dead.Messages != 1 || s.Usage.Messages != 1 || s.Readers[0].LagMessages() != 1 || len(s.Readers[1].Partitions) != 2 || len(s.Problems) == 0 {
		t.Errorf("%+v", s)
	}
}
