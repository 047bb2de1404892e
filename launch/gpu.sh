#!/usr/bin/env bash
# Trains on the GPUs of this host, or of several hosts: starts torchrun with one process for each GPU.
#
#   launch/gpu.sh --gin_file=experiments/imagenet64.gin --workdir=/data/imagenet64
#
# All arguments go to "python -m jetformer.main". On several hosts start it on each, with the same command line:
#
#   NNODES=2 RDZV_ENDPOINT=host0:29500 launch/gpu.sh --gin_file=… --workdir=…
#
# and under Slurm with sbatch and launch/gpu.slurm. The workdir has to be the same on all hosts. On SIGTERM, as a
# scheduler sends it, or Ctrl-C, all processes save together, and this exits with 75: start it again to go on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NPROC=${NPROC:-gpu}                # processes on this host; gpu: one for each GPU
NNODES=${NNODES:-1}                # hosts
RDZV_ENDPOINT=${RDZV_ENDPOINT:-}   # HOST:PORT where several hosts meet: one of them, and a free port on it
RDZV_ID=${RDZV_ID:-jetformer}      # tells runs that meet at the same place apart
MAX_RESTARTS=${MAX_RESTARTS:-0}    # how often torchrun starts all processes again, from the last checkpoint, if one fails
PYTHON=${PYTHON:-python}           # the interpreter of the environment

if ((NNODES == 1)); then
  rendezvous=(--standalone)
elif [[ -n $RDZV_ENDPOINT ]]; then
  rendezvous=(--rdzv-backend=c10d "--rdzv-endpoint=$RDZV_ENDPOINT" "--rdzv-id=$RDZV_ID")
else
  echo "error: NNODES=$NNODES hosts need RDZV_ENDPOINT=HOST:PORT, where they meet" >&2
  exit 2
fi

# In a session of its own, where a signal to all of this job does not reach it: torchrun would give the processes 30
# seconds, which may be too short to save.
setsid "$PYTHON" -m torch.distributed.run "--nproc-per-node=$NPROC" "--nnodes=$NNODES" "${rendezvous[@]}" \
  "--max-restarts=$MAX_RESTARTS" -m jetformer.main "$@" &
torchrun=$!

stopped=
# shellcheck disable=SC2317  # trap calls it
stop() {
  stopped=1
  local processes
  read -r -a processes < <(cat "/proc/$torchrun/task/"*/children | tr '\n' ' ') || true
  # Before there are any there is nothing to save.
  kill -TERM "${processes[@]:-$torchrun}" || true
}
trap stop TERM INT

code=0
wait $torchrun || code=$?
while kill -0 $torchrun 2>/dev/null; do # a signal ends a wait
  code=0
  wait $torchrun || code=$?
done
((code == 0)) || [[ -z $stopped ]] || code=75
exit $code
