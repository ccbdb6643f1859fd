#!/usr/bin/env bash
# Runs a command on a TPU slice, or several, that is asked for as a queued resource: waits for it,
# starts the command on every host, starts it again when it was preempted (exit code 75, or the slice
# is gone, which is then asked for anew), and deletes the resource when the command is done. Where the
# machines stay and cannot be prepared for the command (a --package that pip does not install), twice
# in the same way, it gives up; and where they say nothing, after ten times.
#
#   tpu/queued.sh --name mpt-1 --project P --zone us-west4-a --type v5litepod-16 --root gs://B/mpt \
#     --package git+https://HOST/OWNER/mpt-jax@REVISION -- mpt_jax.train --gin_file=gin/mpt_source.gin
#
#   --name, --project, --zone   of the queued resource
#   --type                      an accelerator type of tpu/topologies.txt
#   --root                      bucket path: MPT_JAX_ROOT of the run, and where its logs go
#   --package                   this library: git+https://...@revision, a wheel here or in a bucket
#   --slices N                  several slices, joined by the data-centre network (default 1)
#   --runtime                   TPU VM image (default: the table's)
#   --max-restarts N            (default 100)
#   --spot                      cheaper, may be taken away at any time
#   --keep                      does not delete the resource at the end
#   --dry-run                   prints the commands, and runs none
#
# PAUSE=30 in the environment: seconds between two looks at the resource, and before a restart.
# EARLY=300: a start that ended within so many seconds was early, as one that cannot work is.
set -euo pipefail
# shellcheck source=tpu/lib.sh
source "$(dirname "$0")/lib.sh"

OPTIONS='name project zone type root package slices runtime max-restarts' FLAGS='spot keep dry-run'
REQUIRED='name project zone type root package'
RETRY=75 PAUSE=${PAUSE:-30} EARLY=${EARLY:-300} KEEP=''
# Hosts that are not heard of may be of a slice that is being taken away, whose state follows late.
UNPREPARED='could not be prepared' MOST_UNPREPARED=2 MOST_UNHEARD=10
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

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; ABSENT where there is none.
state() {
  local said
  if said=$("${TPUS[@]}" describe "$NAME" "${WHERE[@]}" --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* || $said == *'not found'* ]]; then
    echo ABSENT
  else
    die "gcloud cannot say what $NAME is: $said"
  fi
}

# Waits until the slices are there, asking for them again where they were taken or refused.
acquire() {
  local now last='' asked=0
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
        ((asked++ <= MAX_RESTARTS)) || die "asked for $NAME $asked times in vain"
        create
        ;;
      FAILED | SUSPENDED) delete ;;
    esac
    sleep "$PAUSE"
  done
}

# The command on every host. The workers' own last lines say how it ended: gcloud passes on the
# exit code of one of them.
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

# Says what is kept, and how to end its cost.
kept() {
  echo "$NAME is kept, and costs money: tpu/queued.sh starts it again, and this ends it:" >&2
  DRY_RUN=yes delete >&2
}

# Ends where one start after another was early and ended alike, on machines that are still there. SAID
# are the workers' last lines, of which some are missing or say that a host could not be prepared.
give_up_on_what_cannot_start() {
  local most=$MOST_UNHEARD
  ((TOOK < EARLY)) || ALIKE=0
  [[ $SAID == "$LAST" ]] || ALIKE=0
  LAST=$SAID
  ((TOOK >= EARLY || ++ALIKE)) # counts the early ones
  [[ $SAID != *"$UNPREPARED"* ]] || most=$MOST_UNPREPARED
  ((ALIKE >= most)) || return 0
  echo "$ALIKE starts in a row ended early and in the same way, so another one would:" >&2
  if [[ -n $SAID ]]; then
    echo "$SAID" >&2
    echo "Why is above. If pip failed: is --package '$PACKAGE' right?" >&2
  else
    echo "no host of $NAME answered. Why is above. With several hosts gcloud needs its SSH key in the" >&2
    echo "agent: ssh-add ~/.ssh/google_compute_engine" >&2
  fi
  kept
  exit 2
}

OUTPUT=$(mktemp)
trap 'rm -f "$OUTPUT"' EXIT
need_gcloud
check_bucket
upload_package
ALIKE=0 LAST=''
for ((attempt = 0; attempt <= MAX_RESTARTS; attempt++)); do
  acquire
  began=$SECONDS
  start 2>&1 | tee "$OUTPUT"
  TOOK=$((SECONDS - began))
  [[ -z $DRY_RUN ]] || break
  SAID=$(sed -nE "/^worker [^ ]+ (ends with|$UNPREPARED:) [0-9]+/p" "$OUTPUT" | sort)
  codes=$(sed -n 's/^worker .* ends with \([0-9]*\).*/\1/p' <<<"$SAID" | sort -n)
  failed=$(grep -vxE "0|$RETRY|" <<<"$codes" | tail -n 1 || true)
  finished=$(grep -cx 0 <<<"$codes" || true)
  ((finished < HOSTS * SLICES)) || break
  sleep "$PAUSE"
  now=$(state)
  if [[ $now == ACTIVE && -n $failed ]]; then
    echo "The command failed with exit code $failed; logs are in $ROOT/logs/$NAME." >&2
    kept
    exit "$failed"
  elif [[ $now == ACTIVE ]] && (($(grep -c . <<<"$codes") < HOSTS * SLICES)); then
    give_up_on_what_cannot_start
  else # those machines are gone, or the command has run on all of them
    ALIKE=0 LAST=''
  fi
  echo "$finished of $((HOSTS * SLICES)) hosts are done; starting again."
done
((attempt <= MAX_RESTARTS)) || die "still not done after $MAX_RESTARTS restarts; $NAME is kept"
[[ -n $KEEP ]] || delete
