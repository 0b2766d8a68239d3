package engine

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// forgetLostParts repairs the deduplication logs of a database that was killed.
//
// For a MergeTree table the engine writes an insert's block id to the log first
// and makes its part visible after that. Killed in between, it knows the id of a
// part that does not exist: the insert was never answered, its sender repeats it
// with the same token, and the engine drops the rows as known. They would be
// lost. So before the engine starts, every id whose part is neither there nor
// merged into another is taken back, in the log's own form.
//
// It returns how many ids were taken back.
func forgetLostParts(db string) (int, error) {
	logs, err := filepath.Glob(filepath.Join(db, "store", "*", "*", "deduplication_logs"))
	if err != nil {
		return 0, err
	}
	forgotten := 0
	for _, dir := range logs {
		n, err := forgetInTable(dir)
		if err != nil {
			return forgotten, fmt.Errorf("repair deduplication log in %s: %w", dir, err)
		}
		forgotten += n
	}
	return forgotten, nil
}

func forgetInTable(dir string) (int, error) {
	files, err := logFiles(dir)
	if err != nil || len(files) == 0 {
		return 0, err
	}
	known := map[string]string{} // block id → part name
	for _, file := range files {
		if err := readDeduplicationLog(file, known); err != nil {
			return 0, err
		}
	}
	parts, err := readParts(filepath.Dir(dir))
	if err != nil {
		return 0, err
	}
	var lines []byte
	lost := 0
	for id, name := range known {
		p, ok := parsePart(name)
		if ok && !slices.ContainsFunc(parts, func(there part) bool { return there.contains(p) }) {
			lines = fmt.Appendf(lines, "2\t%s\t%s\n", name, id)
			lost++
		}
	}
	if lost == 0 {
		return 0, nil
	}
	f, err := os.OpenFile(files[len(files)-1], os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	_, err = f.Write(lines)
	return lost, errors.Join(err, f.Sync(), f.Close())
}

// logFiles are deduplication_log_N.txt in the order of N.
func logFiles(dir string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "deduplication_log_*.txt"))
	if err != nil {
		return nil, err
	}
	number := func(path string) int {
		base := strings.TrimSuffix(filepath.Base(path), ".txt")
		n, _ := strconv.Atoi(base[strings.LastIndexByte(base, '_')+1:])
		return n
	}
	slices.SortFunc(files, func(a, b string) int { return number(a) - number(b) })
	return files, nil
}

// readDeduplicationLog applies a log to known. A line is "1\tpart\tblock id" for
// an addition and "2\t…" for a removal (MergeTreeDeduplicationLog.cpp). A last
// line that was cut off by the end of the process is cut off the file as well.
func readDeduplicationLog(path string, known map[string]string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	whole := bytes.LastIndexByte(content, '\n') + 1
	if whole < len(content) {
		if err := os.Truncate(path, int64(whole)); err != nil {
			return err
		}
	}
	for line := range strings.Lines(string(content[:whole])) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), "\t", 3)
		if len(fields) != 3 {
			continue
		}
		if fields[0] == "1" {
			known[fields[2]] = fields[1]
		} else {
			delete(known, fields[2])
		}
	}
	return nil
}

// part is a MergeTree part by its name, "partition_min_max_level[_mutation]".
type part struct {
	partition string
	low, high int64 // block numbers
}

func parsePart(name string) (part, bool) {
	fields := strings.Split(name, "_")
	if len(fields) != 4 && len(fields) != 5 {
		return part{}, false
	}
	p := part{partition: fields[0]}
	var err1, err2 error
	p.low, err1 = strconv.ParseInt(fields[1], 10, 64)
	p.high, err2 = strconv.ParseInt(fields[2], 10, 64)
	return p, err1 == nil && err2 == nil && fields[0] != "tmp" && fields[0] != "delete"
}

func (p part) contains(other part) bool {
	return p.partition == other.partition && p.low <= other.low && p.high >= other.high
}

func readParts(table string) ([]part, error) {
	entries, err := os.ReadDir(table)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var parts []part
	for _, entry := range entries {
		if p, ok := parsePart(entry.Name()); ok && entry.IsDir() {
			parts = append(parts, p)
		}
	}
	return parts, nil
}
