# shellcheck shell=bash
# Options set variables with their names, which shellcheck cannot follow.
# shellcheck disable=SC2034,SC2153
#
# Shared code of the launch scripts: options, the table of accelerators, dry runs, checks.
# A script lists its options in OPTIONS, FLAGS and REQUIRED, then calls `parse "$@"`.

HERE=$(dirname "${BASH_SOURCE[0]}")
MAX_RESTARTS=100 SLICES=1 SPOT='' DRY_RUN='' PACKAGE='' COMMAND=()

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Prints the comment at the top of the script.
usage() {
  sed -n '2,${/^#/!q; s/^# \{0,1\}//p}' "$0"
}

# `--some-name VALUE` and `--some-name=VALUE` set SOME_NAME; COMMAND is everything after `--`.
parse() {
  local option name missing=()
  while (($#)); do
    option=${1%%=*} name=${1#--}
    name=${name%%=*} name=${name//-/_}
    case " $OPTIONS $FLAGS help " in
      *" ${option#--} "*) ;;
      *) [[ $1 == -- ]] || die "unknown option '$1'; --help lists them" ;;
    esac
    case $1 in
      --) COMMAND=("${@:2}") && break ;;
      --help) usage && exit 0 ;;
      --*=*) printf -v "${name^^}" %s "${1#*=}" ;;
      *)
        if [[ " $FLAGS " == *" ${option#--} "* ]]; then
          printf -v "${name^^}" %s yes
        else
          (($# > 1)) || die "$1 needs a value"
          printf -v "${name^^}" %s "$2"
          shift
        fi
        ;;
    esac
    shift
  done
  for option in $REQUIRED; do
    name=${option//-/_}
    name=${name^^}
    [[ -n ${!name:-} ]] || missing+=("--$option")
  done
  ((${#missing[@]} == 0)) || die "missing ${missing[*]}; --help describes them"
  check
}

check() {
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,28}[a-z0-9])?$ ]] ||
    die "--name '$NAME' must be at most 30 characters of a-z, 0-9 and '-', starting with a letter \
and not ending with '-'"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "--slices must be a positive integer, but got '$SLICES'"
  [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] ||
    die "--max-restarts must be a non-negative integer, but got '$MAX_RESTARTS'"
  [[ $ROOT =~ ^gs://[^/]+ ]] ||
    die "--root '$ROOT' must be a bucket path, gs://BUCKET/FOLDER, since all hosts use it"
  ((${#COMMAND[@]})) ||
    die "no command; end with: -- mpt_jax.train --gin_file=gin/mpt_source.gin"
  ROOT=${ROOT%/}
  look_up "$TYPE"
}

# Sets ACCELERATOR, TOPOLOGY, HOSTS, CHIPS and MACHINE, and RUNTIME if it is empty.
look_up() {
  local type runtime known=()
  while read -r type ACCELERATOR TOPOLOGY HOSTS CHIPS MACHINE runtime; do
    [[ $type != '#' ]] || continue
    known+=("$type")
    if [[ $type == "$1" ]]; then
      RUNTIME=${RUNTIME:-$runtime}
      return
    fi
  done <"$HERE/topologies.txt"
  die "unknown --type '$1'; tpu/topologies.txt has: ${known[*]}"
}

# Runs a command, or prints it with --dry-run.
run() {
  if [[ -n $DRY_RUN ]]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

need() {
  [[ -n $DRY_RUN ]] || command -v "$1" >/dev/null || die "'$1' is not on PATH. Install it: $2"
}

need_gcloud() {
  need gcloud https://cloud.google.com/sdk/docs/install
}

check_bucket() {
  local bucket=${ROOT#gs://}
  bucket=gs://${bucket%%/*}
  if [[ -n $DRY_RUN ]]; then
    run gcloud storage ls "$bucket"
  elif ! gcloud storage ls "$bucket" >/dev/null; then
    die "cannot see the bucket $bucket. Log in, or create the bucket:
  gcloud auth login
  gcloud storage buckets create $bucket --project=$PROJECT --location=REGION"
  fi
}

# Uploads a local wheel to the bucket, from which the workers fetch it.
upload_package() {
  [[ $PACKAGE == *.whl && $PACKAGE != *://* ]] || return 0
  [[ -f $PACKAGE ]] ||
    die "--package '$PACKAGE' is not a file; build it with: python -m build --wheel"
  run gcloud storage cp "$PACKAGE" "$ROOT/packages/"
  PACKAGE=$ROOT/packages/${PACKAGE##*/}
}
