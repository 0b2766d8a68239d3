-- +goose Up

-- These tables are small, and a row that comes twice replaces itself: the views
-- show the latest of each.
-- +goose StatementBegin
CREATE TABLE IF NOT EXISTS alerts_data
(
    id          String,
    time        DateTime64(9, 'UTC'),
    detected_at DateTime64(9, 'UTC'),
    org_id      LowCardinality(String),
    key_id      String,
    triggers    Array(LowCardinality(String)),
    severity    LowCardinality(String),
    score       Float64,
    summary     String,
    source_ip   IPv6,
    country     LowCardinality(String),
    asn         UInt32,
    as_name     String,
    user_agent  String,
    method      LowCardinality(String),
    route       String,
    evidence    Array(Tuple(trigger String, observed String, usual String, p_value Float64)),
    event_id    String,
    revision    UInt32,
    historical  Bool,
    document    String COMMENT 'the alert as JSON',
    ingested_at DateTime64(3, 'UTC')
)
ENGINE = ReplacingMergeTree(revision)
ORDER BY (org_id, key_id, id)
COMMENT 'what alerts reads';
-- +goose StatementEnd

-- +goose StatementBegin
CREATE VIEW IF NOT EXISTS alerts AS SELECT * FROM alerts_data FINAL;
-- +goose StatementEnd

-- The hash of a secret is part of the record in JetStream and never comes here.
-- +goose StatementBegin
CREATE TABLE IF NOT EXISTS api_keys_data
(
    id               String,
    org_id           LowCardinality(String),
    name             String,
    prefix           String,
    environment      LowCardinality(String),
    description      String,
    owner            String,
    scopes           Array(String),
    status           LowCardinality(String),
    revoke_reason    LowCardinality(String),
    allowed_cidrs    Array(String),
    created_at       DateTime64(3, 'UTC'),
    expires_at       Nullable(DateTime64(3, 'UTC')),
    last_rotated_at  Nullable(DateTime64(3, 'UTC')),
    revoked_at       Nullable(DateTime64(3, 'UTC')),
    parent_key_id    String,
    successor_key_id String,
    rotation_days    UInt32,
    metadata         Map(String, String),
    tags             Array(String),
    updated_at       DateTime64(3, 'UTC'),
    sequence         UInt64 COMMENT 'of the change in stream KEYS'
)
ENGINE = ReplacingMergeTree(sequence)
ORDER BY (org_id, id)
COMMENT 'what api_keys reads';
-- +goose StatementEnd

-- +goose StatementBegin
CREATE VIEW IF NOT EXISTS api_keys AS SELECT *, id AS key_id FROM api_keys_data FINAL;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE TABLE IF NOT EXISTS audit_log_data
(
    id       String,
    time     DateTime64(9, 'UTC'),
    type     LowCardinality(String),
    actor    String,
    actor_ip IPv6,
    org_id   LowCardinality(String),
    kind     LowCardinality(String) COMMENT 'api_key, org, webhook, …',
    subject  String COMMENT 'the id of what was changed',
    key_id   String COMMENT 'the subject, if it is a key',
    reason   String,
    before   String COMMENT 'JSON, empty for what is new',
    after    String COMMENT 'JSON',
    stream   LowCardinality(String),
    sequence UInt64
)
ENGINE = ReplacingMergeTree
ORDER BY (org_id, time, id)
COMMENT 'what audit_log reads';
-- +goose StatementEnd

-- +goose StatementBegin
CREATE VIEW IF NOT EXISTS audit_log AS SELECT * FROM audit_log_data FINAL;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE TABLE IF NOT EXISTS key_baselines_data
(
    key_id             String,
    org_id             LowCardinality(String),
    updated_at         DateTime64(9, 'UTC') COMMENT 'of the latest event learned from',
    partition          UInt16,
    sequence           UInt64,
    first_seen         DateTime64(9, 'UTC'),
    last_seen          DateTime64(9, 'UTC'),
    events             UInt64,
    maturity           Float64 COMMENT '0 knows nothing, 1 is settled',
    parent_key_id      String,
    networks           Array(Tuple(value String, share Float64)),
    asns               Array(Tuple(value String, share Float64)),
    countries          Array(Tuple(value String, share Float64)),
    routes             Array(Tuple(value String, share Float64)),
    hour_of_week       Array(Float64) COMMENT 'usual events in each hour of the week, from Monday 00:00 UTC',
    events_per_hour    Float64,
    gap_seconds_median Float64,
    gap_seconds_max    Float64,
    version            UInt64 COMMENT 'of the row: its place in stream BASELINES'
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (org_id, key_id)
COMMENT 'what key_baselines reads';
-- +goose StatementEnd

-- +goose StatementBegin
CREATE VIEW IF NOT EXISTS key_baselines AS SELECT * FROM key_baselines_data FINAL;
-- +goose StatementEnd

-- +goose Down
DROP VIEW IF EXISTS key_baselines;
DROP TABLE IF EXISTS key_baselines_data;
DROP VIEW IF EXISTS audit_log;
DROP TABLE IF EXISTS audit_log_data;
DROP VIEW IF EXISTS api_keys;
DROP TABLE IF EXISTS api_keys_data;
DROP VIEW IF EXISTS alerts;
DROP TABLE IF EXISTS alerts_data;
