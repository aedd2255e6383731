#!/usr/bin/env bash
# One command as N processes on this host, which find one another on loopback.
#
#   launch/local.sh N MODULE [FLAG...]
#   launch/local.sh 4 experiments.dufm_training --num_seeds=1000 --resume --out=results/sweep
#
# Process I has the GPU I and no other, so N is the number of GPUs. On CPUs a single process uses
# all cores, and several only serve to try things out. Where one process fails, the others are sent
# SIGTERM, by which they save a checkpoint, and the status is that of the first to fail. SIGTERM,
# SIGINT and SIGHUP reach all processes as SIGTERM. Who has not ended $GRACE seconds later (30) is
# killed. $PYTHON is the interpreter, .venv/bin/python where it is not set.
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
count=$1 module=$2
shift 2
python=${PYTHON:-.venv/bin/python}
# Free now, and hardly taken in the second until process 0 listens there.
free='import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'
port=$("$python" -c "$free") || exit

running=()
deadline=0
stop() {
  kill -TERM "${running[@]}" 2>/dev/null
  ((deadline)) || deadline=$((SECONDS + ${GRACE:-30}))
}
trap stop TERM INT HUP

# Else the coordinator, which asks nobody for a password, would listen to all networks.
export JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port
for ((index = 0; index < count; index++)); do
  JAX_LOCAL_DEVICE_IDS=$index "$python" -m "$module" --coordinator_address="127.0.0.1:$port" \
    --num_processes="$count" --process_id="$index" "$@" &
  running+=($!)
done
((deadline == 0)) || stop # A signal came before all were there.

# Asks rather than waits: a signal ends `wait` with a status that no process needs to have had.
status=0
while ((${#running[@]})); do
  sleep 0.2
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    wait "$pid"
    code=$?
    ((status)) || status=$code
  done
  running=("${left[@]}")
  ((${#running[@]})) || break
  ((status == 0 || deadline)) || stop
  if ((deadline && SECONDS >= deadline)); then kill -KILL "${running[@]}" 2>/dev/null; fi
done
exit "$status"
