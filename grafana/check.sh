#!/usr/bin/env bash
# Checks metrics, alerts and dashboards.
#
#   grafana/check.sh offline                                       only the files; no node is needed
#   grafana/check.sh live [NODE]… [arguments of check_live.py]     with running nodes and a separate Prometheus
#   grafana/check.sh [NODE]… [arguments of check_live.py]          both
#
# NODE is host:port (default: 127.0.0.1:9464). With several nodes, each panel must be filled by at least one of them;
# live.sh starts nodes that fill all panels.
#
# Needs promtool and python3 on PATH; offline also node 20 and npm, live also prometheus and curl (Debian: apt-get install
# prometheus curl python3). PORT is the port of that Prometheus (19090), WAIT_S the time in which the nodes must fill every
# panel (120): a panel of step durations has data only after a step. TOKEN_FILE names the file with the nodes' bearer
# token, if they require one.
set -euo pipefail

what=both
if [[ ${1:-} == offline || ${1:-} == live ]]; then
    what=$1
    shift
fi
nodes=()
while [[ $# -gt 0 && $1 != -* ]]; do
    nodes+=("$1")
    shift
done
[[ ${#nodes[@]} -gt 0 ]] || nodes=(127.0.0.1:9464)
port=${PORT:-19090}
wait_s=${WAIT_S:-120}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
url=http://127.0.0.1:$port

need() {
    for tool in "$@"; do
        command -v "$tool" >/dev/null || { echo "error: $tool is not on PATH: install it and try again" >&2; exit 2; }
    done
}

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

offline() {
    need promtool python3 node npm
    echo "== configuration and alerts"
    promtool check config "$here/prometheus.yml"
    promtool check rules "$here/alerts.yml"
    promtool test rules "$here/alerts_test.yml"

    echo "== names"
    # All metrics of the program, from its source.
    grep -hoE '"(preceptor|process)_[a-z0-9_]+"' "$here"/../src/observe/telemetry.rs "$here"/../src/observe/telemetry/*.rs |
        tr -d '"' | sort -u >"$scratch/names.txt"
    python3 "$here/check_live.py" --offline --names "$scratch/names.txt" --rules "$here/alerts.yml"
    python3 "$here/check/settings.py"

    echo "== dashboards against Grafana's schema"
    [[ -d $here/schema/node_modules ]] || npm ci --prefix "$here/schema" --no-audit --no-fund --silent
    node "$here/schema/check.mjs"
}

page() {
    curl --fail --silent --show-error --max-time 10 "${bearer[@]}" "http://$1/metrics"
}

pages() {
    for node in "${nodes[@]}"; do
        page "$node" || return 1
    done
}

live() {
    need prometheus promtool curl python3
    # The shipped file with these nodes as its targets, scraped every second so that rates have data soon.
    targets=$(printf '"%s", ' "${nodes[@]}")
    sed -e "s/\"127\.0\.0\.1:9464\"/${targets%, }/" -e 's/\(_interval:\) 5s/\1 1s/' \
        -e "s|^  - alerts.yml|  - $here/alerts.yml|" "$here/prometheus.yml" >"$scratch/prometheus.yml"
    bearer=()
    if [[ -n ${TOKEN_FILE:-} ]]; then
        token_file=$(realpath "$TOKEN_FILE")
        sed -i "s|^\( *\)- job_name: preceptor|&\n\1  authorization: { credentials_file: \"$token_file\" }|" "$scratch/prometheus.yml"
        # In a file, because other users of this machine can read arguments.
        printf 'Authorization: Bearer %s\n' "$(<"$token_file")" >"$scratch/header"
        bearer=(--header "@$scratch/header")
    fi
    promtool check config "$scratch/prometheus.yml" >/dev/null

    echo "== panels and alerts"
    prometheus --config.file="$scratch/prometheus.yml" --storage.tsdb.path="$scratch/data" \
        --web.listen-address="127.0.0.1:$port" --log.level=error 2>"$scratch/prometheus.log" &
    prometheus=$!

    deadline=$((SECONDS + wait_s))
    # A rate needs two samples; the query is empty until both exist.
    until curl --fail --silent --max-time 5 --get "$url/api/v1/query" \
        --data-urlencode "query=count(count_over_time(preceptor_build_info[1m]) >= 2) == ${#nodes[@]}" 2>/dev/null | grep -q '"value"'; do
        if ! kill -0 "$prometheus" 2>/dev/null; then
            echo "error: prometheus has exited; if port $port is in use, set PORT to another" >&2
            cat "$scratch/prometheus.log" >&2
            exit 2
        fi
        if ((SECONDS >= deadline)); then
            echo "error: ${nodes[*]} were not scraped twice within $wait_s s" >&2
            exit 2
        fi
        sleep 1
    done

    # The pages are read again each time, because some metrics appear only with the first step.
    until pages >"$scratch/metrics.txt" &&
        python3 "$here/check_live.py" "$url" --names "$scratch/metrics.txt" --rules "$here/alerts.yml" "$@" >"$scratch/report.txt" 2>&1; do
        if ((SECONDS >= deadline)); then
            cat "$scratch/report.txt" >&2
            exit 1
        fi
        sleep 2
    done
    cat "$scratch/report.txt"

    # The pages are checked last, when they also have the metrics that appear with the first step.
    for node in "${nodes[@]}"; do
        echo "== metrics of $node"
        page "$node" | promtool check metrics
    done
}

[[ $what == live ]] || offline
[[ $what == offline ]] || live "$@"
