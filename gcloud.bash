# Creates, lists, opens, watches and deletes the TPU VMs of this project, and its bucket. For bash:
#
#   export PROJECT=my-project ZONE=us-west4-a TPU_NAME=pod
#   export ACCELERATOR_TYPE=v5litepod-16 RUNTIME_VERSION=v2-alpha-tpuv5-lite
#   source gcloud.bash
#   tpu_create --dry_run     # prints the command
#   tpu_create               # runs it
#
# A function takes --dry_run (or DRY_RUN=1 in the environment): it then prints its commands and runs none. Those that
# delete ask first, unless given --yes. These two come first; all further arguments go to gcloud as they are. A variable
# that a function needs and does not find ends it with code 2 and one line. No shell option of the caller is changed.
# shellcheck shell=bash
# shellcheck disable=SC2154  # _dry_run, _yes and _rest are locals of the calling function, which _gcloud_begin sets

if [ -z "${BASH_VERSION:-}" ]; then
  echo "error: gcloud.bash is for bash: start bash, then source it" >&2
  return 1
fi

# Every name and zone. The environment's values hold; what a person must choose has no default.
: "${PROJECT:=}"           # the Google Cloud project's id
: "${ZONE:=}"              # the zone of the TPU, such as us-west4-a
: "${TPU_NAME:=}"          # what the TPU VM is called
: "${ACCELERATOR_TYPE:=}"  # kind and number of chips, such as v5litepod-16
: "${RUNTIME_VERSION:=}"   # the TPU VM's software, such as v2-alpha-tpuv5-lite
: "${QUEUE_NAME:=}"        # what the queued resource is called; empty: as the TPU
: "${BUCKET:=}"            # the bucket's name, without gs://
: "${LOCATION:=}"          # the region of the bucket, such as us-west4: that of the TPU, or reads cost more
: "${WATCH_SECONDS:=30}"   # seconds between two looks of tpu_watch

# ---- Helpers; the launch scripts use them too.

# Prints its arguments as one line that any POSIX shell reads back as the same arguments.
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

# Fails with code 2 and one line for the first variable, of those named, that is empty.
_gcloud_need() {
  local name example
  for name in "$@"; do
    [[ -n ${!name:-} ]] && continue
    case $name in
      PROJECT) example="my-project (the Google Cloud project's id)" ;;
      ZONE) example='us-west4-a (the zone of the machine)' ;;
      TPU_NAME) example='pod (what the TPU VM is called)' ;;
      ACCELERATOR_TYPE) example='v5litepod-16 (kind and number of chips)' ;;
      RUNTIME_VERSION) example="v2-alpha-tpuv5-lite (the TPU VM's software)" ;;
      BUCKET) example='my-bucket (its name, without gs://)' ;;
      LOCATION) example='us-west4 (the region of the bucket)' ;;
      WORKDIR) example='gs://my-bucket/run (where the run is written to and resumed from)' ;;
      EVAL_NAME) example='eval (what the machine of the evaluation is called)' ;;
      EVAL_MACHINE) example='tpu, or vm for a Compute Engine VM (the kind of machine)' ;;
      *) example='…' ;;
    esac
    echo "error: $name is not set; set it with: export $name=$example" >&2
    return 2
  done
}

# The beginning of every function: NAMES... -- ARGUMENTS... . Checks that the variables are set, takes --dry_run and
# --yes off the arguments, and leaves _dry_run, _yes and _rest to the function, whose locals they are.
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
    echo "error: no gcloud on the PATH: install it from https://cloud.google.com/sdk/docs/install" >&2
    return 2
  fi
}

# Runs a command with the rest of the function's arguments behind it, or prints it on a dry run.
_gcloud_run() {
  set -- "$@" ${_rest[@]+"${_rest[@]}"}
  if [[ -n $_dry_run ]]; then
    _gcloud_quote "$@"
  else
    "$@"
  fi
}

# Asks whether to go on, unless --yes was given.
_gcloud_confirm() {
  local answer=''
  [[ -n $_yes || -n $_dry_run ]] && return
  read -r -p "$1 [y/N] " answer
  [[ $answer == [yY]* ]] && return
  echo "nothing was deleted" >&2
  return 1
}

# ---- TPU VMs

# Creates the TPU VM on demand, and returns when it is there (or there is no capacity).
tpu_create() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION -- "$@" || return
  _gcloud_run gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" \
    --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION"
}

# The same as a spot VM: cheaper, and Google takes it away at any time.
tpu_create_spot() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION -- "$@" || return
  _gcloud_run gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" \
    --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" --spot
}

# Asks for the TPU VM as a queued resource: returns at once; the TPU comes when there is capacity (tpu_watch).
tpu_queue() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION -- "$@" || return
  _gcloud_run gcloud compute tpus queued-resources create "${QUEUE_NAME:-$TPU_NAME}" --zone="$ZONE" \
    --project="$PROJECT" --node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION"
}

# The same for a spot VM.
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

# A shell on worker 0. tpu_ssh --worker=3 for another, tpu_ssh --worker=all --command=uptime for a command on all.
tpu_ssh() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME -- "$@" || return
  _gcloud_run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --project="$PROJECT"
}

# Prints the TPU VM's state now and whenever it changes, and that of its queued resource while there is no VM yet.
# Returns 0 as soon as the TPU is READY, and 1 when it will not become that.
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
    state=${state:-neither a TPU nor a queued resource of this name, or no connection}
    [[ $state == "$last" ]] || echo "$(date '+%H:%M:%S') $TPU_NAME: $state"
    last=$state
    case $state in
      READY) return 0 ;;
      PREEMPTED | TERMINATED | STOPPED | neither* | *FAILED | *SUSPENDED) return 1 ;;
    esac
    sleep "$WATCH_SECONDS" || return
  done
}

# Deletes a TPU VM made with tpu_create or tpu_create_spot. Asks first.
tpu_delete() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME -- "$@" || return
  _gcloud_confirm "Delete the TPU VM $TPU_NAME in $ZONE and everything on its disks?" || return
  _gcloud_run gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" --quiet
}

# Deletes a queued resource together with its TPU VM (tpu_queue, tpu_queue_spot). Asks first.
tpu_queue_delete() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT ZONE TPU_NAME -- "$@" || return
  _gcloud_confirm "Delete the queued resource ${QUEUE_NAME:-$TPU_NAME} in $ZONE, its TPU VM and all on its disks?" ||
    return
  _gcloud_run gcloud compute tpus queued-resources delete "${QUEUE_NAME:-$TPU_NAME}" --zone="$ZONE" \
    --project="$PROJECT" --force --quiet
}

# ---- The bucket

# Creates the bucket. One set of rights for all of it, so that the TPU's service account can be given them in one go.
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

# Deletes the bucket with all that is in it: every run and its checkpoints. Asks first.
# ("gcloud storage buckets delete" takes an empty bucket only.)
bucket_delete() {
  local _dry_run _yes _rest
  _gcloud_begin PROJECT BUCKET -- "$@" || return
  _gcloud_confirm "Delete gs://$BUCKET with every run and checkpoint in it?" || return
  _gcloud_run gcloud storage rm --recursive "gs://$BUCKET" --project="$PROJECT"
}
