#!/usr/bin/env bash
# gai-yolo on a bare machine that may be taken away; the same line on every machine of the job:
#   launch/spot.sh [--stay] --nodes 1:4 --rendezvous /shared/run/rdzv -- elastic_train.py --config ...
# Everything but --stay is for `gai-yolo launch`. Exit codes, --stay, and a systemd unit: launch/README.md.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PATH="$PWD/.venv/bin:$PATH"

stay=""
if [[ ${1-} == --stay ]]; then
    stay=yes
    shift
fi
first_pause=${SPOT_PAUSE:-5} # seconds; doubled up to 120
told_to_end=""
child=""

# shellcheck disable=SC2317 # called by the trap
pass_on() {
    told_to_end=yes
    [[ -n $child ]] && kill -"$1" "$child" 2>/dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on TERM' HUP # the terminal is gone

# With job control a background process does not ignore SIGINT, and a terminal's Ctrl-C reaches it through this script alone.
start() {
    set -m
    "$@" &
    child=$!
    set +m
}

# Returns the exit code of a command in the background; a trap ends a wait before the command has ended.
finish() {
    wait "$1"
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

pause=$first_pause
while :; do
    start gai-yolo launch "$@"
    started=$SECONDS
    finish "$child"
    code=$?
    child=""
    if ((code == 75)); then
        reason="left after a notice, state saved"
    elif ((code > 128 && code != 130 && code != 143)); then
        reason="the launcher was killed, exit code $code" # most likely for want of memory
    else
        exit "$code" # the launcher has judged: done, or nothing that a start now would change
    fi
    if [[ -n $told_to_end || ($code == 75 && -z $stay) ]]; then
        echo "spot.sh: $reason; the end" >&2
        exit "$code"
    fi
    ((SECONDS - started > 600)) && pause=$first_pause # that went well for a while
    echo "spot.sh: $reason; starting again in $pause s" >&2
    start sleep "$pause"
    finish "$child"
    child=""
    if [[ -n $told_to_end ]]; then exit "$code"; fi
    pause=$((pause * 2 < 120 ? pause * 2 : 120))
done
