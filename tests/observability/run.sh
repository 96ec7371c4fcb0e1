#!/usr/bin/env bash
# Checks the observability of real runs: Prometheus with rules and dashboards, the live page in a browser, TensorBoard.
#
#   tests/observability/run.sh PRECEPTOR      PRECEPTOR is the program, such as target/release/preceptor
#
# Needs prometheus, promtool, chromium and curl (Debian packages), Node.js with npm, and Python 3 with venv. Takes some
# minutes.
set -euo pipefail
program=$(realpath "$1")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
scratch=$(mktemp -d)
node=
clean() {
    [[ -z $node ]] || kill "$node" 2>/dev/null || true
    rm -rf "$scratch"
}
trap clean EXIT

echo "== Prometheus and Grafana: files"
grafana/check.sh offline
echo "== Prometheus: a live node"
grafana/check/live.sh "$program"

echo "== the live page, on simulated nodes"
npm --prefix tests/page ci --silent --no-audit --no-fund
node tests/page/check.mjs

echo "== the live page, on a real node"
port=$((20000 + RANDOM % 10000))
"$program" train configs/offline.toml --run-dir "$scratch/run" --set run.steps=100000 \
    --set "serve.listen=127.0.0.1:$port" 2>"$scratch/node.log" &
node=$!
until curl --fail --silent "http://127.0.0.1:$port/readyz" >/dev/null; do
    kill -0 "$node" || { cat "$scratch/node.log" >&2; exit 1; }
    sleep 0.2
done
node tests/page/check.mjs "http://127.0.0.1:$port"
"$program" top --once "http://127.0.0.1:$port"

echo "== metrics.jsonl and events of an interrupted and resumed run"
kill -INT "$node"
status=0
wait "$node" || status=$?
((status == 130)) || { echo "an interrupted run ended with status $status" >&2; exit 1; }
node=
python3 -m venv "$scratch/python"
"$scratch/python/bin/pip" install --quiet --disable-pip-version-check tensorboard==2.20.0
"$scratch/python/bin/python" tests/observability/read_events.py "$scratch/run"
steps=$(wc -l <"$scratch/run/metrics.jsonl")
"$program" train configs/offline.toml --run-dir "$scratch/run" --resume --set "run.steps=$((steps + 5))" \
    --set serve.enabled=false 2>>"$scratch/node.log"
"$scratch/python/bin/python" tests/observability/read_events.py "$scratch/run"
