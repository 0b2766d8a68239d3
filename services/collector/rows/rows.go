// Package rows builds blocks of table usage_events, column by column.
package rows

import (
	"slices"
	"time"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// Block is a block of usage_events. It is for one goroutine.
type Block struct {
	id                                     proto.ColStr
	time                                   proto.ColDateTime64
	orgID, keyID                           dict
	sourceIP                               proto.ColIPv6
	method, route                          dict
	status                                 proto.ColUInt16
	scope, decision, denyReason, userAgent dict
	latencyUS                              proto.ColUInt32
	requestBytes, responseBytes            proto.ColUInt64
	gateway                                dict
	history                                proto.ColBool
	ingestedAt                             proto.ColDateTime64
	stream                                 dict
	partition                              proto.ColUInt16
	sequence                               proto.ColUInt64
	index                                  proto.ColUInt32
	input                                  proto.Input
	// keys are what the words of the batch at hand are in this block.
	keys [columnWords][]uint32
}

// New makes an empty block.
func New() *Block {
	r := &Block{}
	r.time.WithPrecision(proto.PrecisionNano).WithLocation(time.UTC)
	r.ingestedAt.WithPrecision(proto.PrecisionMilli).WithLocation(time.UTC)
	r.input = proto.Input{
		{Name: "id", Data: &r.id},
		{Name: "time", Data: &r.time},
		{Name: "org_id", Data: &r.orgID},
		{Name: "key_id", Data: &r.keyID},
		{Name: "source_ip", Data: &r.sourceIP},
		{Name: "method", Data: &r.method},
		{Name: "route", Data: &r.route},
		{Name: "status", Data: &r.status},
		{Name: "scope", Data: &r.scope},
		{Name: "decision", Data: &r.decision},
		{Name: "deny_reason", Data: &r.denyReason},
		{Name: "user_agent", Data: &r.userAgent},
		{Name: "latency_us", Data: &r.latencyUS},
		{Name: "request_bytes", Data: &r.requestBytes},
		{Name: "response_bytes", Data: &r.responseBytes},
		{Name: "gateway", Data: &r.gateway},
		{Name: "history", Data: &r.history},
		{Name: "ingested_at", Data: &r.ingestedAt},
		{Name: "stream", Data: &r.stream},
		{Name: "partition", Data: &r.partition},
		{Name: "sequence", Data: &r.sequence},
		{Name: "index", Data: &r.index},
	}
	return r
}

// Place is where an event lay in JetStream.
type Place struct {
	Stream     string
	Partition  uint16
	Sequence   uint64
	Index      uint32
	IngestedAt time.Time
	History    bool
}

// Add appends an event, which must be normalized.
func (r *Block) Add(ev *usage.Event, at *Place) {
	r.id.Append(ev.ID)
	r.time.Data = append(r.time.Data, proto.DateTime64(ev.Time.UnixNano()))
	r.orgID.add(ev.OrgID)
	r.keyID.add(ev.KeyID)
	r.sourceIP = append(r.sourceIP, ev.SourceIP.As16())
	r.method.add(ev.Method)
	r.route.add(ev.Route)
	r.status = append(r.status, ev.Status)
	r.scope.add(ev.Scope)
	r.decision.add(ev.Decision)
	r.denyReason.add(ev.DenyReason)
	r.userAgent.add(ev.UserAgent)
	r.latencyUS = append(r.latencyUS, ev.LatencyUS)
	r.requestBytes = append(r.requestBytes, ev.RequestBytes)
	r.responseBytes = append(r.responseBytes, ev.ResponseBytes)
	r.gateway.add(ev.Gateway)
	r.history = append(r.history, at.History)
	r.ingestedAt.Data = append(r.ingestedAt.Data, proto.DateTime64(at.IngestedAt.UnixMilli()))
	r.stream.add(at.Stream)
	r.partition = append(r.partition, at.Partition)
	r.sequence = append(r.sequence, at.Sequence)
	r.index = append(r.index, at.Index)
}

// Len is the number of rows.
func (r *Block) Len() int { return len(r.sequence) }

// Reset empties the block and keeps its memory.
func (r *Block) Reset() {
	r.id.Reset()
	r.time.Data = r.time.Data[:0]
	r.sourceIP = r.sourceIP[:0]
	r.status = r.status[:0]
	r.latencyUS = r.latencyUS[:0]
	r.requestBytes, r.responseBytes = r.requestBytes[:0], r.responseBytes[:0]
	r.history = r.history[:0]
	r.ingestedAt.Data = r.ingestedAt.Data[:0]
	r.partition, r.sequence, r.index = r.partition[:0], r.sequence[:0], r.index[:0]
	for _, d := range r.dicts() {
		d.reset()
	}
}

func (r *Block) dicts() []*dict {
	return []*dict{
		&r.orgID, &r.keyID, &r.method, &r.route, &r.scope, &r.decision, &r.denyReason, &r.userAgent, &r.gateway, &r.stream,
	}
}

// Grow makes room for n more rows at once.
func (r *Block) Grow(n int) {
	r.id.Buf, r.id.Pos = slices.Grow(r.id.Buf, n*usage.IDLength), slices.Grow(r.id.Pos, n)
	r.time.Data, r.ingestedAt.Data = slices.Grow(r.time.Data, n), slices.Grow(r.ingestedAt.Data, n)
	r.sourceIP, r.history = slices.Grow(r.sourceIP, n), slices.Grow(r.history, n)
	r.status, r.partition = slices.Grow(r.status, n), slices.Grow(r.partition, n)
	r.latencyUS, r.index = slices.Grow(r.latencyUS, n), slices.Grow(r.index, n)
	r.requestBytes, r.responseBytes = slices.Grow(r.requestBytes, n), slices.Grow(r.responseBytes, n)
	r.sequence = slices.Grow(r.sequence, n)
	for _, d := range r.dicts() {
		d.keys = slices.Grow(d.keys, n)
	}
}

// Input is the block in the form that an insert takes; it follows the block.
func (r *Block) Input() proto.Input { return r.input }

// ID is the event id of row i, valid until Reset.
func (r *Block) ID(i int) []byte { return r.id.RowBytes(i) }

// KeyID is the key of row i.
func (r *Block) KeyID(i int) string { return r.keyID.row(i) }

// Nanoseconds is the time of row i since 1970.
func (r *Block) Nanoseconds(i int) int64 { return int64(r.time.Data[i]) }
