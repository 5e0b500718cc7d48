#!/usr/bin/env bash
# Makes the book's environment, venv/, and runs what one does in it; `./setup_env.sh --help` says what that is.
# It keeps to bash 3.2, which is what macOS has. Sourced, it only defines its functions: the tests do that.

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="$ROOT/venv"
STAMP="$VENV/.folovllm-installed" # what was installed, written when it was; see stamp
PYTHON=python3                    # what makes venv/; check_python_version chooses it
QUESTIONS=yes                     # asked on a terminal only, and never by book, lab and test
FLASH_ATTN=no
GPTQ=no
CPU_TORCH=no
FAILED="" # the checks of `test` that failed

# ---- Talking ----

# say COLOUR HEAD TEXT: in colour on a terminal only, and never when NO_COLOR is set.
say() {
    if [ -t 1 ] && [ -z "${NO_COLOR+set}" ]; then
        printf '\033[%sm%s\033[0m %s\n' "$@"
    else
        printf '%s %s\n' "$2" "$3"
    fi
}

print_header() {
    printf '\n'
    say 1 '==>' "$*"
}

print_info() { say 34 '[INFO]' "$*"; }
print_success() { say 32 '[SUCCESS]' "$*"; }
print_warning() { say 33 '[WARNING]' "$*" >&2; }
print_error() { say 31 '[ERROR]' "$*" >&2; }

fail() {
    print_error "$*"
    exit 1
}

misuse() {
    print_error "$* ./setup_env.sh --help lists what there is."
    exit 2
}

may_ask() { [ "$QUESTIONS" = yes ] && [ -t 0 ]; }

# ask QUESTION: prints the answer, which is empty after a bare Enter or Ctrl-D. Only where may_ask holds.
ask() {
    local answer=""
    read -r -p "$1 " answer || true
    printf '%s\n' "$answer"
}

usage() {
    cat <<'EOF'
Usage: ./setup_env.sh [FLAG...]              make venv/ and install the book and its package into it
       ./setup_env.sh book                   build the site, and say which file to open
       ./setup_env.sh lab [ARGUMENT...]      open the notebooks in JupyterLab
       ./setup_env.sh test [ARGUMENT...]     run every check; the arguments go to pytest

book, lab and test make venv/ first where it is missing, and ask no questions.

Flags: --flash-attn   also Flash Attention 2: needs CUDA, and is long to build
       --gptq         also GPTQ support (Linux)
       --cpu-torch    the small build of torch, without the CUDA libraries
       -h, --help     this text
EOF
}

# ---- Python and venv/ ----

check_python_version() {
    local candidate version
    # With venv/ activated, its own Python comes first: it must not be what venv/ is made anew from.
    local active=":$VENV/bin:" PATH=":$PATH:"
    PATH=${PATH//"$active"/:}
    PATH=${PATH#:}
    PATH=${PATH%:}

    for candidate in python3.10 python3.11 python3.12 python3.13 python3.14 python3 python; do
        # It has to answer: a name on the PATH may be a shim with nothing behind it. Compared as tuples, 4.0 is newer.
        version=$("$candidate" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3])
sys.exit(sys.version_info[:2] < (3, 10))' 2>/dev/null) || continue
        if ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            print_warning "$candidate ($version) cannot make a virtual environment, so it is passed over." \
                "On Debian and Ubuntu the package python${version%.*}-venv mends that."
            continue
        fi
        PYTHON=$(command -v "$candidate")
        print_info "Using $candidate: Python $version at $PYTHON"
        return 0
    done
    fail "No Python 3.10 or newer was found. Install one (https://www.python.org/downloads/) and run this again."
}

# Prints what is wrong with venv/, and nothing when it is fine.
venv_fault() {
    if [ -f "$STAMP" ] && [ "$(head -n 1 "$STAMP")" != "$ROOT" ]; then
        # Its scripts hold the path it was made at.
        printf 'was made for another folder, %s\n' "$(head -n 1 "$STAMP")"
    elif ! "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
        printf 'has no working Python (3.10 or newer, with pip)\n'
    fi
}

create_venv() {
    local fault answer=no
    if [ -e "$VENV" ]; then
        fault=$(venv_fault)
        if may_ask; then
            answer=$(ask "venv/ exists${fault:+, but $fault}: delete and recreate? (y/N)")
        elif [ -n "$fault" ]; then
            print_warning "venv/ $fault: making it anew."
            answer=yes
        fi
        case $answer in
            [yY]*) rm -rf "$VENV" ;;
            *)
                [ -z "$fault" ] || fail "venv/ $fault, so it has to be made anew: run this again and answer y."
                print_info "Keeping venv/ and its $("$VENV/bin/python" --version)."
                return 0
                ;;
        esac
    fi
    "$PYTHON" -m venv "$VENV" || fail "Could not make $VENV: what Python said about it stands above."
    print_success "Made venv/."
}

