package usage

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"
)

type eventJSON struct {
	ID            string    `json:"id,omitempty"`
	Time          time.Time `json:"time"`
	OrgID         string    `json:"org_id"`
	KeyID         string    `json:"key_id"`
	SourceIP      string    `json:"source_ip"`
	Method        string    `json:"method,omitempty"`
	Route         string    `json:"route"`
	Status        uint16    `json:"status,omitempty"`
	Scope         string    `json:"scope,omitempty"`
	Decision      string    `json:"decision,omitempty"`
	DenyReason    string    `json:"deny_reason,omitempty"`
	UserAgent     string    `json:"user_agent,omitempty"`
	LatencyUS     uint32    `json:"latency_us,omitempty"`
	RequestBytes  uint64    `json:"request_bytes,omitempty"`
	ResponseBytes uint64    `json:"response_bytes,omitempty"`
	Gateway       string    `json:"gateway,omitempty"`
}

// MarshalJSON writes the event in its snake_case form, absent fields left out.
func (e Event) MarshalJSON() ([]byte, error) {
	j := eventJSON{
		ID: e.ID, Time: e.Time, OrgID: e.OrgID, KeyID: e.KeyID, SourceIP: e.SourceIP.String(),
		Method: e.Method, Route: e.Route, Status: e.Status, Scope: e.Scope, Decision: e.Decision,
		DenyReason: e.DenyReason, UserAgent: e.UserAgent, LatencyUS: e.LatencyUS,
		RequestBytes: e.RequestBytes, ResponseBytes: e.ResponseBytes, Gateway: e.Gateway,
	}
	return json.Marshal(j)
}

// UnmarshalJSON reads one event and normalizes it; it does not validate it.
// Unknown fields are ignored.
func (e *Event) UnmarshalJSON(data []byte) error {
	var j eventJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	var ip netip.Addr
	if j.SourceIP != "" {
		var err error
		if ip, err = netip.ParseAddr(j.SourceIP); err != nil {
			return fmt.Errorf("source_ip: %w", err)
		}
	}
	*e = Event{
		ID: j.ID, Time: j.Time, OrgID: j.OrgID, KeyID: j.KeyID, SourceIP: ip, Method: j.Method,
		Route: j.Route, Status: j.Status, Scope: j.Scope, Decision: j.Decision, DenyReason: j.DenyReason,
		UserAgent: j.UserAgent, LatencyUS: j.LatencyUS, RequestBytes: j.RequestBytes,
		ResponseBytes: j.ResponseBytes, Gateway: j.Gateway,
	}
	e.Normalize()
	return nil
}
