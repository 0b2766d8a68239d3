package npm

import "github.com/latchkey-dev/latchkey/services/internal/progress"

// showProgress draws a bar on stderr from the first bytes on; finish may be
// called without any having come.
func showProgress(name string) (show func(done, total int64), finish func()) {
	var bar *progress.Bar
	show = func(done, total int64) {
		if bar == nil {
			if total <= 0 {
				total = -1
			}
			bar = progress.Start(name, total, progress.Bytes)
		}
		bar.Set(done)
	}
	return show, func() {
		if bar != nil {
			bar.Finish()
		}
	}
}
