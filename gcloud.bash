# Functions for bash that create, list, watch and delete this project's TPU VMs and its bucket, and open shells on them:
#
#   export PROJECT=my-project ZONE=us-west4-a TPU_NAME=pod
#   export ACCELERATOR_TYPE=v5litepod-16 RUNTIME_VERSION=v2-alpha-tpuv5-lite
#   source gcloud.bash
#   tpu_create --dry_run     # prints the command
#   tpu_create               # runs it
#
# With --dry_run (or DRY_RUN=1 in the environment) a function prints its commands and runs none. Functions that delete
# ask first, unless given --yes. These two flags come first; all further arguments are passed to gcloud. If a required
# variable is not set, a function returns 2 with a one-line error. The caller's shell options do not change.
# shellcheck shell=bash
# shellcheck disable=SC2154  # _dry_run, _yes and _rest are locals of the calling function, which _gcloud_begin sets

if [ -z "${BASH_VERSION:-}" ]; then
  echo "error: gcloud.bash is for bash: start bash, then source it" >&2
  return 1
fi

# Names and zones. Values from the environment take precedence; what you must choose has no default.
: "${PROJECT:=}"           # the Google Cloud project's id
: "${ZONE:=}"              # the zone of the TPU, such as us-west4-a
: "${TPU_NAME:=}"          # the name of the TPU VM
: "${ACCELERATOR_TYPE:=}"  # kind and number of chips, such as v5litepod-16
: "${RUNTIME_VERSION:=}"   # the TPU VM's software, such as v2-alpha-tpuv5-lite
: "${QUEUE_NAME:=}"        # the name of the queued resource; empty: that of the TPU
: "${BUCKET:=}"            # the bucket's name, without gs://
: "${LOCATION:=}"          # the bucket's region, such as us-west4; reads from another region than the TPU's cost more
: "${WATCH_SECONDS:=30}"   # seconds between two polls of tpu_watch

# ---- Helpers, also for the launch scripts.

# Prints its arguments as one line that any POSIX shell parses into the same arguments.
_gcloud_quote() {
  local argument quote="'\\''" separator=''
  for argument in "$@"; do
    printf '%s' "$separator"
    if [[ $argument =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      printf '%s' "$argument"
    else
      printf "'%s'" "${argument//\'/$quote}"
    fi
    separator=' '
  done
  printf '\n'
}

# Returns 2 with a one-line error for the first of the named variables that is empty.
_gcloud_need() {
  local name example
  for name in "$@"; do
    [[ -n ${!name:-} ]] && continue
    case $name in
      PROJECT) example="my-project (the Google Cloud project's id)" ;;
      ZONE) example='us-west4-a (the zone of the machine)' ;;
      TPU_NAME) example='pod (the name of the TPU VM)' ;;
      ACCELERATOR_TYPE) example='v5litepod-16 (kind and number of chips)' ;;
      RUNTIME_VERSION) example="v2-alpha-tpuv5-lite (the TPU VM's software)" ;;
      BUCKET) example='my-bucket (its name, without gs://)' ;;
      LOCATION) example='us-west4 (the region of the bucket)' ;;
      WORKDIR) example='gs://my-bucket/run (where the run is saved and resumed from)' ;;
      EVAL_NAME) example='eval (the name of the evaluation machine)' ;;
      EVAL_MACHINE) example='tpu, or vm for a Compute Engine VM (the kind of machine)' ;;
      *) example='…' ;;
    esac
    echo "error: $name is not set; set it with: export $name=$example" >&2
    return 2
  done
}

# NAMES... -- ARGUMENTS...: starts every function. Checks that the variables NAMES are set, removes --dry_run and --yes
# from the arguments, and sets _dry_run, _yes and _rest, which are locals of the function.
_gcloud_begin() {
  local names=()
  while [[ $1 != -- ]]; do
    names+=("$1")
    shift
  done
  shift
  _dry_run=${DRY_RUN:-}
  _yes=''
  while [[ ${1:-} == --dry_run || ${1:-} == --yes ]]; do
    [[ $1 == --dry_run ]] && _dry_run=1 || _yes=1
    shift
  done
  _rest=("$@")
  _gcloud_need "${names[@]}" || return
  if [[ -z $_dry_run ]] && ! command -v gcloud >/dev/null; then
    echo "error: gcloud is not on the PATH: install it from https://cloud.google.com/sdk/docs/install" >&2
    return 2
  fi
}

# Runs a command followed by the function's remaining arguments, or prints it on a dry run.
_gcloud_run() {
  set -- "$@" ${_rest[@]+"${_rest[@]}"}
  if [[ -n $_dry_run ]]; then
    _gcloud_quote "$@"
  else
    "$@"
  fi
}

# Asks for confirmation, unless --yes was given.
_gcloud_confirm() {
  local answer=''
  [[ -n $_yes || -n $_dry_run ]] && return
  read -r -p "$1 [y/N] " answer
  [[ $answer == [yY]* ]] && return
  echo "nothing was deleted" >&2
  return 1
}

