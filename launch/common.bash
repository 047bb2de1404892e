# What tpu_pod.sh and eval_job.sh share: one program kept going on all workers of a machine, from a workstation.
# Sourced by them, with their variables set. In this order:
#   1. the functions that run on the workers; they are sent there as text, with declare -f
#   2. calls of gcloud
#   3. the machine: is it there, does it have to be created again
#   4. the workers: what they do, start, stop, stream, fetch logs
#   5. the loop
#
# On every worker the job lives in one directory (JOB_DIR, in the home directory):
#   source/              the copied source; venv/ its environment; install.log
#   attempt, command_id  which start this is, and the checksum of its command line
#   lock                 locked as long as any process of the job lives; this, and no pid, tells a run that is going
#   pid, child           the process that waits for the program, and the program
#   exit_code            of the program, once it has ended; stopped: somebody asked for the end
#   logs/ATTEMPT.log     all output of the program
# shellcheck shell=bash
# shellcheck disable=SC2153,SC2154  # the variables of the two scripts

# ---- 1. On the workers. All are safe to run twice: gcloud repeats a command whose connection broke.

# One line on stdout that names this worker. It is short, so that those of many workers do not mix.
remote_say() {
  local number url=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
  number=$(curl -sf -m 5 -H 'Metadata-Flavor: Google' "$url") || number=${HOSTNAME##*-w-}
  [[ $number =~ ^[0-9]+$ ]] || number=0 # a machine of one host
  printf 'launch: %s %s\n' "$number" "$*"
}

# Whether any process of the job lives.
remote_alive() {
  [[ -e $1/lock ]] && ! flock --shared --nonblock "$1/lock" true
}

# Says "status ATTEMPT COMMAND STATE"; STATE is none, running, stopped, lost (it ended without an exit code, as when the
# host restarts) or the exit code.
remote_status() {
  cd || return
  local state=none attempt=- command=-
  if [[ -e $1/attempt ]]; then
    attempt=$(<"$1/attempt") command=$(<"$1/command_id") state=lost
    # The lock first: between the two looks a run may end, but not begin.
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

# DIR TARBALL EXTRAS [PIP_OPTION...]: unpacks the source and installs it.
remote_install() {
  cd && mkdir -p "$1" || return
  local dir=$1 tarball=$2 extras=$3
  shift 3
  if remote_alive "$dir"; then
    remote_say "failed a process of an earlier start still runs"
    return 1
  fi
  {
    rm -rf "$dir/source" && mkdir "$dir/source" && tar -xzf "$tarball" -C "$dir/source" &&
      # Debian and Ubuntu have venv in a package of its own.
      { [[ -x $dir/venv/bin/pip ]] || python3 -m venv "$dir/venv" || {
        sudo apt-get update -q && sudo apt-get -o DPkg::Lock::Timeout=300 install -qy python3-venv &&
          python3 -m venv --clear "$dir/venv"
      }; } &&
      "$dir/venv/bin/pip" install --no-input -e "$dir/source[$extras]" "$@"
  } >"$dir/install.log" 2>&1 </dev/null && remote_say ok && return
  tail -n 20 "$dir/install.log"
  remote_say "failed the installation; its log is ~/$dir/install.log there"
  return 1
}

# DIR SECONDS [mark]: asks the program to end (it saves, then exits with 75), and kills what is left after SECONDS.
# With mark the job counts as stopped by a person, and no launcher that watches it starts it again.
remote_stop() {
  cd || return
  local dir=$1 seconds=$2 _
  if remote_alive "$dir"; then
    [[ -z ${3:-} ]] || touch "$dir/stopped"
    kill -TERM "$(cat "$dir/child")"
    for ((_ = 0; _ < 5 * seconds; _++)); do
      remote_alive "$dir" || break
      sleep 0.2
    done
  fi
  if remote_alive "$dir"; then
    kill -KILL -- "-$(cat "$dir/pid")"
    sleep 1
  fi
  if remote_alive "$dir"; then
    remote_say "failed a process does not end even when killed; restart the machine"
    return 1
  fi
  remote_say ok
}

# ARGUMENTS...: runs the program, from the job's directory, in a session of its own, with the lock as its file 9.
remote_supervise() {
  local code=0
  echo $$ >pid
  # A signal meant for the whole session must not take away the one that notes the exit code. (Children get the
  # default back.)
  trap : TERM HUP INT
  # exec: the program has the pid that was noted.
  (cd source && exec bash -c 'echo "$BASHPID" >../child && exec ../venv/bin/python "$@"' run "$@") || code=$?
  echo "[$(date -u '+%F %T')] ended with code $code"
  echo "$code" >exit_code.new && mv exit_code.new exit_code
  kill -KILL -- -$$ # what the program left behind would hold the accelerator, and the lock
}

# DIR ATTEMPT COMMAND SOURCE ARGUMENTS...: starts python ARGUMENTS, independent of this connection.
remote_start() {
  cd && cd "$1" || return
  local attempt=$2 command=$3 source=$4 _
  shift 4
  if [[ -e attempt && $(<attempt) == "$attempt" ]]; then
    remote_say ok # it was started before the connection broke
    return
  fi
  exec 9>>lock
  if ! flock --wait 10 9; then
    remote_say "failed a process of an earlier start still runs"
    return 1
  fi
  rm -f exit_code stopped pid child
  mkdir -p logs
  echo "[$(date -u '+%F %T')] $(hostname): source $source: python$(printf ' %q' "$@")" >"logs/$attempt.log"
  echo "$command" >command_id
  setsid nohup bash -c "$(declare -f remote_supervise); remote_supervise \"\$@\"" supervise "$@" \
    >>"logs/$attempt.log" 2>&1 </dev/null &
  echo "$attempt" >attempt
  for ((_ = 0; _ < 50; _++)); do
    [[ ! -s child ]] || break
    sleep 0.1
  done
  remote_say ok
}

# DIR ATTEMPT: the log, as it grows, until the program ends.
remote_stream() {
  cd && cd "$1" || return
  tail --pid="$(cat pid)" --sleep-interval=0.2 -n 100 -F "logs/$2.log" 2>/dev/null
}

# DIR ATTEMPT: the log.
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

# gcloud's last error, or its last line, for a message of one line.
gcloud_says() {
  local lines line
  lines=$(tail -n 20 "$local_dir/gcloud.log" 2>/dev/null | tr -d '\r') || lines=''
  line=$(grep '^ERROR' <<<"$lines" | tail -n 1) || line=${lines##*$'\n'}
  printf '%s' "${line:+ (gcloud: $line)}"
}

# Runs gcloud, or prints the command on a dry run. Its own messages go to gcloud.log; --quiet: it must not ask.
call_gcloud() {
  if [[ -n $dry_run ]]; then
    _gcloud_quote gcloud "$@"
  else
    gcloud "$@" 2>>"$local_dir/gcloud.log" </dev/null
  fi
}

# WORKER FUNCTION ARGUMENTS...: runs one of the functions above on a worker, or on "all". The text is quoted for the
# worker's shell, and says bash, since that may be another one.
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

# STEP FUNCTION ARGUMENTS...: runs a function on all workers. 0: each said ok; 1: no word from some worker. One that
# says that it failed ends the script: trying again would not help.
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

# Sets state (READY, GONE, UNKNOWN where Google cannot be asked, or Google's word) and workers.
look_at_machine() {
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

# What the queued resource is at, or nothing.
queue_state() {
  [[ $PROVISIONING == queue* ]] || return 0
  local error=$local_dir/queue.$$
  gcloud compute tpus queued-resources describe "${QUEUE_NAME:-$NAME}" --zone="$ZONE" --project="$PROJECT" \
    '--format=value(state.state)' 2>"$error" </dev/null || grep -qi 'not.found' "$error" || echo UNKNOWN
}

# Returns when the machine is ready. Creates it again if it was preempted, where PROVISIONING says how; ends the script
# where it cannot become ready.
await_machine() {
  local last='' queue unknown=0
  while true; do
    look_at_machine
    [[ -z $dry_run ]] || return 0
    if [[ $state == GONE ]]; then
      queue=$(queue_state)
      case $queue in
        UNKNOWN) state=UNKNOWN ;;
        ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING | ACTIVE) state="in the queue: $queue" ;;
        FAILED) die "the queued resource ${QUEUE_NAME:-$NAME} is FAILED: see why with tpu_queue_list of gcloud.bash" ;;
      esac
    fi
    [[ $state == "$last" || $state == READY ]] || say "$NAME is $state"
    last=$state
    case $state in
      READY)
        ((workers <= MAX_WORKERS)) || die "$NAME has $workers hosts; this job runs on a machine of $MAX_WORKERS"
        return ;;
      UNKNOWN)
        ((++unknown <= MAX_FAILURES)) ||
          die "step 'describe' failed: no word about $NAME$(gcloud_says); what runs there goes on; run this again"
        pause "$RESTART_PAUSE" ;;
      PREEMPTED | TERMINATED | SUSPENDED | GONE) create_again ;;
      STOPPED) die "$NAME is stopped; start it with: gcloud compute tpus tpu-vm start $NAME --zone=$ZONE" ;;
      *) pause "$POLL_SECONDS" ;;
    esac
  done
}

