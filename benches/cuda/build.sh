#!/usr/bin/env bash
# Builds the program with CUDA on a machine without a GPU and without CUDA; see --help.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: benches/cuda/build.sh

Builds preceptor, its device tests and its device bench with CUDA, without a GPU: compiler and libraries come from PyPI.
Needs Rust, gcc, binutils, python3 with pip; 4 GB of disk; about 25 CPU-minutes the first time.

Writes to target/cuda:
  toolkit   CUDA's compiler, headers and libraries
  target    cargo's output
  bundle    the stripped binaries, and in lib/ the libraries they need, for benches/cuda/run.sh on a machine with a GPU
  bundle.tar.gz  the bundle without the libraries, for a machine that has CUDA 13's libraries already

Environment:
  CUDA_COMPUTE_CAP    target architecture: 80 (A100), 86, 89 (L4, RTX 40), 90 (H100; default), 100, 120
  CARGO_BUILD_JOBS    number of cargo's parallel jobs
EOF
}

case "${1:-}" in
    "") ;;
    -h | --help) usage; exit ;;
    *) usage >&2; exit 2 ;;
esac

# A driver of CUDA 13.0 refuses the output of a newer compiler.
packages=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35
)
limit_mib=64

cd "$(dirname "$0")/../.."
out=$PWD/target/cuda
toolkit=$out/toolkit
bundle=$out/bundle
say() { printf '\n== %s\n' "$*"; }
need() { command -v "$1" >/dev/null || { echo "error: $1 is missing; install $2" >&2; exit 1; }; }
need cargo Rust
need gcc gcc
need readelf binutils
need python3 "Python 3 with pip"
mkdir -p "$out"

say "toolkit"
if [ "$(cat "$toolkit/packages" 2>/dev/null)" != "${packages[*]}" ]; then
    rm -rf "$toolkit"
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$toolkit" "${packages[@]}"
    echo "${packages[*]}" >"$toolkit/packages"
fi
export CUDA_HOME=$toolkit/nvidia/cu13
for name in cublas cublasLt cudart curand nvrtc; do
    real=$(cd "$CUDA_HOME/lib" && ls lib$name.so.*)
    ln -sfn "$real" "$CUDA_HOME/lib/lib$name.so"
done
ln -sfn lib "$CUDA_HOME/lib64"

# The driver is installed with a GPU. For linking, a stub library with its name and functions is built; each function
# returns CUDA_ERROR_STUB_LIBRARY.
stubs=$CUDA_HOME/lib/stubs
mkdir -p "$stubs"
grep -ohE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9]+)?\b' "$CUDA_HOME/include/cuda.h" | sort -u |
    sed 's/.*/int &(void) { return 34; }/' |
    gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$stubs/libcuda.so" -x c -
echo "$CUDA_HOME"

say "cargo, for compute capability ${CUDA_COMPUTE_CAP:=90}"
export CUDA_COMPUTE_CAP CUDARC_CUDA_VERSION=13000 PATH=$CUDA_HOME/bin:$PATH
# Most kernels in machine code are for quantised weights, which are not used here: 32 MB, or 8 MB compressed.
export NVCC_APPEND_FLAGS=--compress-mode=size
export LIBRARY_PATH=$CUDA_HOME/lib:$stubs${LIBRARY_PATH:+:$LIBRARY_PATH} CARGO_TARGET_DIR=$out/target
cargo build --release --features cuda
cargo test --release --features cuda --test suite --bench device --no-run 2>&1 | tee "$out/tests.log"
built() { sed -n "s|.*Executable $1.* (\(.*\))|\1|p" "$out/tests.log"; }
suite=$(built tests/suite/main.rs) device=$(built benches/device.rs)

say "bundle"
rm -rf "$bundle"
mkdir -p "$bundle/lib" "$bundle/stubs"
strip -o "$bundle/preceptor" "$CARGO_TARGET_DIR/release/preceptor"
strip -o "$bundle/suite" "$suite"
strip -o "$bundle/device" "$device"
# With this stub the tests start on a machine without a driver, and report that they are skipped.
cp "$stubs/libcuda.so" "$bundle/stubs/libcuda.so.1"
tar -C "$out" -czf "$out/bundle.tar.gz" bundle
wanted() { readelf -d "$@" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' | sort -u; }
pending=$(wanted "$bundle"/preceptor "$bundle"/suite "$bundle"/device)
while [ -n "$pending" ]; do
    found=()
    for name in $pending; do
        # The other libraries belong to the system or the driver.
        if [ -e "$CUDA_HOME/lib/$name" ] && [ ! -e "$bundle/lib/$name" ]; then
            ln "$CUDA_HOME/lib/$name" "$bundle/lib/$name" 2>/dev/null || cp "$CUDA_HOME/lib/$name" "$bundle/lib/"
            found+=("$bundle/lib/$name")
        fi
    done
    pending=$([ ${#found[@]} -eq 0 ] || wanted "${found[@]}")
done
echo "libraries: $(cd "$bundle/lib" && echo *)"
echo "and from the driver: $(wanted "$bundle/preceptor" | grep libcuda.so)"
for name in preceptor suite device; do printf '%-10s %5.1f MiB\n' "$name" "$(stat -c %s "$bundle/$name" | awk '{ print $1 / 1048576 }')"; done
du -h "$out/bundle.tar.gz"
if [ "$(stat -c %s "$bundle/preceptor")" -gt $((limit_mib << 20)) ]; then
    echo "error: the program is larger than $limit_mib MiB" >&2
    exit 1
fi
echo "next, on a machine with a GPU: benches/cuda/run.sh"