# ---- TPU VMs

# Creates the TPU VM on demand; returns when it exists or there is no capacity.
tpu_create() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION -- "$@" || return
  _gcloud_run gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" \
    --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION"
}

# Creates the TPU VM as a spot VM: cheaper, and Google may preempt it at any time.
tpu_create_spot() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION -- "$@" || return
  _gcloud_run gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" \
    --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" --spot
}

# Requests the TPU VM as a queued resource and returns at once; Google creates it when there is capacity (tpu_watch).
tpu_queue() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION -- "$@" || return
  _gcloud_run gcloud compute tpus queued-resources create "${QUEUE_NAME:-$TPU_NAME}" --zone="$ZONE" \
    --project="$PROJECT" --node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION"
}

# Requests a spot TPU VM as a queued resource.
tpu_queue_spot() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION -- "$@" || return
  _gcloud_run gcloud compute tpus queued-resources create "${QUEUE_NAME:-$TPU_NAME}" --zone="$ZONE" \
    --project="$PROJECT" --node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" --spot
}

# Lists the TPU VMs of the zone.
tpu_list() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE -- "$@" || return
  _gcloud_run gcloud compute tpus tpu-vm list --zone="$ZONE" --project="$PROJECT"
}

# Lists the queued resources of the zone.
tpu_queue_list() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE -- "$@" || return
  _gcloud_run gcloud compute tpus queued-resources list --zone="$ZONE" --project="$PROJECT"
}

# Opens a shell on worker 0; tpu_ssh --worker=3 on another; tpu_ssh --worker=all --command=uptime runs a command on all.
tpu_ssh() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME -- "$@" || return
  _gcloud_run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --project="$PROJECT"
}

# Prints the state of the TPU VM, or of its queued resource while there is no VM, now and whenever it changes.
# Returns 0 when the TPU is READY, 1 when it cannot become READY.
tpu_watch() {
  local _dry_run _yes _rest state last=''
  local tpu=(gcloud compute tpus tpu-vm describe) queue=(gcloud compute tpus queued-resources describe)
  _gcloud_begin PROJECT ZONE TPU_NAME -- "$@" || return
  tpu+=("$TPU_NAME" --zone="$ZONE" --project="$PROJECT" '--format=value(state)')
  queue+=("${QUEUE_NAME:-$TPU_NAME}" --zone="$ZONE" --project="$PROJECT" '--format=value(state.state)')
  if [[ -n $_dry_run ]]; then
    _gcloud_run "${tpu[@]}"
    _gcloud_run "${queue[@]}"
    return
  fi
  while true; do
    state=$(_gcloud_run "${tpu[@]}" 2>/dev/null) || state=''
    if [[ -z $state ]]; then
      state=$(_gcloud_run "${queue[@]}" 2>/dev/null) || state=''
      state=${state:+queue: $state}
    fi
    state=${state:-neither a TPU nor a queued resource with this name, or no connection}
    [[ $state == "$last" ]] || echo "$(date '+%H:%M:%S') $TPU_NAME: $state"
    last=$state
    case $state in
      READY) return 0 ;;
      PREEMPTED | TERMINATED | STOPPED | neither* | *FAILED | *SUSPENDED) return 1 ;;
    esac
    sleep "$WATCH_SECONDS" || return
  done
}

# Deletes a TPU VM created by tpu_create or tpu_create_spot. Asks first.
tpu_delete() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME -- "$@" || return
  _gcloud_confirm "Delete the TPU VM $TPU_NAME in $ZONE and everything on its disks?" || return
  _gcloud_run gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" --quiet
}

# Deletes a queued resource (tpu_queue, tpu_queue_spot) and its TPU VM. Asks first.
tpu_queue_delete() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME -- "$@" || return
  _gcloud_confirm "Delete the queued resource ${QUEUE_NAME:-$TPU_NAME} in $ZONE, its TPU VM and its disks?" ||
    return
  _gcloud_run gcloud compute tpus queued-resources delete "${QUEUE_NAME:-$TPU_NAME}" --zone="$ZONE" \
    --project="$PROJECT" --force --quiet
}

# ---- The bucket

# Creates the bucket, with uniform access, so that one command grants it to the TPU's service account.
bucket_create() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT BUCKET LOCATION -- "$@" || return
  _gcloud_run gcloud storage buckets create "gs://$BUCKET" --project="$PROJECT" --location="$LOCATION" \
    --uniform-bucket-level-access
}

# Lists the project's buckets.
bucket_list() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT -- "$@" || return
  _gcloud_run gcloud storage buckets list --project="$PROJECT" '--format=value(name,location)'
}

# Deletes the bucket with every run and checkpoint in it. Asks first.
# ("gcloud storage buckets delete" deletes only empty buckets.)
bucket_delete() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT BUCKET -- "$@" || return
  _gcloud_confirm "Delete gs://$BUCKET with every run and checkpoint in it?" || return
  _gcloud_run gcloud storage rm --recursive "gs://$BUCKET" --project="$PROJECT"
}
