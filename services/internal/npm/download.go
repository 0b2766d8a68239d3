package npm

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

const (
	attempts    = 4
	stallLimit  = 30 * time.Second // without one byte
	maxTarball  = 2 << 30
	maxMetadata = 8 << 20
)

// obtain puts the verified tarball at path. Our own download comes first
// because it shows progress and resumes; `npm pack` knows credentials and
// proxies that we do not, so it is what is left.
func (p Package) obtain(ctx context.Context, opts Options, path string) error {
	address, err := p.address(ctx, opts)
	if err == nil {
		opts.Log.Info("fetching", "package", p.Name, "version", p.Version)
		err = p.downloadRetrying(ctx, opts, address, path)
	}
	if err == nil || ctx.Err() != nil || errors.Is(err, ErrIntegrity) || errors.Is(err, exec.ErrNotFound) {
		return err
	}
	opts.Log.Warn("own download failed, trying `npm pack`", "package", p.Name, "error", err)
	if packErr := p.pack(ctx, path); packErr != nil {
		return errors.Join(err, packErr)
	}
	return nil
}

// address asks where the tarball lies.
func (p Package) address(ctx context.Context, opts Options) (string, error) {
	var dist struct {
		Tarball string `json:"tarball"`
	}
	if base := opts.registry(); base != "" {
		var manifest struct {
			Dist json.RawMessage `json:"dist"`
		}
		if err := getJSON(ctx, strings.TrimRight(base, "/")+"/"+p.Name+"/"+p.Version, &manifest); err != nil {
			return "", fmt.Errorf("ask the registry: %w", err)
		}
		if err := json.Unmarshal(manifest.Dist, &dist); err != nil {
			return "", fmt.Errorf("read the registry's answer: %w", err)
		}
	} else {
		out, err := runNPM(ctx, "", "view", p.spec(), "dist", "--json")
		if err != nil {
			return "", err
		}
		if err := json.Unmarshal(out, &dist); err != nil {
			return "", fmt.Errorf("read the answer of `npm view`: %w", err)
		}
	}
	u, err := url.Parse(dist.Tarball)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" {
		return "", fmt.Errorf("the registry named no usable tarball address: %q", dist.Tarball)
	}
	return dist.Tarball, nil
}

// runNPM runs the user's npm client and returns its standard output.
func runNPM(ctx context.Context, dir string, args ...string) ([]byte, error) {
	bin, err := exec.LookPath("npm")
	if err != nil {
		return nil, fmt.Errorf("find the npm client: %w", err)
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	cmd.WaitDelay = 2 * time.Second
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("run `npm %s`: %w: %s", args[0], err, firstErrors(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// firstErrors keeps the lines of npm's chatter that say what is wrong.
func firstErrors(stderr string) string {
	var kept []string
	for line := range strings.Lines(stderr) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "npm error") && len(kept) < 3 {
			kept = append(kept, strings.TrimPrefix(line, "npm error "))
		}
	}
	return strings.Join(kept, "; ")
}

func getJSON(ctx context.Context, address string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, stallLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("answered %s", res.Status)
	}
	return json.NewDecoder(io.LimitReader(res.Body, maxMetadata)).Decode(into)
}

func (p Package) downloadRetrying(ctx context.Context, opts Options, address, path string) error {
	var err error
	for n := range attempts {
		if n > 0 {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(time.Duration(n) * time.Second):
			}
		}
		if err = p.download(ctx, opts, address, path); err == nil || ctx.Err() != nil {
			return err
		}
		if status := (*statusError)(nil); errors.As(err, &status) && status.final() {
			return err
		}
		if errors.Is(err, ErrIntegrity) {
			// The bytes kept from an earlier run may be the bad ones: once more from the start.
			if rmErr := os.Remove(path); rmErr != nil || n > 0 {
				return errors.Join(err, rmErr)
			}
		}
		opts.Log.Warn("download interrupted", "package", p.Name, "attempt", n+1, "error", err)
	}
	return err
}

