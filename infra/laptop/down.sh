#!/usr/bin/env bash
# End what infra/laptop/up.sh started, and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

state=${QUANTFLEET_LAPTOP:-out/laptop}
if [[ ! -e $state/pids ]]; then
    echo "laptop: nothing is up" >&2
    exit 0
fi
mapfile -t pids <"$state/pids"
for pid in "${pids[@]}"; do
    kill "$pid" 2>/dev/null || true
done
for _ in $(seq 60); do
    alive=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            alive+=("$pid")
        fi
    done
    if ((${#alive[@]} == 0)); then
        rm "$state/pids" "$state/fleet.env"
        echo "laptop: down"
        exit 0
    fi
    sleep 0.5
done
echo "laptop: ${alive[*]} did not end in 30 seconds; look at them, then remove $state/pids" >&2
exit 1
