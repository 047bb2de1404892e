#!/usr/bin/env bash
# Trains on the GPUs of one or several hosts: starts torchrun with one process per GPU.
#
#   launch/gpu.sh --gin_file=experiments/imagenet64.gin --workdir=/data/imagenet64
#
# All arguments are passed to "python -m jetformer.main". On several hosts, start it on each with the same arguments:
#
#   NNODES=2 RDZV_ENDPOINT=host0:29500 launch/gpu.sh --gin_file=… --workdir=…
#
# Under Slurm, use sbatch and launch/gpu.slurm. All hosts must share the workdir. On SIGTERM, which schedulers send, or
# Ctrl-C, all processes save together, and this script exits with 75: the same command resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NPROC=${NPROC:-gpu}                # processes on this host; gpu: one per GPU
NNODES=${NNODES:-1}                # hosts
RDZV_ENDPOINT=${RDZV_ENDPOINT:-}   # HOST:PORT, the rendezvous of several hosts: one of them, and a free port on it
NODE_RANK=${NODE_RANK:-}           # this host's number, where ranks have to be in that order; the endpoint is on host 0
RDZV_ID=${RDZV_ID:-jetformer}      # distinguishes runs with the same rendezvous endpoint
MAX_RESTARTS=${MAX_RESTARTS:-0}    # how often torchrun restarts all processes from the last checkpoint after a failure
PYTHON=${PYTHON:-python}           # the environment's interpreter

if ((NNODES == 1)); then
  rendezvous=(--standalone)
elif [[ -n $RDZV_ENDPOINT && -n $NODE_RANK ]]; then
  rendezvous=("--node-rank=$NODE_RANK" "--master-addr=${RDZV_ENDPOINT%:*}" "--master-port=${RDZV_ENDPOINT##*:}")
elif [[ -n $RDZV_ENDPOINT ]]; then
  rendezvous=(--rdzv-backend=c10d "--rdzv-endpoint=$RDZV_ENDPOINT" "--rdzv-id=$RDZV_ID")
else
  echo "error: NNODES=$NNODES hosts need a rendezvous: set RDZV_ENDPOINT=HOST:PORT" >&2
  exit 2
fi

# torchrun gets a session of its own, which signals to this job's process group do not reach: it would kill the
# processes after 30 seconds, which may be too short to save.
setsid "$PYTHON" -m torch.distributed.run "--nproc-per-node=$NPROC" "--nnodes=$NNODES" "${rendezvous[@]}" \
  "--max-restarts=$MAX_RESTARTS" -m jetformer.main "$@" &
torchrun=$!

stopped=
# shellcheck disable=SC2317  # trap calls it
stop() {
  stopped=1
  local processes
  read -r -a processes < <(cat "/proc/$torchrun/task/"*/children | tr '\n' ' ') || true
  # Without processes there is nothing to save: end torchrun itself.
  kill -TERM "${processes[@]:-$torchrun}" || true
}
trap stop TERM INT

code=0
wait $torchrun || code=$?
while kill -0 $torchrun 2>/dev/null; do # a signal interrupts wait
  code=0
  wait $torchrun || code=$?
done
((code == 0)) || [[ -z $stopped ]] || code=75
exit $code