# ---- What goes into it ----

# What an installation depends on: the two files that name the packages, and this folder, because the editable install
# of folovllm is a path.
stamp() {
    printf '%s\n' "$ROOT"
    cat "$ROOT/requirements.txt" "$ROOT/pyproject.toml" | cksum
}

is_installed() { [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(stamp)" ]; }

has_nvidia_gpu() { nvidia-smi >/dev/null 2>&1; }

pip_install() {
    local noise=-qq # errors only
    # On a terminal the progress bar is worth the noise: torch is large.
    if [ -t 1 ]; then noise=--progress-bar=on; fi
    "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check "$noise" "$@"
}

choose_optional_parts() {
    if [ "$FLASH_ATTN$GPTQ" = nono ] && may_ask; then
        printf 'Optional parts:\n  1) none (the default)\n  2) Flash Attention 2: needs CUDA, and is long to build\n'
        printf '  3) GPTQ support\n'
        case $(ask "Which one? (1/2/3)") in
            2) FLASH_ATTN=yes ;;
            3) GPTQ=yes ;;
        esac
    fi
    if [ "$FLASH_ATTN" = yes ] && ! has_nvidia_gpu; then
        fail "Flash Attention 2 needs CUDA, and nvidia-smi finds no NVIDIA GPU here. Run this again without it."
    fi
    if [ "$GPTQ" = yes ] && [ "$(uname -s)" != Linux ]; then
        fail "GPTQ support is for Linux only. Run this again without it."
    fi
}

# PyPI's torch for Linux brings gigabytes of CUDA libraries along. pip leaves a torch alone that satisfies the pin, so
# the small build can go in first.
install_cpu_torch() {
    local torch index="https://download.pytorch.org/whl/cpu"
    torch=$(sed -n 's/^\(torch==[^ ;#]*\).*/\1/p' "$ROOT/requirements.txt")
    if "$VENV/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
        return 0
    fi
    if [ "$CPU_TORCH" = no ] && [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
        print_info "There is no NVIDIA GPU here, and PyPI's torch brings gigabytes of CUDA libraries along."
        if may_ask; then
            case $(ask "Install the small CPU build of torch? (Y/n)") in
                [nN]*) ;;
                *) CPU_TORCH=yes ;;
            esac
        else
            print_info "For the small CPU build instead, stop this and type, in $ROOT:"
            printf '    venv/bin/python -m pip install %s --index-url %s\n    ./setup_env.sh\n' "$torch" "$index"
        fi
    fi
    if [ "$CPU_TORCH" = yes ]; then
        print_info "Installing the CPU build of $torch."
        pip_install "$torch" --index-url "$index" || fail "pip could not install it: what it said stands above."
    fi
}

install_dependencies() {
    choose_optional_parts # first, so that whoever answers need not wait for the end of the install to do so
    if is_installed; then
        print_info "requirements.txt and the package are installed already."
    else
        rm -f "$STAMP" # a failed install leaves neither the old state nor the new
        install_cpu_torch
        print_info "Installing requirements.txt and the package. The first time this takes minutes."
        pip_install -r requirements.txt || fail "pip could not install requirements.txt: what it said stands above."
        stamp >"$STAMP"
    fi
    # The optional parts are installed beside requirements.txt, or pip might move a pinned version for them.
    if [ "$FLASH_ATTN" = yes ]; then
        print_info "Installing Flash Attention 2. If it has to be built, that takes long."
        # Its build imports the torch it is built for, so it cannot be built apart from it.
        { pip_install "setuptools>=77" wheel ninja packaging &&
            pip_install --no-build-isolation -r requirements.txt -e ".[cuda]"; } ||
            fail "pip could not install Flash Attention 2: what it said stands above. The rest is installed."
    fi
    if [ "$GPTQ" = yes ]; then
        print_info "Installing GPTQ support."
        pip_install -r requirements.txt -e ".[gptq]" ||
            fail "pip could not install GPTQ support: what it said stands above. The rest is installed."
    fi
}

