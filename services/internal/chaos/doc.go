// Package chaos holds the fault suite: real processes of NATS, ClickHouse and the
// collector, killed, frozen, cut off and fed with poison under load. Afterwards
// every accepted event is stored exactly once and the rollups agree. The short
// form is part of the tests; scripts/chaos runs the long one
// (LATCHKEY_TEST_LONG=1).
package chaos
