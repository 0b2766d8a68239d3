// Package edge decides in memory whether a request's API key may do what it
// asks, and tells what it decided.
//
// A [Keyset] holds every key, found by the hash of its secret; [Keyset.Watch]
// keeps it in step with the stream KEYS. An [Edge] judges with it: form and
// checksum of the secret, hash, status and expiry, address, scope. That takes no
// lock, allocates nothing and waits for nobody, whether NATS is there or not.
//
//	keys := edge.NewKeyset()
//	go keys.Watch(ctx, js, edge.WatchOptions{})
//	e := edge.New(keys, edge.Options{Recorder: publisher})
//	mux.Handle("POST /v1/orders", e.RequireScope("orders:write")(orders))
//
// # Promises
//
//   - A change of a key counts for every decision that begins after the message
//     about it has arrived. A key once seen revoked stays refused, whatever else
//     arrives, in whatever order.
//   - With NATS away the edge goes on with what it knows. [Keyset.Synced] says how
//     old that is; with [Options.FailClosedAfter] the edge refuses after a while.
//   - The secret is neither kept nor logged nor recorded: its hash is looked up.
//     The time that a look-up takes says nothing about the secret.
//   - The client's address is the socket's, unless that is a proxy that was named
//     in [Options.TrustedProxies]; see [ClientIP].
//   - Attempts that were denied are recorded as well, up to [DenialLimit], those
//     with unknown secrets under the key and organization [Unknown].
package edge
