package ingest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// Stdin is the name of standard input among files.
const Stdin = "-"

// Expand turns files, folders and glob patterns into files, each once, in the
// order given and by name within a folder or a pattern. A pattern that matches
// nothing is an error, and so is a file that is missing.
func Expand(args []string) ([]string, error) {
	var files []string
	seen := map[string]bool{}
	add := func(path string) {
		if !seen[path] {
			seen[path] = true
			files = append(files, path)
		}
	}
	for _, arg := range args {
		if arg == Stdin {
			add(arg)
			continue
		}
		paths := []string{arg}
		if _, err := os.Stat(arg); err != nil {
			matches, globErr := filepath.Glob(arg)
			if globErr != nil || len(matches) == 0 {
				return nil, fmt.Errorf("find files: %w", errors.Join(err, globErr))
			}
			slices.Sort(matches)
			paths = matches
		}
		for _, path := range paths {
			err := filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
				if err == nil && !entry.IsDir() {
					add(path)
				}
				return err
			})
			if err != nil {
				return nil, fmt.Errorf("find files: %w", err)
			}
		}
	}
	return files, nil
}

// Size is the size of all files in bytes, -1 if one of them has none.
func Size(files []string) int64 {
	var total int64
	for _, path := range files {
		info, err := os.Stat(path)
		if path == Stdin || err != nil || !info.Mode().IsRegular() {
			return -1
		}
		total += info.Size()
	}
	return total
}

// OpenFile opens a file, or standard input.
func OpenFile(path string) (io.ReadCloser, error) {
	if path == Stdin {
		return io.NopCloser(os.Stdin), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	return f, nil
}
