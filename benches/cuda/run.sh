#!/usr/bin/env bash
# Tests and measures the output of benches/cuda/build.sh on a machine with a GPU; see --help.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: benches/cuda/run.sh [BUNDLE]

Runs the device tests, a short training run and the device bench of BUNDLE (default: target/cuda/bundle, unpacked from
bundle.tar.gz if necessary) on the first GPU. Needs the driver of CUDA 13.0 or newer, but not Rust. CUDA's libraries are
taken from BUNDLE/lib, or else from CUDA_HOME, /usr/local/cuda or Python's nvidia-* packages.

Environment:
  PEAK_F32, PEAK_BF16   peak performance of the device in TFLOP/s, dense; default: H100 SXM (67 and 989)
  SECONDS_EACH          minimum seconds of each measurement (5)
EOF
}

case "${1:-}" in
    -h | --help) usage; exit ;;
    -*) usage >&2; exit 2 ;;
esac

given=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/../.."
bundle=${given:-target/cuda/bundle}
if [ -z "$given" ] && [ ! -d "$bundle" ] && [ -e "$bundle.tar.gz" ]; then tar -C target/cuda -xzf "$bundle.tar.gz"; fi
if [ ! -x "$bundle/suite" ]; then
    echo "error: $bundle has no binaries; build them with benches/cuda/build.sh" >&2
    exit 1
fi
bundle=$(cd "$bundle" && pwd)

wheels=$(python3 -c 'import nvidia; print(*nvidia.__path__, sep="\n")' 2>/dev/null || true)
path=$bundle/lib
for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/cuda/lib64 ${wheels:+$wheels/*/lib} \
    /usr/local/nvidia/lib64 /usr/local/nvidia/lib /usr/lib/wsl/lib; do
    if [ -d "$folder" ]; then path+=:$folder; fi
done
export LD_LIBRARY_PATH=$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
missing() { ldd "$bundle/suite" | sed -n 's/[[:space:]]*\(.*\) => not found/\1/p'; }
if missing | grep -q '^libcuda.so.1$'; then
    echo "no driver (libcuda.so.1) found; using a stub"
    LD_LIBRARY_PATH+=:$bundle/stubs
fi
if [ -n "$(missing)" ]; then
    echo "error: not found: $(missing | xargs); set CUDA_HOME to CUDA 13, or copy BUNDLE/lib too" >&2
    exit 1
fi
if command -v nvidia-smi >/dev/null; then nvidia-smi -L || true; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

printf '\n== tests\n'
"$bundle/suite" cuda:: --nocapture --test-threads 1 2>&1 | tee "$work/tests"
skipped=$(grep -c 'skipped: no CUDA device' "$work/tests" || true)
if [ "$skipped" -gt 0 ]; then
    echo "error: $skipped tests were skipped; nothing was tested or measured" >&2
    exit 1
fi

printf '\n== a run\n'
"$bundle/preceptor" train configs/offline.toml --run-dir "$work/run" --set 'policy.device="cuda:0"' --set run.steps=6 \
    --set serve.enabled=false

for dtype in f32 bf16; do
    printf '\n== bench\n'
    peak=${PEAK_F32:-67}
    if [ $dtype = bf16 ]; then peak=${PEAK_BF16:-989}; fi
    "$bundle/device" --bench --device cuda:0 --dtype $dtype --peak-tflops "$peak" --seconds "${SECONDS_EACH:-5}"
done
