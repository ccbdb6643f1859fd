#!/usr/bin/env bash
# Runs a command on TPU slices of a cluster that xpk made, as one `xpk workload create`. It starts
# again on exit code 75, and on those xpk itself takes for an interruption (42, 127 to 255).
#
#   tpu/xpk.sh --name mpt-1 --project P --zone us-west4-a --cluster C --type v5litepod-16 \
#     --root gs://B/mpt --package git+https://HOST/OWNER/mpt-jax@REVISION \
#     -- mpt_jax.train --gin_file=gin/mpt_source.gin
#
#   --name                      of the workload
#   --project, --zone, --cluster  where it runs
#   --type                      an accelerator type of tpu/topologies.txt
#   --root                      bucket path: MPT_JAX_ROOT of the run, and where its logs go
#   --package                   this library: git+https://...@revision; empty where the image has it
#   --slices N                  several slices (default 1)
#   --image                     with Python >= 3.11 (default python:3.12)
#   --max-restarts N            (default 100)
#   --spot                      on spot nodes
#   --dry-run                   prints the command, and runs none
set -euo pipefail
# shellcheck source=tpu/lib.sh
source "$(dirname "$0")/lib.sh"

OPTIONS='name project zone cluster type root package slices image max-restarts'
FLAGS='spot dry-run' REQUIRED='name project zone cluster type root'
IMAGE=python:3.12
parse "$@"

need_gcloud
need xpk https://github.com/AI-Hypercomputer/xpk
check_bucket
# The worker goes along in the command, as one word: the image need not know it. `exec`, because xpk
# sends SIGTERM to the shell that runs the command.
worker="echo $(base64 -w 0 "$HERE/worker.sh") | base64 -d >/tmp/worker.sh; "
worker+=$(printf '%q ' exec bash /tmp/worker.sh "${COMMAND[@]}")
run xpk workload create --workload="$NAME" --project="$PROJECT" --zone="$ZONE" \
  --cluster="$CLUSTER" --tpu-type="$TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" \
  --env="NAME=$NAME" --env="MPT_JAX_ROOT=$ROOT" --env="PACKAGE=$PACKAGE" \
  --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 ${SPOT:+--spot} --command="$worker"
