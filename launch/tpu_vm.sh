#!/usr/bin/env bash
# One command on all hosts of a Cloud TPU slice (up to v6e; newer ones have no TPU VM of this kind).
#
#   launch/tpu_vm.sh NAME ZONE FOLDER MODULE [FLAG...]
#   launch/tpu_vm.sh my-slice europe-west4-b dufm_jax experiments.dufm_training \
#     --num_seeds=1000 --resume --out=/mnt/share/sweep
#
# FOLDER is this repository on each host, from the login folder, with jax[tpu] in its .venv. --out
# is on a file system that all hosts have mounted, such as Filestore. The processes find one another
# by what the hosts tell JAX. The hosts do not stop the command when this script is interrupted, and
# nothing restarts a slice that was preempted: with --resume the same line goes on.
set -euo pipefail

if (($# < 4)); then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 folder=$3 module=$4
shift 4
# Quoted for the shell at the other end.
printf -v command '%q ' .venv/bin/python -m "$module" --coordinator_address=auto "$@"
printf -v folder '%q' "$folder"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd $folder && exec $command"
