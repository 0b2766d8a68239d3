package ingest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/usage"
)

// cloudRecord is what of a CloudTrail record becomes an event.
type cloudRecord struct {
	EventID      string    `json:"eventID"`
	EventTime    time.Time `json:"eventTime"`
	EventSource  string    `json:"eventSource"`
	EventName    string    `json:"eventName"`
	AWSRegion    string    `json:"awsRegion"`
	SourceIP     string    `json:"sourceIPAddress"`
	UserAgent    string    `json:"userAgent"`
	ErrorCode    string    `json:"errorCode"`
	Account      string    `json:"recipientAccountId"`
	UserIdentity struct {
		AccessKeyID string `json:"accessKeyId"`
		AccountID   string `json:"accountId"`
	} `json:"userIdentity"`
}

// cloudTrail reads {"Records":[…]} as CloudTrail writes it to S3, the answer
// {"Events":[{"CloudTrailEvent":"…"}]} of lookup-events, a plain array, or
// records one after another.
func (in *reader) cloudTrail(ctx context.Context, r io.Reader) error {
	dec := json.NewDecoder(r)
	number := int64(0)
	for {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("read JSON: %w", err)
		}
		switch tok {
		case json.Delim('['):
			err = in.cloudRecords(ctx, dec, &number)
		case json.Delim('{'):
			err = in.cloudDocument(ctx, dec, &number)
		default:
			err = fmt.Errorf("read JSON: %v where a CloudTrail document should begin", tok)
		}
		if err != nil {
			return err
		}
	}
}

// cloudDocument reads the rest of an object: a list of records under its name,
// or itself a record.
func (in *reader) cloudDocument(ctx context.Context, dec *json.Decoder, number *int64) error {
	record := map[string]json.RawMessage{}
	lists := 0
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return fmt.Errorf("read JSON: %w", err)
		}
		name, _ := tok.(string)
		if name == "Records" || name == "Events" {
			if tok, err = dec.Token(); err != nil {
				return fmt.Errorf("read JSON: %w", err)
			}
			if tok == nil {
				continue
			}
			if tok != json.Delim('[') {
				return fmt.Errorf("read JSON: %s is no array", name)
			}
			if err := in.cloudRecords(ctx, dec, number); err != nil {
				return err
			}
			lists++
			continue
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return fmt.Errorf("read JSON: %w", err)
		}
		record[name] = value
	}
	if _, err := dec.Token(); err != nil {
		return fmt.Errorf("read JSON: %w", err)
	}
	if lists > 0 {
		return nil
	}
	raw, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("read record: %w", err)
	}
	*number++
	return in.cloudRecord(raw, *number)
}

// cloudRecords reads the rest of an array.
func (in *reader) cloudRecords(ctx context.Context, dec *json.Decoder, number *int64) error {
	for dec.More() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return fmt.Errorf("read JSON: %w", err)
		}
		*number++
		if err := in.cloudRecord(raw, *number); err != nil {
			return err
		}
	}
	if _, err := dec.Token(); err != nil {
		return fmt.Errorf("read JSON: %w", err)
	}
	return nil
}

func (in *reader) cloudRecord(raw []byte, number int64) error {
	var wrapped struct {
		CloudTrailEvent string `json:"CloudTrailEvent"`
	}
	if err := json.Unmarshal(raw, &wrapped); err == nil && wrapped.CloudTrailEvent != "" {
		raw = []byte(wrapped.CloudTrailEvent)
	}
	var rec cloudRecord
	err := json.Unmarshal(raw, &rec)
	if err != nil {
		err = fmt.Errorf("read record: %w", err)
	}
	var ev usage.Event
	if err == nil {
		ev, err = in.cloudEvent(rec)
	}
	return in.keep(ev, err, raw, number, "record")
}

// cloudEvent maps a record: the service and the call are the route
// ("s3.amazonaws.com/GetObject") and, as IAM writes it, the scope
// ("s3:GetObject"); the account is the organization and the region the gateway.
func (in *reader) cloudEvent(rec cloudRecord) (usage.Event, error) {
	if rec.UserIdentity.AccessKeyID == "" {
		return usage.Event{}, errNoKey
	}
	ev := usage.Event{
		ID: rec.EventID, Time: rec.EventTime, OrgID: in.opts.Org, KeyID: rec.UserIdentity.AccessKeyID,
		SourceIP: cloudAddress(rec.SourceIP), UserAgent: rec.UserAgent, Gateway: rec.AWSRegion,
	}
	for _, org := range []string{rec.Account, rec.UserIdentity.AccountID, DefaultOrg} {
		if ev.OrgID == "" {
			ev.OrgID = org
		}
	}
	if rec.EventSource != "" || rec.EventName != "" {
		ev.Route = rec.EventSource + "/" + rec.EventName
		service, _, _ := strings.Cut(rec.EventSource, ".")
		ev.Scope = service + ":" + rec.EventName
	}
	if usage.CheckIdentifier(ev.ID) != nil {
		ev.ID = "" // made of the record instead
	}
	ev.Status, ev.DenyReason = cloudStatus(rec.ErrorCode)
	if ev.DenyReason != "" {
		ev.Decision = usage.Deny
	}
	return ev, nil
}

// cloudAddress is :: for calls that an AWS service made with the key: their
// record has the service's name ("cloudformation.amazonaws.com", "AWS Internal")
// where the address should be. The detector learns no network from it.
func cloudAddress(s string) netip.Addr {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return netip.IPv6Unspecified()
	}
	return addr
}

// cloudStatus is the HTTP status that an error code stands for, and the reason
// if it means that the caller was turned away. EC2 writes "Client." before its codes.
func cloudStatus(code string) (status uint16, denied string) {
	code = strings.TrimPrefix(strings.TrimPrefix(code, "Client."), "Server.")
	has := func(words ...string) bool {
		for _, w := range words {
			if strings.Contains(code, w) {
				return true
			}
		}
		return false
	}
	switch {
	case code == "":
		return 200, ""
	case has("AccessDenied", "UnauthorizedOperation", "NotAuthorized", "AuthorizationError", "Forbidden"):
		return 403, usage.DenyInsufficientScope
	case has("ExpiredToken", "TokenRefreshRequired"):
		return 403, usage.DenyExpiredKey
	case has("InvalidClientTokenId", "UnrecognizedClient", "SignatureDoesNotMatch", "AuthFailure", "InvalidAccessKeyId"):
		return 403, usage.DenyInvalidKey
	case has("Throttl", "RequestLimitExceeded", "TooManyRequests", "SlowDown"):
		return 429, usage.DenyRateLimited
	case has("NotFound", "NoSuch"):
		return 404, ""
	case has("InternalError", "InternalFailure", "ServiceException"):
		return 500, ""
	case has("ServiceUnavailable", "Unavailable"):
		return 503, ""
	}
	return 400, ""
}
