# Keeps one program running on all workers of a machine, from a workstation: what tpu_pod.sh and eval_job.sh share.
# They source it with their variables set. In this order:
#   1. functions that run on the workers, sent there as text by declare -f
#   2. calls of gcloud
#   3. the machine: its state, creating it again
#   4. the workers: their state, start, stop, stream, fetch logs
#   5. the loop
#
# On every worker the job has one directory (JOB_DIR, in the home directory):
#   source/              the copied source; venv/ its environment; install.log
#   attempt, command_id  the id of this start, and the checksum of its command line
#   lock                 locked while any process of the job lives; this, not a pid, shows that a run is alive
#   pid, child           the supervising process, and the program
#   exit_code            of the program, once it has ended; stopped: exists if a person stopped it
#   logs/ATTEMPT.log     all output of the program
# shellcheck shell=bash
# shellcheck disable=SC2153,SC2154  # the variables of the two scripts

# ---- 1. On the workers. All are idempotent: gcloud repeats a command whose connection broke.

# Prints one line that names this worker. It is short, so that the lines of many workers do not interleave.
remote_say() {
  local number url=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
  number=$(curl -sf -m 5 -H 'Metadata-Flavor: Google' "$url") || number=${HOSTNAME##*-w-}
  [[ $number =~ ^[0-9]+$ ]] || number=0 # a single-host machine
  printf 'launch: %s %s\n' "$number" "$*"
}

# Returns 0 if any process of the job lives.
remote_alive() {
  [[ -e $1/lock ]] && ! flock --shared --nonblock "$1/lock" true
}

# Prints "status ATTEMPT COMMAND STATE". STATE is none, running, stopped, lost (ended without an exit code, for example
# because the host restarted) or the exit code.
remote_status() {
  cd || return
  local state=none attempt=- command=-
  if [[ -e $1/attempt ]]; then
    attempt=$(<"$1/attempt") command=$(<"$1/command_id") state=lost
    # Checks the lock first: between the two checks a run may end, but not begin.
    if remote_alive "$1"; then
      state=running
    elif [[ -e $1/stopped ]]; then
      state=stopped
    elif [[ -e $1/exit_code ]]; then
      state=$(<"$1/exit_code")
    fi
  fi
  remote_say "status $attempt $command $state"
}

# DIR TARBALL PYTHON EXTRAS [PIP_OPTION...]: unpacks and installs the source.
remote_install() {
  cd && mkdir -p "$1" || return
  local dir=$1 tarball=$2 python=$3 extras=$4
  shift 4
  if remote_alive "$dir"; then
    remote_say "failed a process of an earlier start is still running"
    return 1
  fi
  {
    rm -rf "$dir/source" && mkdir "$dir/source" && tar -xzf "$tarball" -C "$dir/source" &&
      # An environment of its own for each choice of packages: torch_xla and torch_tpu do not share one. Debian and
      # Ubuntu package venv separately.
      { [[ -e $dir/environment && $(<"$dir/environment") == "$python $extras" ]] ||
        "$python" -m venv --clear "$dir/venv" || {
        sudo apt-get update -q && sudo apt-get -o DPkg::Lock::Timeout=300 install -qy "$python-venv" &&
          "$python" -m venv --clear "$dir/venv"
      }; } &&
      echo "$python $extras" >"$dir/environment" &&
      "$dir/venv/bin/pip" install --no-input -e "$dir/source[$extras]" "$@"
  } >"$dir/install.log" 2>&1 </dev/null && remote_say ok && return
  tail -n 20 "$dir/install.log"
  remote_say "failed the installation; see ~/$dir/install.log there"
  return 1
}

# DIR SECONDS [mark]: asks the program to end (it saves, then exits with 75), and kills it after SECONDS. With mark, the
# job counts as stopped by a person, and no launcher restarts it.
remote_stop() {
  cd || return
  local dir=$1 seconds=$2 tries process # not _, which bash sets to the last argument of a command
  if remote_alive "$dir"; then
    [[ -z ${3:-} ]] || touch "$dir/stopped"
    kill -TERM "$(cat "$dir/child")"
    for ((tries = 0; tries < 5 * seconds; tries++)); do
      remote_alive "$dir" || break
      sleep 0.2
    done
  fi
  if remote_alive "$dir"; then
    kill -KILL -- "-$(cat "$dir/pid")"
    # Those of torchrun, which have sessions of their own.
    for process in /proc/[0-9]*; do
      [[ $(readlink "$process/cwd") != "$PWD/$dir/source" ]] || kill -KILL "${process#/proc/}"
    done
    sleep 1
  fi
  if remote_alive "$dir"; then
    remote_say "failed a process does not end when killed; restart the machine"
    return 1
  fi
  remote_say ok
}

# COMMAND...: runs the program in the job's directory, in its own session, with the lock as file descriptor 9.
remote_supervise() {
  local code=0
  echo $$ >pid
  # A signal to the whole session must not end the process that records the exit code. (Children get the default
  # handler.)
  trap : TERM HUP INT
  # exec: the program keeps the recorded pid.
  (cd source && exec bash -c 'echo "$BASHPID" >../child && exec "$@"' run "$@") || code=$?
  echo "[$(date -u '+%F %T')] ended with exit code $code"
  echo "$code" >exit_code.new && mv exit_code.new exit_code
  kill -KILL -- -$$ # processes that the program leaves behind would hold the accelerator and the lock
}

# DIR ATTEMPT ID SOURCE COMMAND...: starts COMMAND in the directory of the source, independent of this connection.
remote_start() {
  cd && cd "$1" || return
  local attempt=$2 command=$3 source=$4 tries
  shift 4
  if [[ -e attempt && $(<attempt) == "$attempt" ]]; then
    remote_say ok # it was started before the connection broke
    return
  fi
  exec 9>>lock
  if ! flock --wait 10 9; then
    remote_say "failed a process of an earlier start is still running"
    return 1
  fi
  rm -f exit_code stopped pid child
  mkdir -p logs
  echo "[$(date -u '+%F %T')] $(hostname): source $source:$(printf ' %q' "$@")" >"logs/$attempt.log"
  echo "$command" >command_id
  setsid nohup bash -c "$(declare -f remote_supervise); remote_supervise \"\$@\"" supervise "$@" \
    >>"logs/$attempt.log" 2>&1 </dev/null &
  echo "$attempt" >attempt
  for ((tries = 0; tries < 50; tries++)); do
    [[ ! -s child ]] || break
    sleep 0.1
  done
  remote_say ok
}

# DIR ATTEMPT: prints the log as it grows, until the program ends.
remote_stream() {
  cd && cd "$1" || return
  tail --pid="$(cat pid)" --sleep-interval=0.2 -n 100 -F "logs/$2.log" 2>/dev/null
}

# DIR ATTEMPT: prints the log.
remote_log() {
  cd && cat "$1/logs/$2.log"
}

# ---- 2. gcloud

say() { printf '%s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

usage_error() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints gcloud's last error, or its last line, to append to a one-line message.
gcloud_says() {
  local lines line
  lines=$(tail -n 20 "$local_dir/gcloud.log" 2>/dev/null | tr -d '\r') || lines=''
  line=$(grep '^ERROR' <<<"$lines" | tail -n 1) || line=${lines##*$'\n'}
  printf '%s' "${line:+ (gcloud: $line)}"
}

# Runs gcloud, or prints the command on a dry run. gcloud's messages go to gcloud.log. (--quiet keeps it from asking.)
call_gcloud() {
  if [[ -n $dry_run ]]; then
    _gcloud_quote gcloud "$@"
  else
    gcloud "$@" 2>>"$local_dir/gcloud.log" </dev/null
  fi
}

# WORKER FUNCTION ARGUMENTS...: runs one of the functions above on a worker, or on "all". The text is quoted for the
# worker's login shell, which need not be bash, and starts bash.
remote() {
  local worker=$1 function=$2 text
  shift 2
  text=$(declare -f remote_say remote_alive "$function")
  [[ $function != remote_start ]] || text+=$'\n'$(declare -f remote_supervise)
  text=$(_gcloud_quote bash -c "$text"$'\n'"$function \"\$@\"" "$function" "$@")
  if [[ $MACHINE == vm ]]; then
    call_gcloud compute ssh "$NAME" --zone="$ZONE" --project="$PROJECT" --quiet --command="$text"
  else
    call_gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --project="$PROJECT" --worker="$worker" --quiet \
      --command="$text"
  fi
}

# STEP FUNCTION ARGUMENTS...: runs a function on all workers. Returns 0 if each reported ok, 1 if one did not answer. A
# worker that reports a failure ends the script: a retry would not help.
on_all() {
  local step=$1 code=0 worker out=$local_dir/$1.$$
  shift
  if [[ -n $dry_run ]]; then
    remote all "$@"
    return
  fi
  remote all "$@" >"$out" || code=$?
  for ((worker = 0; worker < workers; worker++)); do
    if grep -q "^launch: $worker failed" "$out"; then
      grep -v '^launch:' "$out" >&2 || true
      die "step '$step' failed on worker $worker of $NAME:$(sed -n "s/^launch: $worker failed//p" "$out" | head -n 1)"
    fi
    grep -q "^launch: $worker ok" "$out" || code=1
  done
  rm -f "$out"
  return "$code"
}

# ---- 3. The machine

# Sets workers, and state: READY, GONE, UNKNOWN (gcloud failed), or Google's own name for it.
poll_machine() {
  local command=(compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --project="$PROJECT")
  local out ready=READY error=$local_dir/describe.$$
  if [[ $MACHINE == vm ]]; then
    command=(compute instances describe "$NAME" --zone="$ZONE" --project="$PROJECT" '--format=value(status)')
    ready=RUNNING
  else
    command+=('--format=value(state,networkEndpoints[].ipAddress)')
  fi
  if [[ -n $dry_run ]]; then
    _gcloud_quote gcloud "${command[@]}"
    return
  fi
  if out=$(gcloud "${command[@]}" 2>"$error" </dev/null); then
    read -r state out <<<"$out"
    [[ $state != "$ready" ]] || state=READY
    # The addresses are separated by semicolons.
    out=${out//[^;,]/}
    workers=$((${#out} + 1))
    if [[ $MACHINE == vm ]]; then workers=1; fi
    seen=1
  elif grep -qi 'not.found' "$error"; then
    state=GONE
  else
    state=UNKNOWN
  fi
  cat "$error" >>"$local_dir/gcloud.log"
  rm -f "$error"
}

# Prints the state of the queued resource, or nothing.
queue_state() {
  [[ $PROVISIONING == queue* ]] || return 0
  local error=$local_dir/queue.$$
  gcloud compute tpus queued-resources describe "${QUEUE_NAME:-$NAME}" --zone="$ZONE" --project="$PROJECT" \
    '--format=value(state.state)' 2>"$error" </dev/null || grep -qi 'not.found' "$error" || echo UNKNOWN
}

# Returns when the machine is ready. Creates a preempted machine again as PROVISIONING says; ends the script if the
# machine cannot become ready.
await_machine() {
  local last='' queue unknown=0
  while true; do
    poll_machine
    [[ -z $dry_run ]] || return 0
    if [[ $state == GONE ]]; then
      queue=$(queue_state)
      case $queue in
        UNKNOWN) state=UNKNOWN ;;
        ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING | ACTIVE) state="in the queue: $queue" ;;
        FAILED) die "the queued resource ${QUEUE_NAME:-$NAME} is FAILED; see tpu_queue_list of gcloud.bash" ;;
      esac
    fi
    [[ $state == "$last" || $state == READY ]] || say "$NAME is $state"
    last=$state
    case $state in
      READY)
        ((workers <= MAX_WORKERS)) || die "$NAME has $workers hosts, this job needs $MAX_WORKERS: use another machine"
        return ;;
      UNKNOWN)
        ((++unknown <= MAX_FAILURES)) ||
          die "step 'describe' failed: state of $NAME unknown$(gcloud_says); its programs keep running; run this again"
        pause "$RESTART_PAUSE" ;;
      PREEMPTED | TERMINATED | SUSPENDED | GONE) create_again ;;
      STOPPED) die "$NAME is stopped; start it with: gcloud compute tpus tpu-vm start $NAME --zone=$ZONE" ;;
      *) pause "$POLL_SECONDS" ;;
    esac
  done
}

