#!/bin/sh
# Starts the worker in the image, as the user `worker` instead of root. docs/image.md has the reasons.
set -eu

as_worker="setpriv --reuid=worker --regid=worker --init-groups --no-new-privs"

# Without arguments and without a queue, as `docker run` starts it, it serves HTTP.
if [ $# -eq 0 ] && [ -z "${RUNPOD_WEBHOOK_GET_JOB:-}" ]; then
    set -- --serve
fi

stay_root() {
    echo "WARNING: the worker runs as root: $1" >&2
    as_worker=""
}

# Started as another user (docker run --user), it stays that one.
if [ "$(id -u)" -ne 0 ]; then
    exec python -u /app/handler.py "$@"
fi

if ! $as_worker true; then
    stay_root "the container does not allow another user"
else
    # The files of a volume belong to root, as a rule, and may be unreadable for others.
    models="${MODEL_DIR:-}"
    [ -e "$models" ] || models=/runpod-volume/huggingface-cache/hub
    if [ -e "$models" ]; then
        unreadable="$($as_worker find -L "$models" ! -readable -print -quit 2>/dev/null || true)"
        if [ -n "$unreadable" ]; then
            stay_root "only root can read $unreadable; chmod -R a+rX $models changes that"
        fi
    fi
fi

if [ -n "$as_worker" ]; then
    export HOME=/home/worker
    for folder in "${COMPILE_CACHE_DIR:-}" "${LORA_CACHE_DIR:-}"; do
        if [ -n "$folder" ]; then
            # On a volume, too, the worker is to write there. Where that cannot be, it says so itself.
            mkdir -p "$folder" 2>/dev/null || true
            chown --no-dereference worker: "$folder" 2>/dev/null || true
        fi
    done
fi
exec $as_worker python -u /app/handler.py "$@"