type statusError struct{ status int }

func (e *statusError) Error() string {
	return fmt.Sprintf("answered %d %s", e.status, http.StatusText(e.status))
}

func (e *statusError) final() bool {
	return e.status >= 400 && e.status < 500 && e.status != http.StatusTooManyRequests &&
		e.status != http.StatusRequestTimeout && e.status != http.StatusRequestedRangeNotSatisfiable
}

// download fetches the tarball to path, appending to what an earlier attempt
// left there, and checks its hash, which is computed as the bytes pass.
func (p Package) download(ctx context.Context, opts Options, address, path string) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	sum := sha512.New()
	have, err := io.Copy(sum, f)
	if err != nil {
		return fmt.Errorf("read the partial download: %w", err)
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	res, err := get(ctx, address, have)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	switch {
	case res.StatusCode == http.StatusPartialContent && have > 0:
	case res.StatusCode == http.StatusOK:
		if have, err = 0, rewind(f, sum); err != nil {
			return err
		}
	case res.StatusCode == http.StatusRequestedRangeNotSatisfiable && p.matches(sum):
		return nil // the earlier attempt had all of it
	case res.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		return errors.Join(&statusError{res.StatusCode}, rewind(f, sum))
	default:
		return &statusError{res.StatusCode}
	}

	total := int64(0)
	if res.ContentLength > 0 {
		total = have + res.ContentLength
	}
	stall := time.AfterFunc(stallLimit, func() { cancel(errors.New("no data for " + stallLimit.String())) })
	defer stall.Stop()
	meter := writerFunc(func(b []byte) (int, error) {
		stall.Reset(stallLimit)
		if have += int64(len(b)); have > maxTarball {
			return 0, errors.New("tarball is unreasonably large")
		}
		opts.Progress(have, total)
		return len(b), nil
	})
	if _, err := io.CopyBuffer(io.MultiWriter(f, sum, meter), res.Body, make([]byte, 1<<18)); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("download: %w", err)
	}
	return p.check(sum)
}

func get(ctx context.Context, address string, from int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	// Without this Go unpacks a Content-Encoding on its own, and ranges would count other bytes.
	req.Header.Set("Accept-Encoding", "identity")
	if from > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("download: %w", err)
	}
	return res, nil
}

func rewind(f *os.File, sum hash.Hash) error {
	sum.Reset()
	_, err := f.Seek(0, io.SeekStart)
	return errors.Join(err, f.Truncate(0))
}

type writerFunc func([]byte) (int, error)

func (w writerFunc) Write(b []byte) (int, error) { return w(b) }

func (p Package) matches(sum hash.Hash) bool {
	return "sha512-"+base64.StdEncoding.EncodeToString(sum.Sum(nil)) == p.Integrity
}

func (p Package) check(sum hash.Hash) error {
	if !p.matches(sum) {
		return fmt.Errorf("%w: sha512 of the tarball is %s, pinned is %s", ErrIntegrity,
			base64.StdEncoding.EncodeToString(sum.Sum(nil)), strings.TrimPrefix(p.Integrity, "sha512-"))
	}
	return nil
}

// pack lets the npm client fetch the tarball and checks it afterwards.
func (p Package) pack(ctx context.Context, path string) error {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".pack-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if _, err := runNPM(ctx, dir, "pack", p.spec(), "--silent"); err != nil {
		return err
	}
	found, err := filepath.Glob(filepath.Join(dir, "*.tgz"))
	if err != nil || len(found) != 1 {
		return errors.Join(errors.New("`npm pack` left no tarball"), err)
	}
	f, err := os.Open(found[0])
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha512.New()
	if _, err := io.Copy(sum, f); err != nil {
		return fmt.Errorf("read tarball: %w", err)
	}
	if err := p.check(sum); err != nil {
		return err
	}
	return os.Rename(found[0], path)
}