# Counts a restart and waits before it.
count_restart() {
  ((++restarts <= MAX_RESTARTS)) ||
    die "$NAME: restarted $MAX_RESTARTS times (MAX_RESTARTS), last because $1; run this again to resume"
  say "restart $restarts of at most $MAX_RESTARTS, in $RESTART_PAUSE s: $1"
  pause "$RESTART_PAUSE"
}

# Creates the machine again, as it was created before.
create_again() {
  [[ -n $seen ]] ||
    die "there is no machine $NAME in $ZONE of $PROJECT: create it; a TPU with: source gcloud.bash && tpu_create"
  if [[ $PROVISIONING == on_demand ]]; then
    die "$NAME is $state and PROVISIONING=on_demand: delete and create it, then run this again to resume"
  fi
  count_restart "$NAME is $state"
  installed=''
  watched=''
  stop_stream
  recreate >>"$local_dir/gcloud.log" 2>&1 || say "creating $NAME failed$(gcloud_says)"
}

# Runs the commands that create it, or prints them on a dry run.
recreate() {
  if [[ $MACHINE == vm ]]; then
    call_gcloud compute instances start "$NAME" --zone="$ZONE" --project="$PROJECT"
    return
  fi
  # shellcheck disable=SC2034  # gcloud.bash reads these variables
  local TPU_NAME=$NAME DRY_RUN=$dry_run
  case $PROVISIONING in
    spot)
      [[ $state == GONE ]] || tpu_delete --yes || true
      tpu_create_spot --quiet ;;
    queue)
      tpu_queue_delete --yes || true
      tpu_queue --quiet ;;
    queue_spot)
      tpu_queue_delete --yes || true
      tpu_queue_spot --quiet ;;
  esac
}

