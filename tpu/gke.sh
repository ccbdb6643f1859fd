#!/usr/bin/env bash
# Runs a command on TPU slices of a GKE cluster with the JobSet controller, as the JobSet
# tpu/jobset.yaml. If a node was preempted, or the command saved and stopped (exit code 75), all
# slices restart together. Any other exit code ends the job.
#
#   tpu/gke.sh --name mpt-1 --project P --zone us-west4-a --cluster C --type v5litepod-16 \
#     --root gs://B/mpt --package git+https://HOST/OWNER/mpt-jax@REVISION \
#     -- mpt_jax.train --gin_file=gin/mpt_source.gin
#
#   --name                      name of the JobSet
#   --project, --zone, --cluster  the cluster; --zone may be a region
#   --type                      an accelerator type of tpu/topologies.txt
#   --root                      bucket path: MPT_JAX_ROOT of the job, and the folder of its logs
#   --package                   this library: git+https://...@revision; omit if the image has it
#   --slices N                  number of slices, connected by the data-center network (default 1)
#   --image                     image with Python >= 3.11 (default python:3.12)
#   --service-account           account with access to the bucket (default: default)
#   --max-restarts N            maximum number of restarts (default 100)
#   --spot                      uses spot nodes
#   --node-pools                creates a node pool for each slice first
#   --dry-run                   prints the commands and the manifest without running anything

# The manifest is filled with the variables of the same names.
# shellcheck disable=SC2034
set -euo pipefail
# shellcheck source=tpu/lib.sh
source "$(dirname "$0")/lib.sh"

OPTIONS='name project zone cluster type root package slices image service-account max-restarts'
FLAGS='spot node-pools dry-run' REQUIRED='name project zone cluster type root'
IMAGE=python:3.12 SERVICE_ACCOUNT=default NODE_POOLS='' SPOT_SELECTOR=''
parse "$@"
WHERE=(--project="$PROJECT" --location="$ZONE")

# Quotes a string for YAML and JSON.
quoted() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

# Prints the manifest: the template with each ${NAME} replaced by the variable of that name.
render() {
  local indent=$'\n                ' text name value argument arguments=()
  local WORKER COMMAND_LINES
  WORKER=$(<"$HERE/worker.sh")
  for argument in "${COMMAND[@]}"; do arguments+=("- $(quoted "$argument")"); done
  printf -v COMMAND_LINES '%s\n              ' "${arguments[@]}"
  [[ -z $SPOT ]] || SPOT_SELECTOR='cloud.google.com/gke-spot: "true"'
  text=$(<"$HERE/jobset.yaml")
  for name in NAME SLICES HOSTS CHIPS ACCELERATOR TOPOLOGY MAX_RESTARTS SPOT_SELECTOR; do
    text=${text//"\${$name}"/"${!name}"}
  done
  for name in SERVICE_ACCOUNT IMAGE ROOT PACKAGE; do
    value=$(quoted "${!name}")
    text=${text//"\${$name}"/"$value"}
  done
  text=${text//"\${COMMAND}"/"$COMMAND_LINES"}
  printf '%s\n' "${text//"\${WORKER}"/"${WORKER//$'\n'/"$indent"}"}"
}

make_node_pools() {
  local slice topology=(--tpu-topology="$TOPOLOGY")
  ((HOSTS > 1)) || topology=()
  for ((slice = 0; slice < SLICES; slice++)); do
    run gcloud container node-pools create "$NAME-$slice" --cluster="$CLUSTER" "${WHERE[@]}" \
      --machine-type="$MACHINE" --num-nodes="$HOSTS" "${topology[@]}" ${SPOT:+--spot}
  done
}

[[ $PACKAGE != *.whl || $PACKAGE == *://* ]] ||
  die "--package '$PACKAGE' is a local wheel, which a pod cannot fetch. Give git+https://..., or
  install the library in an image, pass it as --image, and omit --package."
need_gcloud
need kubectl 'gcloud components install kubectl'
check_bucket
run gcloud container clusters get-credentials "$CLUSTER" "${WHERE[@]}"
[[ -z $NODE_POOLS ]] || make_node_pools
if [[ -n $DRY_RUN ]]; then
  echo '+ kubectl apply -f - with this manifest:'
  render
  exit
fi
kubectl get crd jobsets.jobset.x-k8s.io >/dev/null ||
  die "the cluster $CLUSTER has no JobSet controller. Install it: \
https://jobset.sigs.k8s.io/docs/installation"
render | kubectl apply -f -
echo "Watch it:   kubectl get jobset $NAME; kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$NAME"
echo "Delete it:  kubectl delete jobset $NAME"
