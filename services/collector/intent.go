package collector

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/latchkey-dev/latchkey/services/internal/bus"
)

// Intent is what the owner of a partition is about to insert: the messages
// First to Last of USAGE, all of those of the partition. It lies in bucket
// bus.Intents under the partition's number, and is written before the insert
// with compare-and-set, so that a former owner fails there and a successor cuts
// the very same batch.
type Intent struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	// Time is when the batch was first attempted, Revision that of the bucket then; it
	// is 0 in the bucket until the batch is attempted again.
	Time     time.Time `json:"time"`
	Revision uint64    `json:"revision,omitempty"`
	// The rest is for people.
	Owner  string `json:"owner"`
	Rows   int    `json:"rows"`
	Events int    `json:"events"`
}

// since keeps the time of a batch that is attempted again.
func (it Intent) since(now time.Time) time.Time {
	if it.Last > 0 {
		return it.Time
	}
	return now.UTC()
}

type intents struct {
	kv  jetstream.KeyValue
	key string
	rev uint64
}

// load reads the intent that was left, the zero one if none was.
func (in *intents) load(ctx context.Context) (Intent, error) {
	var it Intent
	e, err := in.kv.Get(ctx, in.key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		in.rev = 0
		return it, nil
	}
	if err != nil {
		return it, fmt.Errorf("read intent of partition %s: %w", in.key, err)
	}
	if err := json.Unmarshal(e.Value(), &it); err != nil {
		return it, fmt.Errorf("read intent of partition %s: %w", in.key, err)
	}
	in.rev = e.Revision()
	it.Revision = cmp.Or(it.Revision, in.rev)
	return it, nil
}

// later counts the batches, of all partitions, that were begun since a revision of the bucket.
func (in *intents) later(ctx context.Context, revision uint64) (uint64, error) {
	status, err := in.kv.Status(ctx)
	if err != nil {
		return 0, fmt.Errorf("read state of bucket %s: %w", bus.Intents, err)
	}
	bucket, ok := status.(*jetstream.KeyValueBucketStatus)
	if !ok {
		return 0, fmt.Errorf("bucket %s has no stream", bus.Intents)
	}
	return bucket.StreamInfo().State.LastSeq - revision, nil
}

// store writes an intent, or says [bus.ErrLost] if somebody else wrote one.
func (in *intents) store(ctx context.Context, it Intent) error {
	value, err := json.Marshal(it)
	if err != nil {
		return fmt.Errorf("encode intent: %w", err)
	}
	rev, err := in.kv.Update(ctx, in.key, value, in.rev)
	if err == nil {
		in.rev = rev
		return nil
	}
	// An answer that was lost looks like a refusal; what is there decides.
	e, gerr := in.kv.Get(ctx, in.key)
	if gerr == nil && string(e.Value()) == string(value) {
		in.rev = e.Revision()
		return nil
	}
	if gerr == nil && e.Revision() != in.rev || errors.Is(err, jetstream.ErrKeyExists) {
		return fmt.Errorf("%w: another collector wrote an intent", bus.ErrLost)
	}
	return fmt.Errorf("write intent of partition %s: %w", in.key, err)
}

// ReadIntents is the latest intent of every partition, by its number.
func ReadIntents(ctx context.Context, js jetstream.JetStream, partitions int) (map[int]Intent, error) {
	kv, err := js.KeyValue(ctx, bus.Intents)
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", bus.Intents, err)
	}
	all := map[int]Intent{}
	for p := range partitions {
		it, err := (&intents{kv: kv, key: strconv.Itoa(p)}).load(ctx)
		if err != nil {
			return nil, err
		}
		if it.Last > 0 {
			all[p] = it
		}
	}
	return all, nil
}
