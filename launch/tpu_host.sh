#!/usr/bin/env bash
# Trains on the TPUs of one or several hosts through torch_tpu: makes the environment that its processes need before
# they start, and starts one process per device with launch/gpu.sh, which is for torchrun on any device.
#
#   launch/tpu_host.sh --gin_file=experiments/imagenet64.gin --workdir=gs://my-bucket/imagenet64
#
# All arguments are passed to "python -m jetformer.main", with --device=tpu. On several hosts, start it on each with the
# same arguments: launch/tpu_pod.sh does, with RUNTIME=native. Signals and exit codes are those of launch/gpu.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PYTHON=${PYTHON:-python} # the environment's interpreter
# For a TPU of several hosts:
#   TORCH_TPU_TOPOLOGY    the number of chips along x,y,z of the whole TPU, such as 4,4,1 for v5litepod-16
# By default from Google Cloud's metadata:
#   TPU_WORKER_HOSTNAMES  all hosts, in their order, separated by commas
#   NODE_RANK             the number of this host

error() {
  echo "error: $1" >&2
  exit 2
}

attribute() {
  curl -sf -m 5 -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

if [[ -z ${TPU_WORKER_HOSTNAMES:-} ]]; then
  # NAME:ID:ADDRESS,NAME:ID:ADDRESS,…
  endpoints=$(attribute worker-network-endpoints) ||
    error "Google Cloud's metadata do not answer: set TPU_WORKER_HOSTNAMES, on a single host to localhost"
  TPU_WORKER_HOSTNAMES=$(tr , '\n' <<<"$endpoints" | cut -d : -f 3 | paste -sd , -)
fi
if [[ $TPU_WORKER_HOSTNAMES == *,* ]]; then
  [[ -n ${TORCH_TPU_TOPOLOGY:-} ]] ||
    error "the TPU has several hosts: set TORCH_TPU_TOPOLOGY to the number of its chips along x,y,z, such as 4,4,1"
  # Else torch_tpu may number the hosts by the places of their chips; rank 0 has to be on the first of them.
  NODE_RANK=${NODE_RANK:-$(attribute agent-worker-number)}
  export TORCH_TPU_TOPOLOGY NODE_RANK
fi
export TPU_WORKER_HOSTNAMES

# It prints lines of NAME="value", and others.
environment=$("$PYTHON" -m torch.tpu.distributed | grep -E '^[A-Z_]+=') ||
  error "python -m torch.tpu.distributed failed: install the extra tpu-native; has this host a TPU?"
set -a
eval "$environment"
set +a
export NPROC=$((WORLD_SIZE / ${NNODES:-1})) RDZV_ENDPOINT=${MASTER_ADDR:-}:${MASTER_PORT:-}
exec launch/gpu.sh --device=tpu "$@"
