#!/usr/bin/env bash
# Runs several experiments one after the other, each in its own directory below WORKDIR.
#
#   WORKDIR=/tmp/ablations launch/sweep.sh experiments/ablations/*.gin
#   WORKDIR=/tmp/lr GIN_FILE=experiments/jet_digits.gin launch/sweep.sh 'make_optimizer.lr = 1e-3' \
#     'make_optimizer.lr = 2e-3; Jet.depth = 8' -- --gin_bindings='TOTAL_STEPS = 300'
#
# Each argument is a run: a gin file, or gin bindings separated by ";" on top of GIN_FILE. "@FILE" stands for the lines
# of a file, without empty lines and those that begin with "#". Arguments after "--" apply to all runs. A run is named
# after its file or its bindings; "NAME: …" names it NAME. --dry_run prints the commands and runs none.
#
# LAUNCHER starts a run; it receives the run's arguments, --workdir included, and WORKDIR in its environment:
#   LAUNCHER=launch/gpu.sh      all GPUs of this host        LAUNCHER=launch/tpu_pod.sh      a TPU, from a workstation
#
# Started again, the same command continues where it stopped: it skips runs that have finished with the same arguments
# and resumes interrupted ones. On SIGTERM or Ctrl-C, or when a run exits with 75, it exits with 75. Failed runs do not
# stop the others; they are listed at the end, and the exit code is 1. Logs are in LOG_DIR. At the end, a table shows
# the last values of all runs below WORKDIR, and WORKDIR/report.html shows them side by side.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# To be set by you:
#   WORKDIR          a directory, or gs://…: each run's workdir is below it
#   GIN_FILE         the experiment, for runs given by bindings
LAUNCHER=${LAUNCHER:-python -m jetformer.main} # starts a run; words are separated by blanks
LOG_DIR=${LOG_DIR:-}                           # logs, and markers of finished runs; default: in WORKDIR

fail() {
  echo "error: $1" >&2
  exit 2
}

runs=() common=() dry_run=
while (($#)); do
  case $1 in
    --dry_run) dry_run=1 ;;
    --)
      shift
      common=("$@")
      break ;;
    -*) fail "$1 is not a run: put arguments for all runs after --" ;;
    @*)
      [[ -r ${1#@} ]] || fail "file ${1#@} does not exist"
      while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^[[:space:]]*(#|$) ]] || runs+=("$line")
      done <"${1#@}" ;;
    *) runs+=("$1") ;;
  esac
  shift
done
((${#runs[@]})) || fail "no runs: give gin files, bindings, or @FILE with one per line"
WORKDIR=${WORKDIR:-}
WORKDIR=${WORKDIR%/}
[[ -n $WORKDIR ]] || fail "WORKDIR is not set; set it with: export WORKDIR=/tmp/sweep"
read -r -a launcher <<<"$LAUNCHER"
if [[ -z $LOG_DIR ]]; then
  LOG_DIR=$WORKDIR/logs
  [[ $WORKDIR != *://* ]] || LOG_DIR=$root/logs/sweep-${WORKDIR//[^A-Za-z0-9._-]/_}
fi

# Sets `name` and `arguments` to a run's.
read_run() {
  local run=$1 binding
  name='' arguments=()
  if [[ $run =~ ^([A-Za-z0-9._-]+):[[:space:]]+(.*)$ ]]; then
    name=${BASH_REMATCH[1]} run=${BASH_REMATCH[2]}
  fi
  if [[ $run == *.gin ]]; then
    [[ -r $run || -r $root/$run ]] || fail "file $run does not exist"
    arguments=("--gin_file=$run")
    run=$(basename "$run" .gin)
  else
    [[ -n ${GIN_FILE:-} ]] || fail "GIN_FILE is not set: '$run' needs the experiment that it changes"
    arguments=("--gin_file=$GIN_FILE")
    local IFS=';'
    for binding in $run; do
      arguments+=("--gin_bindings=$(sed 's/^ *//; s/ *$//' <<<"$binding")")
    done
  fi
  # Removes blanks and replaces what cannot be in a name by "_".
  [[ -n $name ]] || name=$(sed 's/ *//g; s/[^A-Za-z0-9.=_-]\+/_/g; s/^_//; s/_$//' <<<"$run")
}

# Checks all runs before the first starts.
declare -A seen=()
for run in "${runs[@]}"; do
  read_run "$run"
  [[ -z ${seen[$name]:-} ]] || fail "two runs are named $name: rename one, as 'NAME: $run'"
  seen[$name]=1
done

stopped='' child=''
# shellcheck disable=SC2317,SC2329  # trap calls it
stop() {
  stopped=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

failed=()
for run in "${runs[@]}"; do
  read_run "$run"
  command=("${launcher[@]}" "--workdir=$WORKDIR/$name" "${arguments[@]}" ${common[@]+"${common[@]}"})
  if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    continue
  fi
  ended=$LOG_DIR/$name.ended # holds the command of a finished run
  if [[ -r $ended && $(<"$ended") == "${command[*]}" ]]; then
    echo "$name: finished already"
    continue
  fi
  mkdir -p "$LOG_DIR"
  echo "$name: ${command[*]}"
  since=$SECONDS code=0
  WORKDIR=$WORKDIR/$name "${command[@]}" </dev/null >>"$LOG_DIR/$name.log" 2>&1 &
  child=$!
  wait $child || code=$?
  while kill -0 $child 2>/dev/null; do # a signal interrupts wait
    code=0
    wait $child || code=$?
  done
  child=''
  if [[ -n $stopped ]] || ((code == 75)); then
    echo "$name: interrupted; the same command resumes it"
    exit 75
  elif ((code)); then
    failed+=("$name")
    echo "$name: failed with exit code $code; see $LOG_DIR/$name.log" >&2
  else
    echo "${command[*]}" >"$ended"
    echo "$name: finished after $((SECONDS - since)) s"
  fi
done
if [[ -z $dry_run && ($WORKDIR == *://* || -n $(compgen -G "$WORKDIR/*/config.gin")) ]]; then
  report=(python -m jetformer.report "--compare=$WORKDIR/*" "--out=$WORKDIR/report.html")
  printf '%q ' "${report[@]}"
  echo
  # A page that cannot be written, which says why, is no failed run.
  "${report[@]}" || true
fi
if ((${#failed[@]})); then
  echo "error: ${#failed[@]} of ${#runs[@]} runs failed: ${failed[*]}" >&2
  exit 1
fi
