// Package clickhouse holds the migrations of the ClickHouse database, in the
// form of goose: NNNN_name.sql. What is released is never edited; a change is a
// new file.
package clickhouse

import "embed"

// Migrations holds the *.sql files.
//
//go:embed *.sql
var Migrations embed.FS