# Counts a restart, and waits before it.
count_restart() {
  ((++restarts <= MAX_RESTARTS)) ||
    die "$NAME: restarted $MAX_RESTARTS times (MAX_RESTARTS), last because $1; run this again to go on"
  say "restart $restarts of at most $MAX_RESTARTS, in $RESTART_PAUSE s: $1"
  pause "$RESTART_PAUSE"
}

# Makes the machine anew, by the function of gcloud.bash that made it.
create_again() {
  [[ -n $seen ]] ||
    die "there is no machine $NAME in $ZONE of $PROJECT: create it, for a TPU with: source gcloud.bash && tpu_create"
  if [[ $PROVISIONING == on_demand ]]; then
    die "$NAME is $state and PROVISIONING=on_demand: delete it, create it again, then run this again; it resumes"
  fi
  count_restart "$NAME is $state"
  installed=''
  watched=''
  stop_stream
  recreate >>"$local_dir/gcloud.log" 2>&1 || say "creating $NAME failed$(gcloud_says)"
}

# The commands of it, also for a dry run.
recreate() {
  if [[ $MACHINE == vm ]]; then
    call_gcloud compute instances start "$NAME" --zone="$ZONE" --project="$PROJECT"
    return
  fi
  # shellcheck disable=SC2034  # gcloud.bash reads them
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

# Asks all workers. Sets verdict and attempt, and broken to a list of the workers that failed:
#   none         nothing was ever started
#   running      all run the same start of our command, or some have finished it
#   ending       some have ended otherwise, some still run
#   foreign      another command runs
#   torn         some run, or ran, another start than the others
#   finished, interrupted, stopped, failed: all have ended
# and ended to one of the last four, for those that have ended.
# Returns 1 if there is no word from some worker.
look_at_workers() {
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
    ended=interrupted # the others have failed because that one was gone
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

# Makes the tarball of the committed source. The run is then known by a commit.
pack_source() {
  local dirty=''
  commit=$(git -C "$root" rev-parse HEAD 2>/dev/null) || die "$root is no git checkout: the source is copied from one"
  tarball=$local_dir/source-${commit:0:12}.tar.gz
  dirty=$(git -C "$root" status --porcelain | head -n 3 | cut -c 4- | tr '\n' ' ') || true
  [[ -z $dirty ]] || say "warning: only what is committed is copied; not so: $dirty…" >&2
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

# Stops what is left on any worker, installs if this is a new machine or a new call of the script, and starts on all.
# Sets step to what it was at. Returns 1 when that failed for a reason that may go away.
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
    say "# installing (some minutes the first time)"
    on_all install remote_install "$JOB_DIR" "$JOB_DIR.tar.gz" "$EXTRAS" ${pip_options[@]+"${pip_options[@]}"} ||
      return 1
    installed=1
  fi
  step='start'
  say "# starting on all workers"
  on_all start remote_start "$JOB_DIR" "$new" "$command_id" "${commit:0:12}" "${command[@]}" || return 1
  watched=$new
}

# Shows worker 0's log. A group of its own, to end gcloud's children with it; disowned, so that bash does not report.
keep_stream() {
  if [[ -n $stream ]] && kill -0 "$stream" 2>/dev/null; then return; fi
  [[ -z $stream ]] || say "# the stream of worker 0 broke; it goes on from the last 100 lines"
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

# It ends by itself once the program has; the last lines are on their way.
finish_stream() {
  local _
  for ((_ = 0; _ < 30; _++)); do
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

# A step failed for lack of a connection: tries again, unless it did so too often or the machine is not to be had.
again() {
  ((++failures <= MAX_FAILURES)) ||
    die "step '$1' failed $failures times on $NAME$(gcloud_says); see $local_dir/gcloud.log, then run this again:" \
      "it attaches to a run that is going, and starts all workers together otherwise"
  say "step '$1' failed$(gcloud_says); trying again in $RESTART_PAUSE s ($failures of $MAX_FAILURES)"
  pause "$RESTART_PAUSE"
  await_machine
}

# Prints, in order, what would be run: on a machine that is ready and idle.
print_plan() {
  local attempt
  say "# the machine: is it there?"
  await_machine
  say "# the workers: is the run already going? (then it is attached to; nothing is copied or started)"
  look_at_workers
  say "# otherwise: end what is left, copy the source, install, start"
  pack_source
  launch
  attempt=$watched
  say "# show worker 0, and ask all every $POLL_SECONDS s, as above, whether they run"
  remote 0 remote_stream "$JOB_DIR" "$attempt"
  say "# at the end, from each worker, into $local_dir/$attempt/worker-N.log"
  fetch_logs
  say "# exit code 75 of the program: stop and start as above, at most $MAX_RESTARTS times (MAX_RESTARTS)"
  if [[ $PROVISIONING == on_demand ]]; then
    say "# machine preempted: the script ends (PROVISIONING=on_demand)"
  else
    say "# machine preempted: create it again, copy, install and start as above"
    recreate
  fi
}

stop_job() {
  look_at_machine
  [[ -n $dry_run || $state == READY ]] ||
    die "$NAME is $state$(gcloud_says): there is nothing to stop, or no connection"
  on_all stop remote_stop "$JOB_DIR" "$STOP_SECONDS" mark ||
    die "step 'stop' failed on $NAME$(gcloud_says); see $local_dir/gcloud.log, then run this again"
  [[ -n $dry_run ]] || say "stopped on all workers of $NAME; the run resumes when it is started again"
}

# What an interrupt does: lets go of the run. It comes at any time, also while output goes to a file.
detach() {
  exec >&3 2>&4
  [[ -n $watched ]] || die "interrupted before all workers were started; run this again: it starts them all together"
  say "detached: the run on $NAME goes on; the same command attaches to it, --stop ends it"
  exit 130
}

# Takes the script's own arguments; the rest, the program's, go to arguments.
read_arguments() {
  dry_run=${DRY_RUN:-} stop='' arguments=()
  local argument
  for argument in "$@"; do
    case $argument in
      --dry_run) dry_run=1 ;;
      --stop) stop=1 ;;
      --workdir | --workdir=*) usage_error "set the workdir with: export WORKDIR=gs://…" ;;
      --device | --device=*) usage_error "$argument: the device is that of the machine, and set by this script" ;;
      *) arguments+=("$argument") ;;
    esac
  done
}

