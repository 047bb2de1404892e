#!/usr/bin/env bash
# Evaluates a run while it trains, on a machine of its own, from a workstation: copies the committed source, installs
# it, starts "python -m jetformer.evaluate", which follows the run's checkpoints to the last, and shows its log.
#
#   export PROJECT=my-project ZONE=us-west4-a WORKDIR=gs://my-bucket/imagenet64
#   EVAL_NAME=eval EVAL_MACHINE=tpu launch/eval_job.sh [--dry_run] [...]
#   EVAL_NAME=eval EVAL_MACHINE=tpu launch/eval_job.sh --stop
#
# The machine has to be there: a TPU VM of one host (EVAL_MACHINE=tpu; gcloud.bash creates it), or a Compute Engine VM
# (EVAL_MACHINE=vm) with Python 3.10 or newer, access to the bucket, and the driver of its GPU if it has one.
# All else is as in tpu_pod.sh, which see: attaching, --dry_run, --stop, restarts, logs (LOG_DIR/EVAL_NAME/…; on the
# machine ~/jetformer_eval/logs/). A preempted Compute Engine VM is started again where PROVISIONING=spot.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# To be set by you:
#   PROJECT            the Google Cloud project's id
#   ZONE               the zone of the machine
#   EVAL_NAME          what the machine is called
#   EVAL_MACHINE       tpu or vm
#   WORKDIR            the workdir of the run to evaluate, gs://…
#   ACCELERATOR_TYPE, RUNTIME_VERSION: those of this machine, for a TPU where PROVISIONING is not on_demand
PROVISIONING=${PROVISIONING:-on_demand} # how it was created: on_demand, spot; a TPU also queue or queue_spot
LOG_DIR=${LOG_DIR:-$root/logs}          # where logs go on this computer
MAX_RESTARTS=${MAX_RESTARTS:-50}        # restarts until it ends
MAX_FAILURES=${MAX_FAILURES:-20}        # failures of gcloud in a row until it ends
RESTART_PAUSE=${RESTART_PAUSE:-30}      # seconds before a restart, and after a failure of gcloud
POLL_SECONDS=${POLL_SECONDS:-30}        # seconds between two looks at the machine
GRACE_SECONDS=${GRACE_SECONDS:-120}     # as in tpu_pod.sh; without effect on one host
STOP_SECONDS=${STOP_SECONDS:-300}       # seconds the program has to end, before it is killed
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
    # The queued resource of the training TPU, if one is set, is not this machine's.
    QUEUE_NAME=$EVAL_NAME ;;
  vm)
    DEVICE=${DEVICE:-auto}
    EXTRAS=${EXTRAS:-gcs}
    pip_options=()
    check_provisioning on_demand spot ;;
  *) usage_error "EVAL_MACHINE=$EVAL_MACHINE: it is tpu or vm" ;;
esac

NAME=$EVAL_NAME MACHINE=$EVAL_MACHINE MAX_WORKERS=1 JOB_DIR=jetformer_eval
command=(-m jetformer.evaluate "--workdir=$WORKDIR" "--device=$DEVICE" ${arguments[@]+"${arguments[@]}"})
run_job
