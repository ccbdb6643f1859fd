#!/usr/bin/env bash
# Runs on every host of a job: installs the library once, runs `python -m "$@"`, and uploads its log
# to the bucket. The last line reports the exit code. 0: finished. 75: saved, to be restarted (also
# if another host was lost, or the job was stopped while it did not handle signals). Other codes:
# failed. If the host could not be prepared, the last line says so, and the command did not start.
#
# Environment: NAME of the job; MPT_JAX_ROOT; PACKAGE to install with pip, empty if it is installed.
set -euo pipefail

: "${NAME:?}" "${MPT_JAX_ROOT:?}"
home=${HOME:-/tmp}/mpt-jax/$NAME log=$home/run.log
python=python3
mkdir -p "$home"

find_python() {
  local name
  for name in python3.12 python3.11 python3; do
    "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
      echo "$name" && return
  done
  return 1
}

# Creates a virtual environment with PACKAGE, again whenever PACKAGE changes.
install() {
  python=$home/venv/bin/python
  if [[ $(cat "$home/installed" 2>/dev/null) == "$PACKAGE" ]]; then return; fi
  rm -rf "$home/venv"
  local base
  if base=$(find_python); then
    "$base" -m venv "$home/venv"
  else # TPU VM images are older than the library's Python
    python3 -m pip install --user --quiet uv
    python3 -m uv venv --seed --python 3.12 "$home/venv"
  fi
  if [[ $PACKAGE == gs://* ]]; then
    gcloud storage cp "$PACKAGE" "$home/"
    "$python" -m pip install --quiet "$home/${PACKAGE##*/}[tpu]"
  else
    "$python" -m pip install --quiet "mpt-jax[tpu] @ $PACKAGE"
  fi
  echo "$PACKAGE" >"$home/installed"
}

# A process that outlived its connection still holds the chips: asks it to save, then kills it.
stop_earlier() {
  local pid
  pid=$(cat "$home/pid" 2>/dev/null) || return 0
  [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") == *" -m $1 "* ]] || return 0
  echo "Process $pid of an earlier start is still active on $(hostname). Asking it to save."
  kill -TERM "$pid"
  for _ in {1..120}; do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 1
  done
  kill -KILL "$pid"
}

upload_log() {
  "$python" - "$log" "$MPT_JAX_ROOT/logs/$NAME/$(hostname).log" <<'PYTHON' || echo "No log uploaded."
import sys
from etils import epath
path = epath.Path(sys.argv[2])
path.parent.mkdir(parents=True, exist_ok=True)
path.write_bytes(epath.Path(sys.argv[1]).read_bytes())
PYTHON
}

trap 'code=$?; printf "\nworker %s could not be prepared: %s\n" "$(hostname)" "$code"' EXIT
[[ -z ${PACKAGE:-} ]] || install
stop_earlier "$1"
cd "$home"
touch "$log"
before=$(stat -c %s "$log")
trap - EXIT
PYTHONUNBUFFERED=1 "$python" -m "$@" >>"$log" 2>&1 &
child=$!
echo "$child" >pid
tail -c "+$((before + 1))" -f --pid="$child" "$log" &
trap 'signaled=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT
signaled=yes code=0
while [[ -n $signaled ]]; do # a signal interrupts the wait, not the run
  signaled='' ended=0
  wait "$child" || ended=$?
  ((ended == 127)) || code=$ended # 127: it was already waited for
done
rm -f pid
wait || true # for the rest of the log
# JAX aborts a process if another process of the job is lost, which is no fault of this host. Only
# the lines of this start count. `grep -c` reads all of them; `-q` would break the pipe, an error.
if ((code == 134)) && tail -c "+$((before + 1))" "$log" |
  grep -c 'JAX distributed service detected fatal errors' >/dev/null; then
  echo "Another host of the job was lost."
  code=75
fi
if ((code == 143)); then # SIGTERM's default action: the run did not handle signals at that time
  echo "SIGTERM stopped the job before it could save. The job resumes from its last checkpoint."
  code=75
fi
upload_log
printf '\nworker %s ends with %s\n' "$(hostname)" "$code"
exit "$code"
