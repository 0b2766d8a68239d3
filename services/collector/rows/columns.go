package rows

import (
	"net/netip"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// The dictionaries of a columnar batch.
const (
	orgWords = iota
	keyWords
	methodWords
	routeWords
	scopeWords
	decisionWords
	denyReasonWords
	userAgentWords
	gatewayWords
	columnWords
)

// Enter translates the dictionaries of a batch of which rows are to be added.
func (r *Block) Enter(c *usage.Columns) {
	for i, words := range [columnWords][]string{
		c.OrgID, c.KeyID, c.Method, c.Route, c.Scope, c.Decision, c.DenyReason, c.UserAgent, c.Gateway,
	} {
		d := [columnWords]*dict{
			&r.orgID, &r.keyID, &r.method, &r.route, &r.scope, &r.decision, &r.denyReason, &r.userAgent, &r.gateway,
		}[i]
		keys := r.keys[i][:0]
		for _, word := range words {
			keys = append(keys, d.key(word))
		}
		r.keys[i] = keys
	}
}

// AddColumns appends the rows from (included) to to (not included) of the batch that was
// entered, column by column; at is the place of the batch's first event.
func (r *Block) AddColumns(c *usage.Columns, from, to int, at *Place) {
	n := to - from
	for i := from; i < to; i++ {
		r.id.Append(c.ID(i))
		r.time.Data = append(r.time.Data, proto.DateTime64(c.Time[i]))
		r.index = append(r.index, at.Index+uint32(i))
	}
	caller, endpoint := part(c.Caller, from, to), part(c.Endpoint, from, to)
	outcome, client := part(c.Outcome, from, to), part(c.Client, from, to)
	r.orgID.column(r.keys[orgWords], caller, n)
	r.keyID.column(r.keys[keyWords], caller, n)
	r.method.column(r.keys[methodWords], endpoint, n)
	r.route.column(r.keys[routeWords], endpoint, n)
	r.scope.column(r.keys[scopeWords], endpoint, n)
	r.decision.column(r.keys[decisionWords], outcome, n)
	r.denyReason.column(r.keys[denyReasonWords], outcome, n)
	r.userAgent.column(r.keys[userAgentWords], client, n)
	r.gateway.column(r.keys[gatewayWords], client, n)
	r.status = pick(r.status, c.Status, outcome, n)
	r.sourceIP = addresses(r.sourceIP, c.SourceIP, part(c.Source, from, to), n)
	r.latencyUS = numbers(r.latencyUS, part(c.LatencyUS, from, to), n)
	r.requestBytes = numbers(r.requestBytes, part(c.RequestBytes, from, to), n)
	r.responseBytes = numbers(r.responseBytes, part(c.ResponseBytes, from, to), n)
	r.history = fill(r.history, at.History, n)
	r.ingestedAt.Data = fill(r.ingestedAt.Data, proto.DateTime64(at.IngestedAt.UnixMilli()), n)
	r.stream.keys = fill(r.stream.keys, r.stream.key(at.Stream), n)
	r.partition = fill(r.partition, at.Partition, n)
	r.sequence = fill(r.sequence, at.Sequence, n)
}

// part is the rows of a column, of which an empty one is all zeros.
func part[T any](column []T, from, to int) []T {
	if len(column) == 0 {
		return nil
	}
	return column[from:to]
}

func numbers[S ~[]T, T any](to S, column []T, rows int) S {
	if len(column) == 0 {
		var zero T
		return fill(to, zero, rows)
	}
	return append(to, column...)
}

func fill[S ~[]T, T any](to S, value T, rows int) S {
	for range rows {
		to = append(to, value)
	}
	return to
}

func pick[S ~[]T, T any](to S, values []T, index []uint32, rows int) S {
	if len(index) == 0 {
		return fill(to, values[0], rows)
	}
	for _, i := range index {
		to = append(to, values[i])
	}
	return to
}

func addresses(to proto.ColIPv6, values []netip.Addr, index []uint32, rows int) proto.ColIPv6 {
	if len(index) == 0 {
		return fill(to, proto.IPv6(values[0].As16()), rows)
	}
	for _, i := range index {
		to = append(to, values[i].As16())
	}
	return to
}
