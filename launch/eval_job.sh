#!/usr/bin/env bash
# Evaluates a run during training, on another machine, from a workstation: copies the committed source, installs it,
# starts "python -m jetformer.evaluate", which follows the run's checkpoints to the last, and streams its log.
#
#   export PROJECT=my-project ZONE=us-west4-a WORKDIR=gs://my-bucket/imagenet64
#   EVAL_NAME=eval EVAL_MACHINE=tpu launch/eval_job.sh [--dry_run] [...]
#   EVAL_NAME=eval EVAL_MACHINE=tpu launch/eval_job.sh --stop
#
# The machine must exist: a single-host TPU VM (EVAL_MACHINE=tpu; gcloud.bash creates it), or a Compute Engine VM
# (EVAL_MACHINE=vm) with Python 3.10 or newer, access to the bucket, and the driver of its GPU if it has one. Attaching,
# --dry_run, --stop, restarts and logs work as in tpu_pod.sh (logs in LOG_DIR/EVAL_NAME/…, on the machine in
# ~/jetformer_eval/logs/). With PROVISIONING=spot a preempted Compute Engine VM is started again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# To be set by you:
#   PROJECT            the Google Cloud project's id
#   ZONE               the zone of the machine
#   EVAL_NAME          the name of the machine
#   EVAL_MACHINE       tpu or vm
#   WORKDIR            the workdir of the run to evaluate, gs://…
#   ACCELERATOR_TYPE, RUNTIME_VERSION: those of this machine, for a TPU if PROVISIONING is not on_demand
PROVISIONING=${PROVISIONING:-on_demand} # how it was created: on_demand, spot; a TPU also queue or queue_spot
LOG_DIR=${LOG_DIR:-$root/logs}          # local directory for logs
MAX_RESTARTS=${MAX_RESTARTS:-50}        # restarts before giving up
MAX_FAILURES=${MAX_FAILURES:-20}        # failures of gcloud in a row before giving up
RESTART_PAUSE=${RESTART_PAUSE:-30}      # seconds before a restart, and after a failure of gcloud
POLL_SECONDS=${POLL_SECONDS:-30}        # seconds between two polls of the machine
GRACE_SECONDS=${GRACE_SECONDS:-120}     # as in tpu_pod.sh; no effect on one host
STOP_SECONDS=${STOP_SECONDS:-300}       # seconds for the program to end, before it is killed
REMOTE_PYTHON=${REMOTE_PYTHON:-python3} # the machine's Python
LIBTPU_INDEX=${LIBTPU_INDEX:-https://storage.googleapis.com/libtpu-releases/index.html} # where pip finds libtpu

# shellcheck source=gcloud.bash
source "$root/gcloud.bash"
# shellcheck source=launch/common.bash
source "$root/launch/common.bash"

read_arguments "$@"
_gcloud_need PROJECT ZONE EVAL_NAME EVAL_MACHINE WORKDIR
case $EVAL_MACHINE in
  tpu)
    DEVICE=${DEVICE:-xla}      # the program's --device
    EXTRAS=${EXTRAS:-tpu,gcs}  # extras of setup.cfg to install
    pip_options=(-f "$LIBTPU_INDEX")
    check_provisioning on_demand spot queue queue_spot
    [[ $PROVISIONING == on_demand ]] || _gcloud_need ACCELERATOR_TYPE RUNTIME_VERSION
    # QUEUE_NAME, if set, names the queued resource of the training TPU, not this machine's.
    QUEUE_NAME=$EVAL_NAME ;;
  vm)
    DEVICE=${DEVICE:-auto}
    EXTRAS=${EXTRAS:-gcs}
    pip_options=()
    check_provisioning on_demand spot ;;
  *) usage_error "EVAL_MACHINE=$EVAL_MACHINE: expected tpu or vm" ;;
esac

NAME=$EVAL_NAME MACHINE=$EVAL_MACHINE MAX_WORKERS=1 JOB_DIR=jetformer_eval
command=(../venv/bin/python -m jetformer.evaluate "--workdir=$WORKDIR" "--device=$DEVICE"
  ${arguments[@]+"${arguments[@]}"})
run_job
