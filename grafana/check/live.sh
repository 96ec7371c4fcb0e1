#!/usr/bin/env bash
# Fills every panel and reports those that stay empty: starts a judge, three tiny nodes and a Prometheus, checks, and stops
# all of them.
#
#   grafana/check/live.sh PRECEPTOR_BINARY [arguments of check_live.py]
#
# One node distills a judge's ratings into a reward model, one is trained on pairs that the judge compares, one asks a
# panel. The judge is judge.py, which sometimes fails or answers late and has an outage of some seconds, so that the panels
# of retries, hedges, failures and outages have data. Needs the programs of check.sh live, and takes a minute or two on two
# cores (at most WAIT_S, 110). Exit status as of check.sh. With KEEP=1 the nodes' logs are kept, and their folder is printed.
set -euo pipefail

binary=$(realpath "${1:?usage: grafana/check/live.sh PRECEPTOR_BINARY, such as target/release/preceptor}")
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scratch=$(mktemp -d)
started=()
clean() {
    for pid in "${started[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
    sleep 0.5
    for pid in "${started[@]}"; do
        kill -9 "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    if [[ -n ${KEEP:-} ]]; then echo "logs: $scratch"; else rm -rf "$scratch"; fi
}
trap clean EXIT

# Four free ports below the range of ephemeral ports, which the system could assign to a connection before the node listens.
free_ports() {
    python3 -c 'import random, socket
held = []
while len(held) < 4:
    try:
        held.append(socket.create_server(("127.0.0.1", random.randrange(20000, 32000))))
    except OSError:
        pass
print(*(one.getsockname()[1] for one in held))'
}

python3 "$here/judge.py" --outage-after 60 --outage-s 4 >"$scratch/judge.txt" 2>"$scratch/judge.log" &
started+=($!)
until judge=$(head -n 1 "$scratch/judge.txt" 2>/dev/null) && [[ -n $judge ]]; do
    kill -0 "${started[0]}" 2>/dev/null || { cat "$scratch/judge.log" >&2; exit 2; }
    sleep 0.1
done
# Short times, so that hedges, retries and an open breaker occur within seconds; prices, so that there is a cost.
remote="{ url = \"$judge\", model = \"check\", concurrency = 4, requests_per_minute = 600, retries = 1, backoff_s = 0.1, \
hedge_after_s = 0.2, breaker_failures = 5, breaker_cooldown_s = 1, price_prompt = 1.0, price_completion = 2.0 }"

read -r first second third port < <(free_ports)
node() {
    local name=$1 at=$2
    shift 2
    nice -n 10 "$binary" train "$here/node.toml" --run-dir "$scratch/$name" \
        --set "serve.listen=127.0.0.1:$at" --set "labeler.cache=$scratch/labels-$name" "$@" >"$scratch/$name.log" 2>&1 &
    started+=($!)
}
node distilled "$first" --set run.mode=distilled --set labeler.type=direct --set "labeler.remote=$remote"
node pairs "$second" --set run.mode=preference --set learner.algorithm=online-dpo --set sft.steps=4 \
    --set labeler.type=pairwise --set "labeler.remote=$remote"
node panel "$third" --set learner.algorithm=ppo --set labeler.type=panel \
    --set "labeler.members=[{ type = \"pairwise\", remote = $remote }, { type = \"likelihood\" }]"

deadline=$((SECONDS + 30))
for at in "$first" "$second" "$third"; do
    until curl --fail --silent --max-time 5 "http://127.0.0.1:$at/metrics" >"$scratch/page" && [[ -s $scratch/page ]]; do
        if ((SECONDS >= deadline)); then
            echo "error: no node answers on port $at; the logs:" >&2
            tail -n 20 "$scratch"/*.log >&2
            exit 2
        fi
        sleep 0.5
    done
done

status=0
PORT=$port WAIT_S=${WAIT_S:-110} "$here/../check.sh" live "127.0.0.1:$first" "127.0.0.1:$second" "127.0.0.1:$third" "$@" || status=$?
if ((status)); then
    echo "the ends of the nodes' logs:" >&2
    tail -n 3 "$scratch"/{distilled,pairs,panel}.log >&2
fi
exit "$status"
