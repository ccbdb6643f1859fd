#!/usr/bin/env bash
# Runs a command on a TPU slice, or several, that is asked for as a queued resource: waits for it,
# starts the command on every host, starts it again when it was preempted (exit code 75, or the slice
# is gone, which is then asked for anew), and deletes the resource when the command is done.
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
set -euo pipefail
# shellcheck source=tpu/lib.sh
source "$(dirname "$0")/lib.sh"

OPTIONS='name project zone type root package slices runtime max-restarts' FLAGS='spot keep dry-run'
REQUIRED='name project zone type root package'
RETRY=75 PAUSE=${PAUSE:-30} KEEP=''
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

OUTPUT=$(mktemp)
trap 'rm -f "$OUTPUT"' EXIT
need_gcloud
check_bucket
upload_package
for ((attempt = 0; attempt <= MAX_RESTARTS; attempt++)); do
  acquire
  start 2>&1 | tee "$OUTPUT"
  [[ -z $DRY_RUN ]] || break
  codes=$(sed -n 's/^worker .* ends with \([0-9]*\).*/\1/p' "$OUTPUT" | sort -n)
  failed=$(grep -vxE "0|$RETRY" <<<"$codes" | tail -n 1 || true)
  finished=$(grep -cx 0 <<<"$codes" || true)
  ((finished < HOSTS * SLICES)) || break
  sleep "$PAUSE"
  if [[ -n $failed && $(state) == ACTIVE ]]; then
    echo "The command failed with exit code $failed; logs are in $ROOT/logs/$NAME." >&2
    echo "$NAME is kept, and costs money: tpu/queued.sh starts it again, and this ends it:" >&2
    DRY_RUN=yes delete >&2
    exit "$failed"
  fi
  echo "$finished of $((HOSTS * SLICES)) hosts are done; starting again."
done
((attempt <= MAX_RESTARTS)) || die "still not done after $MAX_RESTARTS restarts; $NAME is kept"
[[ -n $KEEP ]] || delete
