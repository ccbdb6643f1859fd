#!/usr/bin/env bash
# Runs a command on one or several TPU slices, requested as a queued resource: waits for the
# resource, starts the command on every host, and deletes the resource when the command is finished.
# After a preemption (exit code 75, or the slice is gone, which is then requested again) it restarts
# the command. If the slice is still active but its hosts cannot be prepared (such as a --package
# that pip cannot install), it stops after two equal failures; if no host answers, after ten.
#
#   tpu/queued.sh --name mpt-1 --project P --zone us-west4-a --type v5litepod-16 --root gs://B/mpt \
#     --package git+https://HOST/OWNER/mpt-jax@REVISION -- mpt_jax.train --gin_file=gin/mpt_source.gin
#
#   --name, --project, --zone   name, project and zone of the queued resource
#   --type                      an accelerator type of tpu/topologies.txt
#   --root                      bucket path: MPT_JAX_ROOT of the job, and the folder of its logs
#   --package                   this library: git+https://...@revision, or a local or gs:// wheel
#   --slices N                  number of slices, connected by the data-center network (default 1)
#   --runtime                   TPU VM image (default: from the table)
#   --max-restarts N            maximum number of restarts (default 100)
#   --spot                      uses spot capacity: cheaper, may be preempted at any time
#   --keep                      keeps the resource at the end
#   --dry-run                   prints the commands without running them
#
# Environment: PAUSE=30, seconds between checks of the resource and before a restart; EARLY=300, a
# start that fails within this many seconds counts as an early failure.
set -euo pipefail
# shellcheck source=tpu/lib.sh
source "$(dirname "$0")/lib.sh"

OPTIONS='name project zone type root package slices runtime max-restarts' FLAGS='spot keep dry-run'
REQUIRED='name project zone type root package'
RETRY=75 PAUSE=${PAUSE:-30} EARLY=${EARLY:-300} KEEP=''
# Silent hosts may belong to a slice that is being preempted, whose state is updated late.
UNPREPARED='could not be prepared' MAX_UNPREPARED=2 MAX_SILENT=10
parse "$@"
WHERE=(--project="$PROJECT" --zone="$ZONE")
TPUS=(gcloud compute tpus queued-resources)

create() {
  local nodes=(--node-id="$NAME")
  ((SLICES == 1)) || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  run "${TPUS[@]}" create "$NAME" "${WHERE[@]}" "${nodes[@]}" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot}
}

delete() {
  run "${TPUS[@]}" delete "$NAME" "${WHERE[@]}" --force --quiet
}

# Prints ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ..., or ABSENT if the resource does not exist.
state() {
  local answer
  if answer=$("${TPUS[@]}" describe "$NAME" "${WHERE[@]}" --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* || $answer == *'not found'* ]]; then
    echo ABSENT
  else
    die "gcloud cannot describe $NAME: $answer"
  fi
}

# Waits until the slices are active; requests them again after a preemption or a failed request.
acquire() {
  local now last='' requests=0
  if [[ -n $DRY_RUN ]]; then
    create
    run "${TPUS[@]}" describe "$NAME" "${WHERE[@]}" --format='value(state.state)'
    return
  fi
  while :; do
    now=$(state) || exit 2
    [[ $now == "$last" ]] || echo "$NAME is $now"
    last=$now
    case $now in
      ACTIVE) return ;;
      ABSENT)
        ((requests++ <= MAX_RESTARTS)) ||
          die "requested $NAME $((requests - 1)) times without success. Raise --max-restarts"
        create
        ;;
      FAILED | SUSPENDED) delete ;;
    esac
    sleep "$PAUSE"
  done
}

# Starts the command on every host. The workers' last lines report how it ended, since gcloud
# returns the exit code of only one of them.
start() {
  local hosts=$((HOSTS * SLICES)) distributed='' remote
  ((hosts == 1)) || distributed=MPT_JAX_DISTRIBUTED=1
  remote=$(printf '%q ' env "NAME=$NAME" "MPT_JAX_ROOT=$ROOT" "PACKAGE=$PACKAGE" $distributed \
    bash mpt_jax_worker.sh "${COMMAND[@]}")
  run "${TPUS[@]}" scp "$HERE/worker.sh" "$NAME:mpt_jax_worker.sh" "${WHERE[@]}" \
    --node=all --worker=all --batch-size=all || return 0
  run "${TPUS[@]}" ssh "$NAME" "${WHERE[@]}" --node=all --worker=all --batch-size=all \
    --command="$remote" || true
}

# Reports that the resource was kept, and how to delete it.
report_kept() {
  echo "$NAME was kept and still costs money. Rerun tpu/queued.sh to restart it, or delete it:" >&2
  DRY_RUN=yes delete >&2
}

# Exits after several starts in a row that failed early with equal results, on a slice that is still
# active. RESULTS are the workers' last lines; some are missing or report an unprepared host.
stop_if_starts_fail() {
  local limit=$MAX_SILENT
  ((TOOK < EARLY)) || FAILURES=0
  [[ $RESULTS == "$LAST_RESULTS" ]] || FAILURES=0
  LAST_RESULTS=$RESULTS
  ((TOOK >= EARLY || ++FAILURES)) # counts early failures only
  [[ $RESULTS != *"$UNPREPARED"* ]] || limit=$MAX_UNPREPARED
  ((FAILURES >= limit)) || return 0
  echo "$FAILURES starts in a row failed early in the same way, so no more are tried:" >&2
  if [[ -n $RESULTS ]]; then
    echo "$RESULTS" >&2
    echo "See the output above. If pip failed, check --package '$PACKAGE'." >&2
  else
    echo "no host of $NAME answered. See the output above. With several hosts, gcloud needs its" >&2
    echo "SSH key in the agent: ssh-add ~/.ssh/google_compute_engine" >&2
  fi
  report_kept
  exit 2
}

OUTPUT=$(mktemp)
trap 'rm -f "$OUTPUT"' EXIT
need_gcloud
check_bucket
upload_package
FAILURES=0 LAST_RESULTS=''
for ((attempt = 0; attempt <= MAX_RESTARTS; attempt++)); do
  acquire
  began=$SECONDS
  start 2>&1 | tee "$OUTPUT"
  TOOK=$((SECONDS - began))
  [[ -z $DRY_RUN ]] || break
  RESULTS=$(sed -nE "/^worker [^ ]+ (ends with|$UNPREPARED:) [0-9]+/p" "$OUTPUT" | sort)
  codes=$(sed -n 's/^worker .* ends with \([0-9]*\).*/\1/p' <<<"$RESULTS" | sort -n)
  failed=$(grep -vxE "0|$RETRY|" <<<"$codes" | tail -n 1 || true)
  finished=$(grep -cx 0 <<<"$codes" || true)
  ((finished < HOSTS * SLICES)) || break
  sleep "$PAUSE"
  now=$(state)
  if [[ $now == ACTIVE && -n $failed ]]; then
    echo "The command failed with exit code $failed; logs are in $ROOT/logs/$NAME." >&2
    report_kept
    exit "$failed"
  elif [[ $now == ACTIVE ]] && (($(grep -c . <<<"$codes") < HOSTS * SLICES)); then
    stop_if_starts_fail
  else # the slice is gone, or the command has run on all hosts
    FAILURES=0 LAST_RESULTS=''
  fi
  echo "$finished of $((HOSTS * SLICES)) hosts finished; restarting the command."
done
((attempt <= MAX_RESTARTS)) ||
  die "not finished after $MAX_RESTARTS restarts; $NAME was kept. Raise --max-restarts to continue"
[[ -n $KEEP ]] || delete