# ---- 4. The workers

# Asks all workers for their status. Sets attempt, broken (a list of the failed workers), and verdict:
#   none         nothing was ever started
#   running      all run the same start of this command, or have finished it
#   ending       some have ended without success, others still run
#   foreign      another command runs
#   torn         workers run, or ran, different starts
#   finished, interrupted, stopped, failed: all have ended
# Sets ended to one of the last four, for the workers that have ended. Returns 1 if a worker does not answer.
poll_workers() {
  local out=$local_dir/status.$$ worker line a command s
  local running=0 none=0 finished=0 interrupted=0 stopped=0 foreign=0 torn=0
  broken='' attempt='' ended=finished
  if [[ -n $dry_run ]]; then
    remote all remote_status "$JOB_DIR"
    return
  fi
  remote all remote_status "$JOB_DIR" >"$out" || return 1
  for ((worker = 0; worker < workers; worker++)); do
    line=$(sed -n "s/^launch: $worker status //p" "$out" | tail -n 1)
    [[ -n $line ]] || return 1
    read -r a command s <<<"$line"
    [[ -z $attempt || $a == "$attempt" ]] || torn=1
    attempt=$a
    case $s in
      running)
        running=$((running + 1))
        [[ $command == "$command_id" ]] || foreign=1 ;;
      none) none=$((none + 1)) ;;
      0) finished=$((finished + 1)) ;;
      75 | 143 | lost) interrupted=$((interrupted + 1)) ;;
      stopped) stopped=$((stopped + 1)) ;;
      *) broken+="${broken:+ }$worker:$s" ;;
    esac
  done
  rm -f "$out"
  if ((stopped)); then
    ended=stopped
  elif ((interrupted)); then
    ended=interrupted # the failures of the others follow from it
  elif [[ -n $broken ]]; then
    ended=failed
  fi
  verdict=$ended
  if ((foreign)); then
    verdict=foreign
  elif ((torn)); then
    verdict=torn
  elif ((none == workers)); then
    verdict=none
  elif ((running && running + finished == workers)); then
    verdict=running
  elif ((running)); then
    verdict=ending
  fi
}

