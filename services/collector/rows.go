package collector

import (
	"time"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// rows is a block of usage_events, column by column.
type rows struct {
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
}

func newRows() *rows {
	r := &rows{}
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

// place is where an event lay in JetStream.
type place struct {
	stream     string
	partition  uint16
	sequence   uint64
	index      uint32
	ingestedAt time.Time
	history    bool
}

func (r *rows) add(ev *usage.Event, at *place) {
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
	r.history = append(r.history, at.history)
	r.ingestedAt.Data = append(r.ingestedAt.Data, proto.DateTime64(at.ingestedAt.UnixMilli()))
	r.stream.add(at.stream)
	r.partition = append(r.partition, at.partition)
	r.sequence = append(r.sequence, at.sequence)
	r.index = append(r.index, at.index)
}

func (r *rows) len() int { return len(r.sequence) }

func (r *rows) reset() {
	r.id.Reset()
	r.time.Data = r.time.Data[:0]
	r.sourceIP = r.sourceIP[:0]
	r.status = r.status[:0]
	r.latencyUS = r.latencyUS[:0]
	r.requestBytes, r.responseBytes = r.requestBytes[:0], r.responseBytes[:0]
	r.history = r.history[:0]
	r.ingestedAt.Data = r.ingestedAt.Data[:0]
	r.partition, r.sequence, r.index = r.partition[:0], r.sequence[:0], r.index[:0]
	for _, d := range []*dict{
		&r.orgID, &r.keyID, &r.method, &r.route, &r.scope, &r.decision, &r.denyReason, &r.userAgent, &r.gateway, &r.stream,
	} {
		d.reset()
	}
}
