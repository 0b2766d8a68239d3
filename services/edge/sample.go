package edge

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// sampleChange is the message about the i-th of many made-up keys, of the size
// that real ones have.
func sampleChange(i int) []byte {
	hash := sha256.Sum256(fmt.Appendf(nil, "%d", i))
	id := fmt.Sprintf("key_%026d", i)
	return fmt.Appendf(nil, `{"id":"evt_%026d","type":"api_key.created","time":"2026-11-21T12:00:00Z","actor":"key_admin","actor_ip":"203.0.113.7",`+
		`"record":{"id":%q,"org_id":"org_%d","name":"integration %d","hash":%q,"prefix":"lk_live_%04x","environment":"live",`+
		`"scopes":["orders:read","orders:write"],"status":"active","created_at":"2026-11-21T12:00:00Z","rotation_days":90}}`,
		i, id, i%1000, i, hex.EncodeToString(hash[:]), i&0xffff)
}
