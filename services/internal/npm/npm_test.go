package npm

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// registry is a small npm registry that holds one package and can be told to
// cut answers short.
type registry struct {
	*httptest.Server
	tarball   []byte
	downloads atomic.Int32
	cut       atomic.Int32 // how many more answers break off in the middle
}

func newRegistry(t *testing.T, files map[string][]byte) (*registry, Package) {
	t.Helper()
	r := &registry{tarball: pack(t, files)}
	r.Server = httptest.NewServer(http.HandlerFunc(r.serve))
	t.Cleanup(r.Close)
	sum := sha512.Sum512(r.tarball)
	return r, Package{
		Name: "@latchkey/sample", Version: "1.2.3",
		Integrity: "sha512-" + base64.StdEncoding.EncodeToString(sum[:]),
	}
}

func (r *registry) serve(w http.ResponseWriter, req *http.Request) {
	switch req.URL.Path {
	case "/@latchkey/sample/1.2.3":
		_ = json.NewEncoder(w).Encode(map[string]any{"dist": map[string]string{"tarball": r.URL + "/t.tgz"}})
	case "/t.tgz":
		r.downloads.Add(1)
		body, status, from := r.tarball, http.StatusOK, 0
		if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-", &from); err == nil {
			if from >= len(body) {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return
			}
			body, status = body[from:], http.StatusPartialContent
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		w.WriteHeader(status)
		if r.cut.Add(-1) >= 0 {
			_, _ = w.Write(body[:len(body)/2])
			panic(http.ErrAbortHandler)
		}
		_, _ = w.Write(body)
	default:
		http.NotFound(w, req)
	}
}

func (r *registry) options(t *testing.T) Options {
	return Options{Config: Config{CacheDir: t.TempDir(), Registry: r.URL}}
}

func pack(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	zipped := gzip.NewWriter(&buf)
	archive := tar.NewWriter(zipped)
	for name, content := range files {
		if err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := archive.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(archive.Close(), zipped.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func noise(n int) []byte {
	b := make([]byte, n)
	src := rand.NewChaCha8([32]byte{1})
	_, _ = src.Read(b)
	return b
}

func TestFetchKeepsWantedFilesAndShowsProgress(t *testing.T) {
	t.Parallel()
	data := noise(1 << 20)
	r, p := newRegistry(t, map[string][]byte{
		"package/data/big.bin": data, "package/other": []byte("unwanted"),
		"package/../../escape": []byte("x"), "../escape": []byte("x"),
	})
	p.Files = []string{"data/big.bin"}
	opts := r.options(t)
	var done, total int64
	opts.Progress = func(d, n int64) { done, total = d, n }

	if p.Cached(opts) {
		t.Fatal("an empty cache claims to hold the package")
	}
	dir, err := p.Fetch(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "data", "big.bin"))
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read back: %v, equal %v", err, bytes.Equal(got, data))
	}
	if done != int64(len(r.tarball)) || total != done {
		t.Errorf("progress ended at %d of %d, want %d", done, total, len(r.tarball))
	}
	for _, gone := range []string{filepath.Join(dir, "other"), filepath.Join(dir, "..", "escape"), dir + ".tgz.part", dir + ".staging"} {
		if _, err := os.Stat(gone); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v, want it not to exist", gone, err)
		}
	}

	r.Close() // the cached package needs nobody
	if again, err := p.Fetch(t.Context(), opts); err != nil || again != dir {
		t.Errorf("second fetch: %q, %v", again, err)
	}
}

func TestFetchRefusesNamesThatLeaveTheDirectory(t *testing.T) {
	t.Parallel()
	r, p := newRegistry(t, map[string][]byte{"package/../../../escape": []byte("x"), "package//etc/x": []byte("x"), "package/ok": []byte("y")})
	opts := r.options(t)
	dir, err := p.Fetch(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "ok" {
		t.Fatalf("unpacked %v, %v, want only ok", entries, err)
	}
}

func TestFetchResumes(t *testing.T) {
	t.Parallel()
	r, p := newRegistry(t, map[string][]byte{"package/f": noise(1 << 20)})
	r.cut.Store(1)
	if _, err := p.Fetch(t.Context(), r.options(t)); err != nil {
		t.Fatal(err)
	}
	if n := r.downloads.Load(); n != 2 {
		t.Errorf("%d requests, want 2", n)
	}
}

func TestFetchReplacesACorruptPartialDownload(t *testing.T) {
	t.Parallel()
	r, p := newRegistry(t, map[string][]byte{"package/f": noise(1 << 16)})
	opts := r.options(t)
	dir, err := p.Dir(opts)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+".tgz.part", []byte("not what was sent"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Fetch(t.Context(), opts); err != nil {
		t.Fatal(err)
	}
}

func TestFetchRefusesOtherBytes(t *testing.T) {
	t.Parallel()
	r, p := newRegistry(t, map[string][]byte{"package/f": []byte("x")})
	sum := sha512.Sum512([]byte("something else"))
	p.Integrity = "sha512-" + base64.StdEncoding.EncodeToString(sum[:])
	opts := r.options(t)
	_, err := p.Fetch(t.Context(), opts)
	var fetchErr *FetchError
	if !errors.Is(err, ErrIntegrity) || !errors.As(err, &fetchErr) {
		t.Fatalf("got %v, want an integrity error", err)
	}
	if !strings.Contains(err.Error(), "npm pack @latchkey/sample@1.2.3") {
		t.Errorf("the error does not say what to do: %v", err)
	}
	if p.Cached(opts) {
		t.Error("refused bytes are in the cache")
	}
}

func TestFetchOnceForMany(t *testing.T) {
	t.Parallel()
	r, p := newRegistry(t, map[string][]byte{"package/f": noise(1 << 18)})
	opts := r.options(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := p.Fetch(t.Context(), opts); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := r.downloads.Load(); n != 1 {
		t.Errorf("%d downloads, want 1", n)
	}
}

func TestFetchNamesWhatIsWrong(t *testing.T) {
	t.Parallel()
	for _, p := range []Package{{}, {Name: "x", Version: "1"}, {Name: "-x", Version: "1", Integrity: "sha512-x"}, {Name: "x", Version: "1", Integrity: "sha1-x"}} {
		if _, err := p.Fetch(t.Context(), Options{}); err == nil {
			t.Errorf("%+v: no error", p)
		}
	}
}
