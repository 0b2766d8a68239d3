// Package usage publishes usage events to JetStream: what a gateway imports to
// tell Latchkey of every request made with a key.
//
// Events of one partition travel together in frames, for JetStream's cost is by
// the message. Each frame has a message id and each event an id, so sending
// again after a doubt is harmless.
//
// [Publisher.Enqueue] is for the request path: it never waits and does not
// allocate. [Publisher.Publish] returns once JetStream has stored the events.
package usage
