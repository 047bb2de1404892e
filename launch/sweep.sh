#!/usr/bin/env bash
# Runs several experiments, one after the other, each in a directory of its own below WORKDIR.
#
#   WORKDIR=/tmp/ablations launch/sweep.sh experiments/ablations/*.gin
#   WORKDIR=/tmp/lr GIN_FILE=experiments/jet_digits.gin launch/sweep.sh 'make_optimizer.lr = 1e-3' \
#     'make_optimizer.lr = 2e-3; Jet.depth = 8' -- --gin_bindings='TOTAL_STEPS = 300'
#
# Each argument is a run: a gin file, or gin bindings with ";" between them, on top of GIN_FILE. "@FILE" stands for the
# lines of a file, of which empty ones and those that begin with "#" do not count. What follows "--" goes to all runs. A
# run is called by its file or its bindings; "NAME: …" calls it NAME. --dry_run prints the commands and runs none.
#
# LAUNCHER starts a run, and is given its arguments, --workdir among them (and WORKDIR in its environment):
#   LAUNCHER=launch/gpu.sh      all GPUs of this host        LAUNCHER=launch/tpu_pod.sh      a TPU, from a workstation
#
# Started again, the same command goes on where it stopped: runs that have ended with the same arguments are left out,
# those that were interrupted resume. On SIGTERM or Ctrl-C, and where a run ends with 75, it ends with 75. What fails is
# named at the end, the others go on, and the exit code is 1. Logs are in LOG_DIR.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# To be set by you:
#   WORKDIR          a directory, or gs://…: each run's workdir is below it
#   GIN_FILE         the experiment, where runs are given by bindings
LAUNCHER=${LAUNCHER:-python -m jetformer.main} # what starts a run; words are separated by blanks
LOG_DIR=${LOG_DIR:-}                           # where logs go, and what says which runs have ended; default: in WORKDIR

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
    -*) fail "$1 is no run: what goes to all runs follows --" ;;
    @*)
      [[ -r ${1#@} ]] || fail "there is no file ${1#@}"
      while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^[[:space:]]*(#|$) ]] || runs+=("$line")
      done <"${1#@}" ;;
    *) runs+=("$1") ;;
  esac
  shift
done
((${#runs[@]})) || fail "no runs: give gin files, bindings, or @FILE with one a line"
WORKDIR=${WORKDIR:-}
WORKDIR=${WORKDIR%/}
[[ -n $WORKDIR ]] || fail "WORKDIR is not set; set it with: export WORKDIR=/tmp/sweep"
read -r -a launcher <<<"$LAUNCHER"
if [[ -z $LOG_DIR ]]; then
  LOG_DIR=$WORKDIR/logs
  [[ $WORKDIR != *://* ]] || LOG_DIR=$root/logs/sweep-${WORKDIR//[^A-Za-z0-9._-]/_}
fi

# What a run is called, and its arguments, into `name` and `arguments`.
read_run() {
  local run=$1 binding
  name='' arguments=()
  if [[ $run =~ ^([A-Za-z0-9._-]+):[[:space:]]+(.*)$ ]]; then
    name=${BASH_REMATCH[1]} run=${BASH_REMATCH[2]}
  fi
  if [[ $run == *.gin ]]; then
    [[ -r $run || -r $root/$run ]] || fail "there is no file $run"
    arguments=("--gin_file=$run")
    run=$(basename "$run" .gin)
  else
    [[ -n ${GIN_FILE:-} ]] || fail "GIN_FILE is not set: it is the experiment that '$run' is a binding of"
    arguments=("--gin_file=$GIN_FILE")
    local IFS=';'
    for binding in $run; do
      arguments+=("--gin_bindings=$(sed 's/^ *//; s/ *$//' <<<"$binding")")
    done
  fi
  # Blanks go, and what is no part of a name becomes "_".
  [[ -n $name ]] || name=$(sed 's/ *//g; s/[^A-Za-z0-9.=_-]\+/_/g; s/^_//; s/_$//' <<<"$run")
}

# All is read before any is run.
declare -A seen=()
for run in "${runs[@]}"; do
  read_run "$run"
  [[ -z ${seen[$name]:-} ]] || fail "two runs are called $name: call one otherwise, as 'NAME: $run'"
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
  ended=$LOG_DIR/$name.ended # the command, once it has ended well
  if [[ -r $ended && $(<"$ended") == "${command[*]}" ]]; then
    echo "$name: has ended already"
    continue
  fi
  mkdir -p "$LOG_DIR"
  echo "$name: ${command[*]}"
  since=$SECONDS code=0
  WORKDIR=$WORKDIR/$name "${command[@]}" </dev/null >>"$LOG_DIR/$name.log" 2>&1 &
  child=$!
  wait $child || code=$?
  while kill -0 $child 2>/dev/null; do # a signal ends a wait
    code=0
    wait $child || code=$?
  done
  child=''
  if [[ -n $stopped ]] || ((code == 75)); then
    echo "$name: interrupted; the same command goes on from here"
    exit 75
  elif ((code)); then
    failed+=("$name")
    echo "$name: failed with code $code; see $LOG_DIR/$name.log" >&2
  else
    echo "${command[*]}" >"$ended"
    echo "$name: ended after $((SECONDS - since)) s"
  fi
done
if ((${#failed[@]})); then
  echo "error: ${#failed[@]} of ${#runs[@]} runs failed: ${failed[*]}" >&2
  exit 1
fi
