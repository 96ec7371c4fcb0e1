#!/usr/bin/env bash
# Builds all fuzz targets and runs the named ones (default: all) in turn, for SECONDS each (default: 600). Uses the toolchain
# that builds the program, without nightly or cargo-fuzz. Needs a C++ compiler for libFuzzer.
#
#   tests/fuzz/run.sh [SECONDS [TARGET…]]
#
# Findings are written to tests/fuzz/artifacts/TARGET; tests/fuzz/target/HOST/release/TARGET FILE runs one again. New
# inputs are collected in tests/fuzz/grown/TARGET; tests/fuzz/corpus is only read. With a nightly toolchain and cargo-fuzz,
# `cargo fuzz run --fuzz-dir tests/fuzz TARGET` does the same with the address sanitizer.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-600}
shift || true
host=$(rustc -vV | sed -n 's/^host: //p')
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    mapfile -t targets < <(sed -n 's/^name = "\(.*\)"/\1/p' Cargo.toml | tail -n +2)
fi

# The same versions of dependencies as the program.
cp ../../Cargo.lock Cargo.lock
# The flags of cargo-fuzz: counters at each branch, traced comparisons.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
# With --target, build scripts and macros are built without these flags.
cargo build --release --target "$host" --bins

status=0
for target in "${targets[@]}"; do
    mkdir -p "grown/$target" "artifacts/$target"
    log="grown/$target.log"
    words=()
    if [ -f "dictionaries/$target" ]; then
        words=("-dict=dictionaries/$target")
    fi
    # One thread per pool, so that a run of a target is a function of its input.
    found=0
    RAYON_NUM_THREADS=1 "target/$host/release/$target" "grown/$target" "corpus/$target" \
        "${words[@]}" -max_total_time="$seconds" -max_len=4096 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="artifacts/$target/" >"$log" 2>&1 || found=$?
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
    peak=$(sed -n 's/^stat::peak_rss_mb: *//p' "$log" | tail -n 1)
    if [ "$found" -eq 0 ]; then
        echo "$target: ${executions:-0} executions, peak ${peak:-?} MB, no finding"
    else
        status=1
        echo "$target: ${executions:-0} executions, a FINDING: see tests/fuzz/$log and tests/fuzz/artifacts/$target"
        grep -m 3 -E "panicked at|ERROR: libFuzzer|SUMMARY" "$log" || true
    fi
done
exit "$status"
