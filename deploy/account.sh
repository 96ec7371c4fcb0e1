#!/usr/bin/env bash
# Prints the part of a NATS configuration that gives a run a separate account; see --help.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: deploy/account.sh RUN NODE WORKER...

Prints the account of the run RUN (cluster.run, or run.name) for the configuration of a NATS server. NODE is the name in the
certificate of the run's node, WORKER that in the certificate of its workers; several workers may share a certificate
(deploy/certificates.sh makes both). A client of another account sees nothing of the run. The node may do everything in the
account. A worker may read the run's notices, take and acknowledge work, and give results and signs of life; it cannot offer
work, announce weights, or make and remove queues. The server must require certificates:

    tls { cert_file: "broker.crt", key_file: "broker.key", ca_file: "ca.crt", verify_and_map: true }
    accounts {
      include "summaries.conf"
    }
EOF
}

case "${1:-}" in
    -h | --help) usage; exit ;;
esac
(($# >= 3)) || { usage >&2; exit 2; }
run=$1 node=$2
shift 2
for name in "$run" "$node" "$@"; do
    [[ $name =~ ^[A-Za-z0-9_.*-]+$ ]] || { echo "error: $name may have letters, digits, '-', '_', '.' and '*' only" >&2; exit 2; }
done
[[ $run =~ ^[A-Za-z0-9_-]{1,100}$ ]] || { echo "error: a run's name has 1 to 100 letters, digits, '-' and '_'" >&2; exit 2; }
cat <<EOF
"$run": {
  jetstream: enabled
  users: [
    { user: "$node" }
EOF
for worker in "$@"; do
    cat <<EOF
    {
      user: "$worker"
      permissions: {
        publish: [
          "preceptor.queue.$run.*.results"
          "preceptor.queue.$run.*.answers"
          "preceptor.told.$run.*"
          "\$JS.API.INFO"
          "\$JS.API.STREAM.INFO.*"
          "\$JS.API.STREAM.MSG.GET.*"
          "\$JS.API.CONSUMER.INFO.*.*"
          "\$JS.API.CONSUMER.MSG.NEXT.*.*"
          "\$JS.ACK.>"
        ]
        subscribe: "_INBOX.>"
      }
    }
EOF
done
cat <<EOF
  ]
}
EOF
