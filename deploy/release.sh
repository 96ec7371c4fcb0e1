#!/usr/bin/env bash
# Makes the files of a release; see --help.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: deploy/release.sh [DIR]

Builds the program for this machine's target and writes to DIR (target/release-files):
  preceptor-VERSION-TARGET.tar.gz   program, licence, README, example configurations
  preceptor-VERSION-TARGET.cdx.json bill of materials (CycloneDX 1.6)
  preceptor-*.whl                   the same program as a wheel for pip, if maturin is installed (pip install maturin)
  SHA256SUMS                        checksums of all of them
and prints the oldest glibc that the program starts with.

Environment:
  BINARY    packs this program instead of building one; no wheel is made then
EOF
}

case "${1:-}" in
    -h | --help) usage; exit ;;
    -*) usage >&2; exit 2 ;;
esac

cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-target/release-files}" && cd "${1:-target/release-files}" && pwd)
need() { command -v "$1" >/dev/null || { echo "error: $1 is missing; install $2" >&2; exit 1; }; }
need objdump binutils
need python3 "Python 3.11 or newer"
target=$(rustc -vV | sed -n 's/^host: //p')
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
name=preceptor-$version-$target

binary=${BINARY:-}
if [ -z "$binary" ]; then
    cargo build --release --locked --bin preceptor
    binary=${CARGO_TARGET_DIR:-target}/release/preceptor
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/$name"
cp "$binary" "$work/$name/preceptor"
strip "$work/$name/preceptor"
cp LICENSE README.md "$work/$name/"
cp -R configs "$work/$name/configs"
# The same files give the same archive: fixed order, owner and times.
time=$(git log -1 --format=%ct 2>/dev/null || echo 0)
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$time" -C "$work" -cf - "$name" | gzip -n -9 >"$out/$name.tar.gz"
python3 deploy/sbom.py --target "$target" >"$out/$name.cdx.json"
if [ -z "${BINARY:-}" ]; then
    if command -v maturin >/dev/null; then
        maturin build --release --locked --strip --out "$out"
    else
        echo "no wheel: maturin is not installed (pip install maturin)"
    fi
fi
(cd "$out" && find . -maxdepth 1 -type f ! -name SHA256SUMS -printf '%P\n' | LC_ALL=C sort | xargs sha256sum >SHA256SUMS)

glibc=$(objdump -T "$work/$name/preceptor" | grep -oE 'GLIBC_[0-9.]+' | sort -uV | tail -1)
libraries=$(objdump -p "$work/$name/preceptor" | sed -n 's/^ *NEEDED *//p' | tr '\n' ' ')
echo "glibc    ${glibc#GLIBC_} or newer (needs $libraries)"
echo "files    $out"
cat "$out/SHA256SUMS"
