#!/usr/bin/env bash
# Activates venv/ in the bash or zsh that sources this: source activate.sh

_folo_activate() {
    local file sourced=no root
    if [ -n "${ZSH_VERSION-}" ]; then
        eval 'file=${(%):-%x}' # in quotes, because only zsh can read it
        case ${ZSH_EVAL_CONTEXT-} in *:file*) sourced=yes ;; esac
    else
        # shellcheck disable=SC2128 # without an index, so that sh can read it too
        file=${BASH_SOURCE-$0}
        if [ "$file" != "$0" ]; then sourced=yes; fi
    fi
    if [ "$sourced" = no ]; then
        echo "[ERROR] Run like this, it cannot change your shell. In bash or zsh, type: source activate.sh" >&2
        return 1
    fi

    root=$(CDPATH='' cd -- "$(dirname -- "$file")" && pwd -P)
    if [ ! -f "$root/venv/bin/activate" ]; then
        echo "[ERROR] There is no venv/ in $root yet. To make it, type: ./setup_env.sh" >&2
        return 1
    fi
    # shellcheck disable=SC1091 # it is made by setup_env.sh
    . "$root/venv/bin/activate"
    if [ ! "${VIRTUAL_ENV-}" -ef "$root/venv" ]; then # its scripts hold the path it was made at
        deactivate
        echo "[ERROR] venv/ was made for another folder. To make it anew, type: ./setup_env.sh" >&2
        return 1
    fi
    echo "[INFO] $("$root/venv/bin/python" --version) at $root/venv/bin/python"
}

_folo_activate
