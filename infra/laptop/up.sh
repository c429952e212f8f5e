#!/usr/bin/env bash
# A fleet of one machine, without containers: an S3 server, a Ray head with a token, a small model.
#
#   make venv && infra/laptop/up.sh && infra/laptop/nightly.sh && infra/laptop/down.sh
#
# Everything it writes, but the model, lies below $QUANTFLEET_LAPTOP (default: out/laptop). The S3
# server keeps its objects in memory: they go with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

state=${QUANTFLEET_LAPTOP:-out/laptop}
bin=${QUANTFLEET_BIN:-.venv/bin}
s3_port=${QUANTFLEET_S3_PORT:-5555}
ray_port=${QUANTFLEET_RAY_PORT:-6379}
dashboard_port=${QUANTFLEET_DASHBOARD_PORT:-8265}
metrics_port=${QUANTFLEET_METRICS_PORT:-8080}
agent_port=${QUANTFLEET_AGENT_PORT:-52365}
address=127.0.0.1:$ray_port

if [[ -e $state/pids ]]; then
    echo "laptop: $state/pids is there already; run infra/laptop/down.sh first" >&2
    exit 2
fi
mkdir -p "$state"
chmod 700 "$state"
state=$(cd "$state" && pwd)

# What every command of this fleet has in its environment; nobody else may read it.
umask 077
cat >"$state/fleet.env" <<END
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
RAY_USAGE_STATS_ENABLED=0
KERAS_BACKEND=jax
AWS_ENDPOINT_URL=http://127.0.0.1:$s3_port
AWS_ACCESS_KEY_ID=laptop
AWS_SECRET_ACCESS_KEY=laptop
AWS_DEFAULT_REGION=us-east-1
QUANTFLEET_ADDRESS=$address
END
set -a
# shellcheck source=/dev/null
. "$state/fleet.env"
set +a

# Ray Jobs find `quantfleet` by the PATH of their node.
PATH=$(cd "$bin" && pwd):$PATH
export PATH

started() { # started NAME URL: wait until it answers
    for _ in $(seq 120); do
        if "$bin/python" -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=2)" \
            "$2" 2>/dev/null; then
            return
        fi
        sleep 0.5
    done
    echo "laptop: $1 does not answer at $2; see $state/$1.log" >&2
    infra/laptop/down.sh
    exit 3
}

nohup "$bin/moto_server" -H 127.0.0.1 -p "$s3_port" >"$state/s3.log" 2>&1 &
echo $! >"$state/pids"
nohup "$bin/ray" start --head --block --node-ip-address=127.0.0.1 --port="$ray_port" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" \
    --dashboard-agent-listen-port="$agent_port" --metrics-export-port="$metrics_port" \
    --temp-dir="${QUANTFLEET_RAY_TEMP:-/tmp/ray}" >"$state/ray.log" 2>&1 &
echo $! >>"$state/pids"

if [[ -z ${QUANTFLEET_NO_MODEL:-} ]]; then
    "$bin/python" -m tests.demo.prepare out/demo
    cp infra/laptop/catalog.yaml out/demo/catalog.yaml
fi
started s3 "http://127.0.0.1:$s3_port/moto-api/"
started ray "http://127.0.0.1:$agent_port/api/healthz"
"$bin/python" -c "import boto3; boto3.client('s3').create_bucket(Bucket='quantfleet')"
echo "laptop: up; S3 at port $s3_port, Ray at $address, its dashboard at
laptop: http://127.0.0.1:$dashboard_port, settings in $state/fleet.env"
