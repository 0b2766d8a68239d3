-- +goose Up

-- Hours by key. Sums of sums are the same, so the view below is exact whatever
-- has been merged so far. The targets keep deduplication windows of their own:
-- a block that is inserted again is recognized in each of them.
-- +goose StatementBegin
CREATE TABLE IF NOT EXISTS usage_hourly_data
(
    org_id          LowCardinality(String),
    key_id          LowCardinality(String),
    hour            DateTime('UTC'),
    events          SimpleAggregateFunction(sum, UInt64),
    denied          SimpleAggregateFunction(sum, UInt64),
    client_errors   SimpleAggregateFunction(sum, UInt64),
    server_errors   SimpleAggregateFunction(sum, UInt64),
    request_bytes   SimpleAggregateFunction(sum, UInt64),
    response_bytes  SimpleAggregateFunction(sum, UInt64),
    latency_us_sum  SimpleAggregateFunction(sum, UInt64),
    latency_us_max  SimpleAggregateFunction(max, UInt32),
    source_ips      AggregateFunction(uniq, IPv6),
    routes          AggregateFunction(uniq, LowCardinality(String))
)
ENGINE = AggregatingMergeTree
PARTITION BY toYYYYMM(hour)
ORDER BY (org_id, key_id, hour)
SETTINGS non_replicated_deduplication_window = 20000,
    replicated_deduplication_window = 20000,
    replicated_deduplication_window_seconds = 604800
COMMENT 'what usage_hourly reads';
-- +goose StatementEnd

-- +goose StatementBegin
CREATE MATERIALIZED VIEW IF NOT EXISTS usage_hourly_feed TO usage_hourly_data AS
SELECT
    org_id,
    key_id,
    toStartOfHour(toDateTime(time, 'UTC')) AS hour,
    count() AS events,
    countIf(decision = 'deny') AS denied,
    countIf(status >= 400 AND status < 500) AS client_errors,
    countIf(status >= 500) AS server_errors,
    sum(usage_events.request_bytes) AS request_bytes,
    sum(usage_events.response_bytes) AS response_bytes,
    sum(latency_us) AS latency_us_sum,
    max(latency_us) AS latency_us_max,
    uniqState(source_ip) AS source_ips,
    uniqState(route) AS routes
FROM usage_events
GROUP BY org_id, key_id, hour;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE VIEW IF NOT EXISTS usage_hourly AS
SELECT
    org_id,
    key_id,
    d.hour AS hour,
    toDateTime64(d.hour, 9, 'UTC') AS time,
    sum(d.events) AS events,
    sum(d.denied) AS denied,
    sum(d.client_errors) AS client_errors,
    sum(d.server_errors) AS server_errors,
    sum(d.request_bytes) AS request_bytes,
    sum(d.response_bytes) AS response_bytes,
    sum(d.latency_us_sum) / sum(d.events) AS latency_us_mean,
    max(d.latency_us_max) AS latency_us_max,
    uniqMerge(d.source_ips) AS source_ips,
    uniqMerge(d.routes) AS routes
FROM usage_hourly_data AS d
GROUP BY org_id, key_id, d.hour;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE TABLE IF NOT EXISTS key_last_used_data
(
    org_id          LowCardinality(String),
    key_id          LowCardinality(String),
    first_used_at   SimpleAggregateFunction(min, DateTime64(9, 'UTC')),
    last_used_at    SimpleAggregateFunction(max, DateTime64(9, 'UTC')),
    events          SimpleAggregateFunction(sum, UInt64),
    last_source_ip  AggregateFunction(argMax, IPv6, DateTime64(9, 'UTC')),
    last_route      AggregateFunction(argMax, String, DateTime64(9, 'UTC')),
    last_user_agent AggregateFunction(argMax, String, DateTime64(9, 'UTC'))
)
ENGINE = AggregatingMergeTree
ORDER BY (org_id, key_id)
SETTINGS non_replicated_deduplication_window = 20000,
    replicated_deduplication_window = 20000,
    replicated_deduplication_window_seconds = 604800
COMMENT 'what key_last_used reads';
-- +goose StatementEnd

-- +goose StatementBegin
CREATE MATERIALIZED VIEW IF NOT EXISTS key_last_used_feed TO key_last_used_data AS
SELECT
    org_id,
    key_id,
    min(time) AS first_used_at,
    max(time) AS last_used_at,
    count() AS events,
    argMaxState(source_ip, time) AS last_source_ip,
    argMaxState(toString(route), time) AS last_route,
    argMaxState(toString(user_agent), time) AS last_user_agent
FROM usage_events
GROUP BY org_id, key_id;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE VIEW IF NOT EXISTS key_last_used AS
SELECT
    org_id,
    key_id,
    min(d.first_used_at) AS first_used_at,
    max(d.last_used_at) AS last_used_at,
    max(d.last_used_at) AS time,
    sum(d.events) AS events,
    argMaxMerge(d.last_source_ip) AS source_ip,
    argMaxMerge(d.last_route) AS route,
    argMaxMerge(d.last_user_agent) AS user_agent
FROM key_last_used_data AS d
GROUP BY org_id, key_id;
-- +goose StatementEnd

-- +goose Down
DROP VIEW IF EXISTS key_last_used;
DROP VIEW IF EXISTS key_last_used_feed;
DROP TABLE IF EXISTS key_last_used_data;
DROP VIEW IF EXISTS usage_hourly;
DROP VIEW IF EXISTS usage_hourly_feed;
DROP TABLE IF EXISTS usage_hourly_data;