# Packs the committed source, so that a commit identifies what runs.
pack_source() {
  local dirty=''
  commit=$(git -C "$root" rev-parse HEAD 2>/dev/null) || die "$root is not a git checkout: there is no source to copy"
  tarball=$local_dir/source-${commit:0:12}.tar.gz
  dirty=$(git -C "$root" status --porcelain | head -n 3 | cut -c 4- | tr '\n' ' ') || true
  [[ -z $dirty ]] || say "warning: only committed files are copied, without: $dirty…" >&2
  if [[ -n $dry_run ]]; then
    _gcloud_quote mkdir -p "$local_dir"
    _gcloud_quote git -C "$root" archive --format=tar.gz --output="$tarball" "$commit"
  else
    git -C "$root" archive --format=tar.gz --output="$tarball" "$commit" || die "step 'pack the source' failed"
  fi
}

copy_source() {
  if [[ $MACHINE == vm ]]; then
    call_gcloud compute scp "$tarball" "$NAME:$JOB_DIR.tar.gz" --zone="$ZONE" --project="$PROJECT" --quiet
  else
    call_gcloud compute tpus tpu-vm scp "$tarball" "$NAME:$JOB_DIR.tar.gz" --zone="$ZONE" --project="$PROJECT" \
      --worker=all --quiet
  fi
}

