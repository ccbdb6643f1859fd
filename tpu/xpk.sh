#!/usr/bin/env bash
# Runs a command on TPU slices of a cluster created by xpk, with one `xpk workload create`. The
# command restarts on exit code 75, and on codes that xpk treats as interruptions (42, 127 to 255).
#
#   tpu/xpk.sh --name mpt-1 --project P --zone us-west4-a --cluster C --type v5litepod-16 \
#     --root gs://B/mpt --package git+https://HOST/OWNER/mpt-jax@REVISION \
#     -- mpt_jax.train --gin_file=gin/mpt_source.gin
#
#   --name                      name of the workload
#   --project, --zone, --cluster  the cluster
#   --type                      an accelerator type of tpu/topologies.txt
#   --root                      bucket path: MPT_JAX_ROOT of the job, and the folder of its logs
#   --package                   this library: git+https://...@revision; omit if the image has it
#   --slices N                  number of slices (default 1)
#   --image                     image with Python >= 3.11 (default python:3.12)
#   --max-restarts N            maximum number of restarts (default 100)
#   --spot                      uses spot nodes
#   --dry-run                   prints the commands without running them
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
# The command carries the worker as one word, so that the image need not have it. `exec`, because
# xpk sends SIGTERM to the shell that runs the command.
worker="echo $(base64 -w 0 "$HERE/worker.sh") | base64 -d >/tmp/worker.sh; "
worker+=$(printf '%q ' exec bash /tmp/worker.sh "${COMMAND[@]}")
run xpk workload create --workload="$NAME" --project="$PROJECT" --zone="$ZONE" \
  --cluster="$CLUSTER" --tpu-type="$TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" \
  --env="NAME=$NAME" --env="MPT_JAX_ROOT=$ROOT" --env="PACKAGE=$PACKAGE" \
  --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 ${SPOT:+--spot} --command="$worker"