# VALUES...: those that PROVISIONING may have.
check_provisioning() {
  [[ " $* " == *" $PROVISIONING "* ]] || usage_error "PROVISIONING=$PROVISIONING: it is one of $*"
}

# Starts "python ${command[@]}" on all workers, or attaches to it, and keeps it going to its end.
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
    usage_error "no gcloud on the PATH: install it from https://cloud.google.com/sdk/docs/install"
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
    if ! look_at_workers; then
      again status
      continue
    fi
    case $verdict in
      foreign)
        die "$NAME runs another command, or this one with other arguments; end that first with: $0 --stop" ;;
      running)
        failures=0 ending_since=''
        if [[ $attempt != "$watched" ]]; then
          say "# attached to the run that is going on $NAME (its source stays as it is)"
          stop_stream
          watched=$attempt
        fi
        keep_stream
        pause "$POLL_SECONDS"
        continue ;;
      ending)
        # The others of a worker that ended need a moment to notice, and to save.
        watched=$attempt
        ending_since=${ending_since:-$SECONDS}
        if [[ $attempt != "$handled" ]] && ((SECONDS - ending_since < GRACE_SECONDS)); then
          pause "$POLL_SECONDS"
          continue
        fi
        verdict=$ended ;;
      torn)
        say "# not all workers run the same start: all are stopped, and started together"
        installed='' ;;
      none) installed='' ;;
    esac
    ending_since=''
    # Here all have ended, were never started, or have to be stopped. What ended before this script saw it run is
    # history: start. So is what was handled.
    if [[ $verdict != torn && -n $watched && $attempt == "$watched" && $attempt != "$handled" ]]; then
      finish_stream
      fetch_logs
      case $verdict in
        finished)
          say "done: all $workers workers of $NAME ended with code 0"
          exit 0 ;;
        stopped)
          say "stopped by request; the same command resumes"
          exit 0 ;;
        failed)
          on_all stop remote_stop "$JOB_DIR" "$STOP_SECONDS" || say "warning: not all workers could be stopped" >&2
          worker=${broken%% *}
          die "worker ${worker%%:*} of $NAME ended with code ${worker##*:}; read $log_dir/worker-${worker%%:*}.log" ;;
        interrupted)
          count_restart "the program was interrupted (code 75, or its host went away)"
          handled=$attempt
          # Another launcher may have started it meanwhile: look again, and start only if none has.
          continue ;;
      esac
    fi
    stop_stream
    if launch; then keep_stream; else again "$step"; fi
  done
}
