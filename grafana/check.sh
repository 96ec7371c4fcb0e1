#!/usr/bin/env bash
# Checks metrics and dashboards against a running node, with a Prometheus of its own that lives as long as the check.
#
#   grafana/check.sh [NODE] [arguments of check_live.py]      NODE is host:port, 127.0.0.1:9464 when left out
#
# Needs prometheus, promtool, curl and python3 on PATH (Debian: apt-get install prometheus curl python3).
# PORT is where that Prometheus listens (19090), WAIT_S how long the node may take to fill every panel (120): a panel
# of step durations has data only after a step. TOKEN_FILE names the file that holds the node's bearer token, where it
# asks for one.
set -euo pipefail

node=127.0.0.1:9464
if [[ $# -gt 0 && $1 != -* ]]; then
    node=$1
    shift
fi
port=${PORT:-19090}
wait_s=${WAIT_S:-120}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
url=http://127.0.0.1:$port

for tool in prometheus promtool curl python3; do
    command -v "$tool" >/dev/null || { echo "error: $tool is not on PATH: install it and try again" >&2; exit 2; }
done

scratch=$(mktemp -d)
prometheus=
clean() {
    if [[ -n $prometheus ]]; then
        kill "$prometheus" 2>/dev/null || true
        wait "$prometheus" 2>/dev/null || true
    fi
    rm -rf "$scratch"
}
trap clean EXIT

echo "== configuration"
# The shipped file with this node as its target, scraped each second so that rates are there soon.
sed -e "s/127\.0\.0\.1:9464/$node/" -e 's/\(_interval:\) 5s/\1 1s/' "$here/prometheus.yml" >"$scratch/prometheus.yml"
bearer=()
if [[ -n ${TOKEN_FILE:-} ]]; then
    token_file=$(realpath "$TOKEN_FILE")
    sed -i "s|^\( *\)- job_name: preceptor|&\n\1  authorization: { credentials_file: \"$token_file\" }|" "$scratch/prometheus.yml"
    # Not as an argument, which other users of this machine could read.
    printf 'Authorization: Bearer %s\n' "$(<"$token_file")" >"$scratch/header"
    bearer=(--header "@$scratch/header")
fi
promtool check config "$here/prometheus.yml"
promtool check config "$scratch/prometheus.yml" >/dev/null

echo "== metrics of $node"
curl --fail --silent --show-error --max-time 10 "${bearer[@]}" "http://$node/metrics" >"$scratch/metrics.txt"
promtool check metrics <"$scratch/metrics.txt"

echo "== panels"
prometheus --config.file="$scratch/prometheus.yml" --storage.tsdb.path="$scratch/data" \
    --web.listen-address="127.0.0.1:$port" --log.level=error 2>"$scratch/prometheus.log" &
prometheus=$!

deadline=$((SECONDS + wait_s))
# A rate needs two samples; the query is empty until both are in.
until curl --fail --silent --max-time 5 --get "$url/api/v1/query" \
    --data-urlencode 'query=count_over_time(preceptor_build_info[1m]) >= 2' 2>/dev/null | grep -q '"metric"'; do
    if ! kill -0 "$prometheus" 2>/dev/null; then
        echo "error: prometheus ended; is port $port taken? set PORT to another" >&2
        cat "$scratch/prometheus.log" >&2
        exit 2
    fi
    if ((SECONDS >= deadline)); then
        echo "error: $node was not scraped twice within $wait_s s" >&2
        exit 2
    fi
    sleep 1
done

# The page as it stands now: metrics that appear with the first step are on it too.
until curl --fail --silent --show-error --max-time 10 "${bearer[@]}" "http://$node/metrics" >"$scratch/metrics.txt" &&
    python3 "$here/check_live.py" "$url" --names "$scratch/metrics.txt" "$@" >"$scratch/report.txt" 2>&1; do
    if ((SECONDS >= deadline)); then
        cat "$scratch/report.txt" >&2
        exit 1
    fi
    sleep 2
done
cat "$scratch/report.txt"
