#!/usr/bin/env bash
# Trains on a TPU, from a workstation: copies the committed source to all workers of an existing TPU VM, installs it,
# starts the training program on all of them, streams worker 0, and restarts all after a preemption.
#
#   export PROJECT=my-project ZONE=us-west4-a TPU_NAME=pod WORKDIR=gs://my-bucket/imagenet64
#   launch/tpu_pod.sh [--dry_run] --gin_file=experiments/imagenet64.gin [--gin_bindings='Jet.depth = 8'] [...]
#   launch/tpu_pod.sh --stop
#
# Create the TPU with gcloud.bash. The arguments are passed to the program, with --workdir and --device. --dry_run (or
# DRY_RUN=1) prints the commands and runs none. --stop ends the run on all workers, which save first.
#
# The run does not depend on this script: it survives Ctrl-C and a lost connection, and the same command attaches to it.
# Events and reactions:
#   all workers exit with 0           done
#   a worker exits with 75 (or 143),  (a maintenance event) all workers are stopped and restarted together, on the same
#   or its host restarts              VM, with the same source; at most MAX_RESTARTS times
#   the VM is PREEMPTED, TERMINATED   with PROVISIONING=on_demand, the script ends with an error; otherwise the VM is
#   or gone                           deleted, created again as it was, installed and started; counts as a restart
#   any other exit code               the other workers are stopped; the script exits with 1 and names the log to read
# Logs: when a start ends, each worker's log is fetched to LOG_DIR/TPU_NAME/START/worker-N.log. Until then they are on
# the workers, in ~/jetformer_train/logs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# To be set by you:
#   PROJECT            the Google Cloud project's id
#   ZONE               the zone of the TPU
#   TPU_NAME           the name of the TPU VM
#   WORKDIR            where the run is saved and resumed from, gs://…
#   ACCELERATOR_TYPE, RUNTIME_VERSION: as in gcloud.bash, if PROVISIONING is not on_demand
#   TORCH_TPU_TOPOLOGY: as in tpu_host.sh, for RUNTIME=native on several hosts
RUNTIME=${RUNTIME:-xla}                 # xla: through torch_xla; native: through torch_tpu, by tpu_host.sh
PROVISIONING=${PROVISIONING:-on_demand} # how the TPU was created: on_demand, spot, queue or queue_spot
LOG_DIR=${LOG_DIR:-$root/logs}          # local directory for logs
MAX_RESTARTS=${MAX_RESTARTS:-50}        # restarts before giving up
MAX_FAILURES=${MAX_FAILURES:-20}        # failures of gcloud in a row before giving up
RESTART_PAUSE=${RESTART_PAUSE:-30}      # seconds before a restart, and after a failure of gcloud
POLL_SECONDS=${POLL_SECONDS:-30}        # seconds between two polls of the workers
GRACE_SECONDS=${GRACE_SECONDS:-120}     # seconds for the other workers to end after one has
STOP_SECONDS=${STOP_SECONDS:-300}       # seconds for the program to save and end, before it is killed
LIBTPU_INDEX=${LIBTPU_INDEX:-https://storage.googleapis.com/libtpu-releases/index.html} # where pip finds libtpu
#   EXTRAS             extras of setup.cfg to install: tpu,gcs or, for RUNTIME=native, tpu-native,gcs
#   REMOTE_PYTHON      the workers' Python: python3 or, for RUNTIME=native, python3.11; apt-get installs it if need be

# shellcheck source=gcloud.bash
source "$root/gcloud.bash"
# shellcheck source=launch/common.bash
source "$root/launch/common.bash"

read_arguments "$@"
_gcloud_need PROJECT ZONE TPU_NAME WORKDIR
[[ $PROVISIONING == on_demand ]] || _gcloud_need ACCELERATOR_TYPE RUNTIME_VERSION
check_provisioning on_demand spot queue queue_spot
[[ -n $stop || " ${arguments[*]-}" == *" --gin_file"* ]] ||
  usage_error "no experiment: pass one with --gin_file=experiments/….gin"

case $RUNTIME in
  xla)
    EXTRAS=${EXTRAS:-tpu,gcs}
    REMOTE_PYTHON=${REMOTE_PYTHON:-python3}
    pip_options=(-f "$LIBTPU_INDEX")
    command=(../venv/bin/python -m jetformer.main "--workdir=$WORKDIR" --device=xla) ;;
  native)
    EXTRAS=${EXTRAS:-tpu-native,gcs}
    REMOTE_PYTHON=${REMOTE_PYTHON:-python3.11}
    pip_options=()
    command=(env PYTHON=../venv/bin/python ${TORCH_TPU_TOPOLOGY:+"TORCH_TPU_TOPOLOGY=$TORCH_TPU_TOPOLOGY"}
      launch/tpu_host.sh "--workdir=$WORKDIR") ;;
  *) usage_error "RUNTIME=$RUNTIME: expected xla or native" ;;
esac
command+=(${arguments[@]+"${arguments[@]}"})

NAME=$TPU_NAME MACHINE=tpu MAX_WORKERS=100000 JOB_DIR=jetformer_train
run_job
