#!/usr/bin/env bash
# Makes certificates for a broker and its clients; see --help.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: deploy/certificates.sh DIR NAME [HOST...]

Writes NAME.crt and NAME.key to DIR, for a server that clients reach under the names or IP addresses HOST..., or for a client.
The authority DIR/ca.crt, with its key DIR/ca.key, is made at the first call. A worker needs ca.crt and its own two files;
ca.key must stay secret. Certificates are valid for 825 days, the authority for ten years. An existing file is not replaced.
EOF
}

case "${1:-}" in
    -h | --help) usage; exit ;;
esac
(($# >= 2)) || { usage >&2; exit 2; }
command -v openssl >/dev/null || { echo "error: openssl is missing; install openssl" >&2; exit 1; }
dir=$1 name=$2
shift 2
mkdir -p "$dir"
umask 077
key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out "$1" 2>/dev/null; }
if [ ! -e "$dir/ca.crt" ]; then
    key "$dir/ca.key"
    openssl req -x509 -new -key "$dir/ca.key" -days 3650 -subj "/CN=Preceptor authority" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign -out "$dir/ca.crt"
fi
[ ! -e "$dir/$name.crt" ] || { echo "error: $dir/$name.crt exists" >&2; exit 1; }
[ "$name" != ca ] || { echo "error: ca is the name of the authority" >&2; exit 2; }
names="DNS:$name"
for host in "$@"; do
    case $host in
        *:* | *[0-9].[0-9]*.[0-9]*.[0-9]*) names+=",IP:$host" ;;
        *) names+=",DNS:$host" ;;
    esac
done
key "$dir/$name.key"
extensions=$(mktemp)
trap 'rm -f "$extensions"' EXIT
printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
    "extendedKeyUsage=serverAuth,clientAuth" "subjectAltName=$names" >"$extensions"
openssl req -new -key "$dir/$name.key" -subj "/CN=$name" |
    openssl x509 -req -days 825 -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -CAcreateserial -extfile "$extensions" \
        -out "$dir/$name.crt" 2>/dev/null
chmod 644 "$dir/ca.crt" "$dir/$name.crt"
echo "$dir/$name.crt: $names"
