#!/usr/bin/env bash
# Runs a command on TPU slices of a GKE cluster that has the JobSet controller, as the JobSet
# tpu/jobset.yaml: all slices start again together when a node was taken away or the command has
# saved and stopped (exit code 75); another exit code ends the job.
#
#   tpu/gke.sh --name mpt-1 --project P --zone us-west4-a --cluster C --type v5litepod-16 \
#     --root gs://B/mpt --package git+https://HOST/OWNER/mpt-jax@REVISION \
#     -- mpt_jax.train --gin_file=gin/mpt_source.gin
#
#   --name                      of the JobSet
#   --project, --zone, --cluster  where it runs; --zone may be a region
#   --type                      an accelerator type of tpu/topologies.txt
#   --root                      bucket path: MPT_JAX_ROOT of the run, and where its logs go
#   --package                   this library: git+https://...@revision; empty where the image has it
#   --slices N                  several slices, joined by the data-centre network (default 1)
#   --image                     with Python >= 3.11 (default python:3.12)
#   --service-account           of Kubernetes, allowed to use the bucket (default: default)
#   --max-restarts N            (default 100)
#   --spot                      on spot nodes
#   --node-pools                makes a node pool for each slice first
#   --dry-run                   prints the commands and the manifest, and runs none

# The manifest is filled from variables by their names.
# shellcheck disable=SC2034
set -euo pipefail
# shellcheck source=tpu/lib.sh
source "$(dirname "$0")/lib.sh"

OPTIONS='name project zone cluster type root package slices image service-account max-restarts'
FLAGS='spot node-pools dry-run' REQUIRED='name project zone cluster type root'
IMAGE=python:3.12 SERVICE_ACCOUNT=default NODE_POOLS='' SPOT_SELECTOR=''
parse "$@"
WHERE=(--project="$PROJECT" --location="$ZONE")

# A string as YAML and JSON write it.
quoted() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

# The manifest, with every ${NAME} of the template replaced by the variable of that name.
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
  die "--package '$PACKAGE': a pod cannot fetch a wheel of this machine. Give git+https://..., or put
  the library into an image, name that with --image, and leave --package out."
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
  die "the cluster $CLUSTER has no JobSet controller: https://jobset.sigs.k8s.io/docs/installation"
render | kubectl apply -f -
echo "Watch it:  kubectl get jobset $NAME; kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$NAME"
echo "End it:    kubectl delete jobset $NAME"
