#!/usr/bin/env bash
# One nightly pass, as cron or a timer would start it: infra/laptop/nightly.sh [CATALOG] [OPTION…]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

state=${QUANTFLEET_LAPTOP:-out/laptop}
bin=${QUANTFLEET_BIN:-.venv/bin}
if [[ ! -r $state/fleet.env ]]; then
    echo "laptop: $state/fleet.env is missing; run infra/laptop/up.sh first" >&2
    exit 2
fi
set -a
# shellcheck source=/dev/null
. "$state/fleet.env"
set +a

catalog=out/demo/catalog.yaml
if (($#)); then
    catalog=$1
    shift
fi
exec flock -n "$state/nightly.lock" \
    "$bin/quantfleet" nightly "$catalog" --address "${QUANTFLEET_ADDRESS:?}" "$@"