# Stops old processes on all workers, installs (once per machine and call of this script), and starts the program on
# all. Sets step to the current step. Returns 1 if it failed for a reason that a retry may overcome.
launch() {
  local new
  new=$(date -u +%Y%m%d-%H%M%S)-$$-$((++launches))
  step='stop old processes'
  on_all stop remote_stop "$JOB_DIR" "$STOP_SECONDS" || return 1
  if [[ -z $installed ]]; then
    step='copy the source'
    say "# copying ${commit:0:12} to all workers of $NAME"
    copy_source || return 1
    step='install'
    say "# installing (takes minutes the first time)"
    on_all install remote_install "$JOB_DIR" "$JOB_DIR.tar.gz" "$REMOTE_PYTHON" "$EXTRAS" \
      ${pip_options[@]+"${pip_options[@]}"} ||
      return 1
    installed=1
  fi
  step='start'
  say "# starting on all workers"
  on_all start remote_start "$JOB_DIR" "$new" "$command_id" "${commit:0:12}" "${command[@]}" || return 1
  watched=$new
}

# Streams worker 0's log, in a process group of its own, to end gcloud's children with it; disowned, so that bash does
# not report its end.
keep_stream() {
  if [[ -n $stream ]] && kill -0 "$stream" 2>/dev/null; then return; fi
  [[ -z $stream ]] || say "# the stream of worker 0 broke; it continues from the last 100 lines"
  set -m
  remote 0 remote_stream "$JOB_DIR" "$watched" &
  stream=$!
  set +m
  disown "$stream" 2>/dev/null || true
}

stop_stream() {
  [[ -n $stream ]] || return 0
  kill -TERM -- "-$stream" 2>/dev/null || true
  stream=''
}

