//go:build !unix

package npm

import "context"

// lock does nothing where there is no flock: two processes may then fetch the
// same package twice, and the later rename fails with a clear error.
func lock(context.Context, string, func()) (unlock func(), err error) {
	return func() {}, nil
}
