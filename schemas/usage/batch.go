package usage

import "encoding/hex"

// AppendBatch appends a UsageBatch of the events, which must be normalized.
func AppendBatch(b []byte, events []Event) []byte {
	for i := range events {
		b = events[i].AppendProtobuf(b)
	}
	return b
}

// UUID is an id in the text form of RFC 9562, lower case.
func UUID(id [16]byte) string {
	var b [36]byte
	hex.Encode(b[0:], id[0:4])
	b[8] = '-'
	hex.Encode(b[9:], id[4:6])
	b[13] = '-'
	hex.Encode(b[14:], id[6:8])
	b[18] = '-'
	hex.Encode(b[19:], id[8:10])
	b[23] = '-'
	hex.Encode(b[24:], id[10:16])
	return string(b[:])
}
