package npm

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// maxUnpacked bounds what a tarball may grow to; the largest that we fetch
// holds 560 MB.
const maxUnpacked = 4 << 30

// extract unpacks the wanted files of a package tarball into dir. Names that
// would leave dir, and anything that is not a regular file, are passed over.
func (p Package) extract(tarball, dir string) error {
	f, err := os.Open(tarball)
	if err != nil {
		return err
	}
	defer f.Close()
	unzipped, err := gzip.NewReader(bufio.NewReaderSize(f, 1<<18))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()

	archive := tar.NewReader(io.LimitReader(unzipped, maxUnpacked))
	for {
		head, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		// Every npm tarball has one top folder; it is called "package", but not always.
		_, name, ok := strings.Cut(head.Name, "/")
		if !ok || head.Typeflag != tar.TypeReg || !p.wants(name) {
			continue
		}
		if err := writeFile(root, name, archive); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	if !p.complete(dir) {
		return fmt.Errorf("the package lacks one of the files %q", p.Files)
	}
	return nil
}

func writeFile(root *os.Root, name string, content io.Reader) error {
	if err := root.MkdirAll(filepath.Dir(filepath.FromSlash(name)), 0o755); err != nil {
		return err
	}
	f, err := root.OpenFile(filepath.FromSlash(name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	if _, err = io.Copy(f, content); err == nil {
		// A power cut after the rename must not leave a name without its bytes.
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
