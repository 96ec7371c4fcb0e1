#!/usr/bin/env bash
# Checks the files of deploy/ as far as this machine can; see --help.
set -uo pipefail

usage() {
    cat <<'EOF'
usage: deploy/check.sh [PRECEPTOR]

Checks the files of this folder without a container daemon and without a cluster, and lists what it skipped. PRECEPTOR is
the program (target/release/preceptor); with it the configurations are checked as well.

  YAML               all files are read                                  python3 with PyYAML
  Kubernetes         the overlays are built, and each object of          kubectl, kubernetes-validate
                     Kubernetes itself is compared with its schema       (pip install kubernetes-validate)
  NATS               the broker's configurations are read                nats-server
  compose            the file is resolved                                docker compose
  Dockerfiles        are checked by the builder                          docker with buildx
  systemd            units are verified                                  systemd-analyze
  Prometheus         the configuration is read                           promtool
  scripts            are parsed                                          bash, python3, shellcheck
  configurations     preceptor check                                     PRECEPTOR

Environment:
  CRDS    definitions of KEDA and of the Prometheus operator, separated by spaces: config/crd/bases/keda.sh_scaledobjects.yaml
          and example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml of their repositories

Exit status 1 if a check fails. A skipped check is not a failure.
EOF
}

case "${1:-}" in
    -h | --help) usage; exit ;;
esac
crds=()
for crd in ${CRDS:-}; do crds+=("$(realpath "$crd")"); done
cd "$(dirname "$0")" || exit
binary=$(realpath "${1:-../target/release/preceptor}" 2>/dev/null)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0 skipped=()
check() { # NAME COMMAND...
    local name=$1
    shift
    if "$@" >"$work/log" 2>&1; then
        echo "ok       $name"
    else
        echo "FAILED   $name"
        sed 's/^/         /' "$work/log"
        failed=1
    fi
}
skip() { skipped+=("$1: $2"); }
has() { command -v "$1" >/dev/null; }

if python3 -c 'import yaml' 2>/dev/null; then
    while IFS= read -r file; do
        check "$file" python3 -c 'import sys, yaml; list(yaml.safe_load_all(open(sys.argv[1])))' "$file"
    done < <(find . -name '*.yaml' -o -name '*.yml' | sort)
else
    skip "YAML" "python3 has no yaml"
fi

for kind in base overlays/http overlays/tls overlays/vllm overlays/vllm-workers; do
    if ! has kubectl; then
        skip "kubernetes/$kind" "kubectl is missing"
        continue
    fi
    check "kubernetes/$kind" sh -c 'kubectl kustomize "$1" >"$2"' sh "kubernetes/$kind" "$work/objects.yaml"
    if has kubernetes-validate; then
        check "kubernetes/$kind, schema" python3 check_objects.py "$work/objects.yaml" "${crds[@]}"
    else
        skip "kubernetes/$kind, schema" "kubernetes-validate is missing"
    fi
done
((${#crds[@]})) || skip "ScaledObject and PodMonitor" "CRDS does not name their definitions"

for file in compose/nats.conf kubernetes/base/nats.conf kubernetes/components/tls/nats.conf; do
    if ! has nats-server; then
        skip "$file" "nats-server is missing"
        continue
    fi
    if grep -q /tls/ "$file" && has openssl; then
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=nats \
            -keyout "$work/tls.key" -out "$work/tls.crt" 2>/dev/null
        cp "$work/tls.crt" "$work/ca.crt"
    fi
    sed "s#/tls/#$work/#; s#/data#$work#; s#\$NAME#nats-0#" "$file" >"$work/nats.conf"
    check "$file" nats-server -t -c "$work/nats.conf"
done

if has docker && docker compose version >/dev/null 2>&1; then
    check compose/compose.yml env PRECEPTOR_TOKEN=0123456789abcdef docker compose -f compose/compose.yml config --quiet
else
    skip compose/compose.yml "docker compose is missing: only read as YAML"
fi
if has docker && docker buildx version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then
    for file in docker/Dockerfile docker/Dockerfile.cuda; do
        check "$file" docker buildx build --check -f "$file" ..
    done
else
    skip "docker/Dockerfile, docker/Dockerfile.cuda" "no container daemon"
fi

for unit in systemd/*.service; do
    if ! has systemd-analyze; then
        skip "$unit" "systemd-analyze is missing"
        continue
    fi
    # The program may not be installed here.
    sed "s#/usr/local/bin/preceptor#/bin/true#" "$unit" >"$work/$(basename "$unit")"
    check "$unit" sh -c 'out=$(systemd-analyze verify "$1" 2>&1) && [ -z "$out" ] || { echo "$out"; exit 1; }' sh \
        "$work/$(basename "$unit")"
done

if has promtool; then
    cp compose/prometheus.yml ../grafana/alerts.yml "$work/"
    sed -i "s#/run/secrets/preceptor-token#$work/token#" "$work/prometheus.yml"
    echo 0123456789abcdef >"$work/token"
    check compose/prometheus.yml promtool check config "$work/prometheus.yml"
else
    skip compose/prometheus.yml "promtool is missing"
fi

for script in *.sh; do check "$script" bash -n "$script"; done
for script in *.py; do
    check "$script" python3 -c 'import ast, sys; ast.parse(open(sys.argv[1]).read())' "$script"
done
if has shellcheck; then check "scripts, shellcheck" shellcheck --severity=warning ./*.sh; else skip "scripts, shellcheck" "shellcheck is missing"; fi

for file in compose/run.toml kubernetes/base/run.toml; do
    if [ ! -x "$binary" ]; then
        skip "$file" "the program is missing; build it, or name it as argument"
        continue
    fi
    # In the image the data have another path.
    sed "s#/usr/share/preceptor/configs#$(realpath ../configs)#; s#\"/weights\"#\"$work/weights\"#" "$file" >"$work/run.toml"
    check "$file" env PRECEPTOR_TOKEN=0123456789abcdef "$binary" check "$work/run.toml"
done
skip kubernetes/overlays/vllm/run.toml "its model is on a hub, and its server in the cluster"
skip kubernetes/overlays/vllm-workers/run.toml "its model is on a hub"

if ((${#skipped[@]})); then
    echo
    echo "not checked here:"
    printf '  %s\n' "${skipped[@]}"
fi
exit $failed