cleanup() {
  stop_stream
  rm -f "$local_dir"/*.$$
}

# Waits for the last lines: the stream ends by itself after the program.
finish_stream() {
  local tries
  for ((tries = 0; tries < 30; tries++)); do
    if [[ -z $stream ]] || ! kill -0 "$stream" 2>/dev/null; then break; fi
    sleep 0.1
  done
  stop_stream
}

# Fetches the log of every worker, eight at a time.
fetch_logs() {
  local worker
  log_dir=$local_dir/$attempt
  if [[ -n $dry_run ]]; then
    remote 0 remote_log "$JOB_DIR" "$attempt"
    return
  fi
  mkdir -p "$log_dir"
  for ((worker = 0; worker < workers; worker++)); do
    { remote "$worker" remote_log "$JOB_DIR" "$attempt" >"$log_dir/worker-$worker.log" ||
      say "warning: no log from worker $worker$(gcloud_says)" >&2; } &
    ((worker % 8 < 7)) || wait
  done
  wait
  say "# logs of all workers: $log_dir/worker-*.log"
}

# ---- 5. The loop

pause() { sleep "$1"; }

# STEP: retries after a step failed for want of a connection, at most MAX_FAILURES times in a row.
retry() {
  ((++failures <= MAX_FAILURES)) ||
    die "step '$1' failed $failures times on $NAME$(gcloud_says); see $local_dir/gcloud.log, then run this again:" \
      "it attaches to a live run, and starts all workers together otherwise"
  say "step '$1' failed$(gcloud_says); retrying in $RESTART_PAUSE s ($failures of $MAX_FAILURES)"
  pause "$RESTART_PAUSE"
  await_machine
}

# Prints the commands in order, for a machine that is ready and idle.
print_plan() {
  local attempt
  say "# the machine: does it exist?"
  await_machine
  say "# the workers: is the run alive? (then this attaches to it, and copies and starts nothing)"
  poll_workers
  say "# otherwise: stop old processes, copy the source, install, start"
  pack_source
  launch
  attempt=$watched
  say "# stream worker 0, and poll all workers every $POLL_SECONDS s, as above"
  remote 0 remote_stream "$JOB_DIR" "$attempt"
  say "# at the end, for each worker, into $local_dir/$attempt/worker-N.log"
  fetch_logs
  say "# if the program exits with 75: stop and start as above, at most $MAX_RESTARTS times (MAX_RESTARTS)"
  if [[ $PROVISIONING == on_demand ]]; then
    say "# if the machine is preempted: the script ends (PROVISIONING=on_demand)"
  else
    say "# if the machine is preempted: create it again, then copy, install and start as above"
    recreate
  fi
}

stop_job() {
  poll_machine
  [[ -n $dry_run || $state == READY ]] ||
    die "$NAME is $state$(gcloud_says): there is nothing to stop, or no connection"
  on_all stop remote_stop "$JOB_DIR" "$STOP_SECONDS" mark ||
    die "step 'stop' failed on $NAME$(gcloud_says); see $local_dir/gcloud.log, then run this again"
  [[ -n $dry_run ]] || say "stopped on all workers of $NAME; the run resumes when it is started again"
}

# Handles an interrupt: detaches from the run. It may come at any time, also while output is redirected to a file.
detach() {
  exec >&3 2>&4
  [[ -n $watched ]] || die "interrupted before all workers were started; run this again to start them together"
  say "detached: the run on $NAME keeps running; the same command attaches to it, --stop ends it"
  exit 130
}

# Parses the script's own arguments; arguments receives those of the program.
read_arguments() {
  dry_run=${DRY_RUN:-} stop='' arguments=()
  local argument
  for argument in "$@"; do
    case $argument in
      --dry_run) dry_run=1 ;;
      --stop) stop=1 ;;
      --workdir | --workdir=*) usage_error "$argument: set the workdir with: export WORKDIR=gs://…" ;;
      --device | --device=*) usage_error "$argument: leave it out; this script sets the machine's device" ;;
      *) arguments+=("$argument") ;;
    esac
  done
}

# VALUES...: checks that PROVISIONING is one of them.
check_provisioning() {
  [[ " $* " == *" $PROVISIONING "* ]] || usage_error "PROVISIONING=$PROVISIONING: expected one of $*"
}

# Starts "${command[@]}" on all workers, or attaches to it, and keeps it running to its end.
run_job() {
  local_dir=$LOG_DIR/$NAME
  command_id=$(printf '%s\n' "${command[@]}" | cksum | cut -d ' ' -f 1)
  state='' workers=1 seen='' installed='' watched='' attempt='' verdict='' ended='' broken='' stream='' step=''
  log_dir='' commit='' tarball='' restarts=0 failures=0 launches=0
  local ending_since='' handled='' worker
  if [[ -n $dry_run ]]; then
    if [[ -n $stop ]]; then stop_job; else print_plan; fi
    return
  fi
  command -v gcloud >/dev/null ||
    usage_error "gcloud is not on the PATH: install it from https://cloud.google.com/sdk/docs/install"
  mkdir -p "$local_dir"
  if [[ -n $stop ]]; then
    stop_job
    return
  fi
  pack_source
  exec 3>&1 4>&2
  trap cleanup EXIT
  trap detach INT TERM HUP
  await_machine
  while true; do
    if ! poll_workers; then
      retry status
      continue
    fi
    case $verdict in
      foreign)
        die "$NAME runs another command, or this one with other arguments; stop it first with: $0 --stop" ;;
      running)
        failures=0 ending_since=''
        if [[ $attempt != "$watched" ]]; then
          say "# attached to the live run on $NAME (its source does not change)"
          stop_stream
          watched=$attempt
        fi
        keep_stream
        pause "$POLL_SECONDS"
        continue ;;
      ending)
        # When one worker has ended, the others need a moment to notice and to save.
        watched=$attempt
        ending_since=${ending_since:-$SECONDS}
        if [[ $attempt != "$handled" ]] && ((SECONDS - ending_since < GRACE_SECONDS)); then
          pause "$POLL_SECONDS"
          continue
        fi
        verdict=$ended ;;
      torn)
        say "# not all workers run the same start: stopping all, then starting them together"
        installed='' ;;
      none) installed='' ;;
    esac
    ending_since=''
    # Here all have ended, were never started, or must be stopped. A start that ended before this script saw it run, or
    # that was handled already, is history: start again.
    if [[ $verdict != torn && -n $watched && $attempt == "$watched" && $attempt != "$handled" ]]; then
      finish_stream
      fetch_logs
      case $verdict in
        finished)
          say "done: all $workers workers of $NAME ended with exit code 0"
          exit 0 ;;
        stopped)
          say "stopped by request; the same command resumes"
          exit 0 ;;
        failed)
          on_all stop remote_stop "$JOB_DIR" "$STOP_SECONDS" || say "warning: not all workers could be stopped" >&2
          worker=${broken%% *}
          die "worker ${worker%%:*} of $NAME exited with ${worker##*:}; read $log_dir/worker-${worker%%:*}.log" ;;
        interrupted)
          count_restart "the program was interrupted (exit code 75, or its host restarted)"
          handled=$attempt
          # Another launcher may have started it in the meantime: poll again, and start only if none has.
          continue ;;
      esac
    fi
    stop_stream
    if launch; then keep_stream; else retry "$step"; fi
  done
}
