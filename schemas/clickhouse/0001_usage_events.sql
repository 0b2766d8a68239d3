-- +goose Up

-- One row an event. stream, partition, sequence and index say where in JetStream
-- it lay: for audit, and so that a collector that takes a partition over can
-- tell what its predecessor stored. ingested_at is when JetStream accepted it.
-- Both deduplication windows are set: the first counts for MergeTree and is off
-- by default, the second for ReplicatedMergeTree and would end after an hour.
-- +goose StatementBegin
CREATE TABLE IF NOT EXISTS usage_events
(
    id             String CODEC(ZSTD(1)),
    time           DateTime64(9, 'UTC') CODEC(Delta, ZSTD(1)),
    org_id         LowCardinality(String),
    key_id         LowCardinality(String),
    source_ip      IPv6 CODEC(ZSTD(1)),
    method         LowCardinality(String),
    route          LowCardinality(String),
    status         UInt16,
    scope          LowCardinality(String),
    decision       LowCardinality(String),
    deny_reason    LowCardinality(String),
    user_agent     LowCardinality(String),
    latency_us     UInt32 CODEC(ZSTD(1)),
    request_bytes  UInt64 CODEC(ZSTD(1)),
    response_bytes UInt64 CODEC(ZSTD(1)),
    gateway        LowCardinality(String),
    history        Bool COMMENT 'imported, not live',
    ingested_at    DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    stream         LowCardinality(String),
    partition      UInt16,
    sequence       UInt64 CODEC(Delta, ZSTD(1)),
    `index`        UInt32 CODEC(Delta, ZSTD(1)),
    INDEX sequence_range sequence TYPE minmax GRANULARITY 4,
    INDEX ingested_range ingested_at TYPE minmax GRANULARITY 4
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(time)
ORDER BY (org_id, key_id, time)
SETTINGS non_replicated_deduplication_window = 20000,
    replicated_deduplication_window = 20000,
    replicated_deduplication_window_seconds = 604800
COMMENT 'API requests, one row each';
-- +goose StatementEnd

-- +goose Down
DROP TABLE IF EXISTS usage_events;