verify_installation() {
    # Isolated (-I), or the package would be found in this folder even when it is not installed.
    "$VENV/bin/python" -Iu - <<'EOF' || { rm -f "$STAMP" && fail "An import failed. Delete venv/ and run this again."; }
import importlib
import sys

for name in "folovllm", "torch", "transformers":
    try:
        module = importlib.import_module(name)
    except Exception as error:
        sys.exit(f"import {name}: {type(error).__name__}: {error}")
    print(f"    {name} {module.__version__}")

import torch

print(f"    CUDA: {'yes' if torch.cuda.is_available() else 'no'}")
for i in range(torch.cuda.device_count()):
    gpu = torch.cuda.get_device_properties(i)
    print(f"    GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB")
EOF
    print_success "folovllm, torch and transformers can be imported."
}

set_up() {
    print_header "Setting up the environment"
    check_python_version
    create_venv
    install_dependencies
    verify_installation
}

# ---- What one does in it ----

# Modules and scripts are always given to venv's Python: the first line of a script in venv/bin names its interpreter by
# path, and a space in that path ends it. Jupyter Book cannot be run as a module.
build_site() {
    rm -rf _build
    "$VENV/bin/python" "$VENV/bin/jupyter-book" build . --all -W -n --keep-going
}

# check NAME COMMAND...: whatever failed before it, it is run, and if it fails the name is remembered.
check() {
    local name=$1
    shift
    print_header "$name"
    "$@" || FAILED="$FAILED${FAILED:+, }$name"
}

run_checks() {
    local python="$VENV/bin/python"
    check "ruff check" "$python" -m ruff check .
    check "ruff format" "$python" -m ruff format --check .
    check "mypy" "$python" -m mypy
    check "site" build_site # before pytest, which looks at the pages
    # A notebook's cells need their predecessors, so a file must not be split between processes.
    check "pytest" "$python" -m pytest --nbval -n 2 --dist loadfile "$@"
    printf '\n'
    [ -z "$FAILED" ] || fail "Failed: $FAILED."
    print_success "All checks passed."
}

# ---- ./setup_env.sh ----

parse_flags() {
    local flag
    for flag in "$@"; do
        case $flag in
            --flash-attn) FLASH_ATTN=yes ;;
            --gptq) GPTQ=yes ;;
            --cpu-torch) CPU_TORCH=yes ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) misuse "There is no command or flag '$flag'." ;;
        esac
    done
}

main() {
    local command=setup
    case ${1-} in
        book | lab | test)
            command=$1
            QUESTIONS=no
            shift
            ;;
        *) parse_flags "$@" ;;
    esac
    [ "$command" != book ] || [ $# -eq 0 ] || misuse "book takes no arguments, and got '$*'."

    cd "$ROOT"
    trap 'exit 130' INT         # else Ctrl-C would end one check and start the next
    [ -t 0 ] || exec </dev/null # nothing may wait for an answer that cannot come
    # book, lab and test are run over and over: what is in place is not looked at again.
    if [ "$command" = setup ] || ! is_installed || [ -n "$(venv_fault)" ]; then set_up; fi

    case $command in
        setup) print_success "Ready. To activate the environment, type: source activate.sh" ;;
        book)
            print_header "Building the site"
            build_site || fail "The site could not be built: the warnings and errors stand above."
            print_success "The site is built. Open $ROOT/_build/html/index.html"
            ;;
        # On the PATH too, for the cells that call a command.
        lab) PATH="$VENV/bin:$PATH" exec "$VENV/bin/python" -m jupyterlab --notebook-dir notebooks "$@" ;;
        test) run_checks "$@" ;;
    esac
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -eu
    main "$@"
fi
