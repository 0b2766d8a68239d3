# What the scripts share.

need() { # need COMMAND HINT
  command -v "$1" >/dev/null || { echo "$1 is missing: $2" >&2; exit 1; }
}

# with_heartbeat NAME COMMAND…: runs the command, with a line every ten seconds
# so that nobody wonders whether it still runs.
with_heartbeat() {
  local name=$1 start=$SECONDS next=$((SECONDS + 10)) pid
  shift
  "$@" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.1
    if ((SECONDS >= next)); then
      echo "$name … $((SECONDS - start)) s" >&2
      next=$((SECONDS + 10))
    fi
  done
  wait "$pid"
}

# build_latchkey builds bin/latchkey; no C compiler is needed.
build_latchkey() {
  need go "install Go 1.26 or later"
  mkdir -p bin
  CGO_ENABLED=0 with_heartbeat "Building latchkey (a few minutes the first time)" go build -o bin/latchkey ./services/latchkey
}
