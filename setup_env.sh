#!/usr/bin/env bash
# Makes the book's environment, venv/, and runs what one does in it; `./setup_env.sh --help` says what that is.
# It keeps to bash 3.2, which is what macOS has. Sourced, it only defines its functions: the tests do that.

if [ -z "${BASH_VERSION-}" ]; then exec bash "$0" "$@"; fi # `sh setup_env.sh`, and sh is not bash

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="$ROOT/venv"
STAMP="$VENV/.folovllm-installed" # what was installed, written when it was; see stamp
TRITON_STAMP="$VENV/.folovllm-triton" # the same for Triton
QUESTIONS=yes                     # asked on a terminal only, and never by book, lab and test
FLASH_ATTN=no
GPTQ=no
TRITON=no
TORCH_BUILD="" # the build of torch that a flag asks for: cpu or cuda
CPU_INDEX="https://download.pytorch.org/whl/cpu"
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
       ./setup_env.sh clean                  delete venv/ and the built site
       ./setup_env.sh help                   this text

book, lab and test make venv/ first where it is missing, and ask no questions. It takes 1.8 GB of disk with the
CPU build of torch, 5.4 GB with the CUDA build; Triton, which test adds to the CPU build on Linux, takes 0.7 GB
more. PYTHON=... names the Python to make it with.

Flags, with every command: --flash-attn   also Flash Attention 2: needs CUDA, and is long to build
                           --gptq         also GPTQModel, which nothing here uses (Linux)
                           --triton       also Triton, for attention_backend="triton" (Linux)
                           --cpu-torch    the CPU build of torch: the default on Linux without an NVIDIA GPU
                           --cuda-torch   the CUDA build of torch: the default on Linux with one
                           -h, --help     this text
EOF
}

# ---- Python and venv/ ----

# Prints the version of a Python, if it is one; fails if it is too old, or a shim with nothing behind it.
python_version() {
    # Compared as tuples, 4.0 is newer.
    "$1" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3])
sys.exit(sys.version_info[:2] < (3, 10))' 2>/dev/null
}

can_make_venv() {
    "$1" -c 'import venv, ensurepip' 2>/dev/null && return 0
    print_warning "$1 ($2) cannot make a virtual environment, so it is passed over." \
        "On Debian and Ubuntu the package python${2%.*}-venv mends that."
    return 1
}

# Sets PYTHON to the one that makes venv/: the one it names already, else the first of the list that can, a Python that
# is newer than any that torch is known to have wheels for only where there is no other.
check_python_version() {
    local candidate version newer="" named="${PYTHON-}"
    # With venv/ activated, its own Python comes first: it must not be what venv/ is made anew from.
    local active=":$VENV/bin:" PATH=":$PATH:"
    PATH=${PATH//"$active"/:}
    PATH=${PATH#:}
    PATH=${PATH%:}

    for candidate in ${named:+"$named"} python3.10 python3.11 python3.12 python3.13 python3.14 python3 python; do
        version=$(python_version "$candidate") && can_make_venv "$candidate" "$version" || {
            [ "$candidate" != "$named" ] ||
                fail "PYTHON names $named, which is no Python 3.10 or newer${version:+ but $version}."
            continue
        }
        case $version in
            3.1[0-4].*) ;;
            *) if [ "$candidate" != "$named" ]; then
                newer=${newer:-$candidate}
                continue
            fi ;;
        esac
        take_python "$candidate" "$version"
        return 0
    done
    [ -n "$newer" ] ||
        fail "No Python 3.10 or newer was found. Install one (https://www.python.org/downloads/) and run this again."
    take_python "$newer" "$(python_version "$newer")"
}

take_python() {
    PYTHON=$(command -v "$1")
    print_info "Using $1: Python $2 at $PYTHON"
    case $2 in
        3.1[0-4].*) ;;
        *) print_warning "torch may have no wheel for Python ${2%.*}; 3.10 to 3.14 are known to work." ;;
    esac
}

# Fails where torch has no wheel, which pip would say at length. Asked of the Python: Rosetta may run an Intel one.
check_platform() {
    local why
    why=$("$VENV/bin/python" -c 'import platform
system, machine = platform.system(), platform.machine()
libc, version = platform.libc_ver()
number = lambda text: [int(part) for part in text.split(".")[:2] if part.isdigit()]
if system not in ("Linux", "Darwin"):
    print("this is", system + "; on Windows, work in WSL")
elif system == "Darwin" and machine != "arm64":
    print("this is a Mac with an Intel processor, or a Python for one")
elif system == "Darwin" and number(platform.mac_ver()[0]) < [14]:
    print("this is macOS", platform.mac_ver()[0] + ", and 14 is needed")
elif system == "Linux" and machine not in ("x86_64", "aarch64"):
    print("this machine is of the kind", machine + "; x86_64 and aarch64 (ARM) have one")
elif system == "Linux" and (libc != "glibc" or number(version) < [2, 28]):
    print("the C library here is", ((libc + " " + version).strip() or "not glibc") + ", and glibc 2.28 is needed")
')
    [ -z "$why" ] || fail "torch $(pin torch) has no wheel for this machine: $why."
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
        if [ -n "$fault" ]; then answer=yes; fi
        if may_ask; then
            # A bare Enter does what is sensible: it deletes what does not work, and nothing else.
            if [ -n "$fault" ]; then
                answer=$(ask "venv/ exists, but $fault: delete and recreate? (Y/n)")
            else
                answer=$(ask "venv/ exists: delete and recreate? (y/N)")
            fi
            : "${answer:=${fault:+yes}}"
        elif [ -n "$fault" ]; then
            print_warning "venv/ $fault: making it anew."
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

# Where HOME cannot be written, what Jupyter, matplotlib and pip keep there goes under venv/.
find_place_for_caches() {
    [ ! -w "${HOME-}" ] || return 0
    local home="$VENV/home"
    export XDG_CACHE_HOME="${XDG_CACHE_HOME-$home/cache}" MPLCONFIGDIR="${MPLCONFIGDIR-$home/matplotlib}"
    export IPYTHONDIR="${IPYTHONDIR-$home/ipython}" JUPYTER_CONFIG_DIR="${JUPYTER_CONFIG_DIR-$home/jupyter/config}"
    export JUPYTER_DATA_DIR="${JUPYTER_DATA_DIR-$home/jupyter/data}"
}

# ---- What goes into it ----

# What an installation depends on: the two files that name the packages, and this folder, because the editable install
# of folovllm is a path.
stamp() {
    printf '%s\n' "$ROOT"
    cat "$ROOT/requirements.txt" "$ROOT/pyproject.toml" | cksum
}

is_installed() { is_stamped "$STAMP"; }

is_stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$(stamp)" ]; }

has_nvidia_gpu() { nvidia-smi >/dev/null 2>&1; }

pip_venv() {
    # What people set for their own pip would put things elsewhere than into venv/.
    env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT PIP_USER=no "$VENV/bin/python" -m pip --disable-pip-version-check "$@"
}

# On a terminal pip's progress bars are worth the noise, for torch is large. Elsewhere there is a line a minute with what
# it is doing, and what it complained of when it failed.
pip_install() {
    local log="$VENV/.pip.log" ticker status=0
    if [ -t 1 ]; then
        pip_venv install --no-input --progress-bar=on "$@"
        return
    fi
    : >"$log"
    tick "$log" &
    ticker=$!
    trap "kill $ticker 2>/dev/null || true" EXIT # Ctrl-C too
    pip_venv install --no-input --progress-bar=off "$@" >"$log" 2>"$log.errors" || status=$?
    [ "$status" = 0 ] || cat "$log.errors" >&2
    trap - EXIT
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    return "$status"
}

# tick FILE: every minute the last line of the file, until this script has ended.
tick() {
    local minutes=0 line
    # Its output closed, or whoever reads this script's would wait for the last sleep to end.
    while sleep "${TICK_S:-60}" >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        minutes=$((minutes + 1))
        line=$(tail -n 1 "$1")
        print_info "Minute $minutes: ${line:0:100}"
    done
}

choose_optional_parts() {
    if [ "$FLASH_ATTN$GPTQ$TRITON" = nonono ] && may_ask; then
        printf 'Optional parts:\n  1) none (the default)\n  2) Flash Attention 2: needs CUDA, and is long to build\n'
        printf '  3) GPTQ support\n  4) Triton: its attention kernel, which a CPU can run, slowly\n'
        case $(ask "Which one? (1/2/3/4)") in
            2) FLASH_ATTN=yes ;;
            3) GPTQ=yes ;;
            4) TRITON=yes ;;
        esac
    fi
    check_flags
    if [ "$FLASH_ATTN" = yes ] && ! has_nvidia_gpu; then
        fail "Flash Attention 2 needs CUDA, and nvidia-smi finds no NVIDIA GPU here. Run this again without it."
    fi
    if [ "$GPTQ" = yes ] && [ "$(uname -s)" != Linux ]; then
        fail "GPTQ support is for Linux only. Run this again without it."
    fi
}

# ---- Which torch ----

# On Linux PyPI has the CUDA build, which brings gigabytes of libraries along. pip leaves a torch alone that satisfies
# the pin, so another build can go in first.

# pin PACKAGE: the version that requirements.txt names.
pin() { sed -n "s/^$1==\([^ ;#]*\).*/\1/p" "$ROOT/requirements.txt"; }

# Prints the build of the pinned torch in venv/: cpu or cuda, and nothing where there is none. Read from its metadata,
# which pip writes last: an install that was stopped leaves a folder that can be found, and no metadata.
torch_there() {
    "$VENV/bin/python" -c 'import importlib.metadata as metadata, sys
try:
    torch = metadata.distribution("torch")
except metadata.PackageNotFoundError:
    sys.exit()
version, _, build = torch.version.partition("+")
if version == sys.argv[1]:
    cuda = any(name.startswith(("nvidia-", "cuda-")) for name in torch.requires or [])
    print("cuda" if cuda or build.startswith("cu") else "cpu")' "$(pin torch)"
}

# offers VERSION [ARGUMENT...]: whether pip, with these arguments, finds this torch. One short try, no download.
offers() {
    local version=$1 found
    shift
    found=$(pip_venv index versions torch --retries 0 --timeout 10 "$@" 2>/dev/null) || return 1
    found=$(printf '%s\n' "$found" | sed -n 's/^Available versions: //p')
    case ", $found," in *", $version,"*) ;; *) return 1 ;; esac
}

# The build that is wanted: the one that a flag asks for, else, on Linux, the one that suits the machine.
wanted_torch() {
    if [ -n "$TORCH_BUILD" ]; then
        printf '%s\n' "$TORCH_BUILD"
    elif [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
        printf 'cpu\n'
    fi
}

# Says which torch will be fetched and how much it is, and installs it where that is not what pip would do by itself.
install_torch() {
    local pin there wanted
    pin=$(pin torch)
    there=$(torch_there)
    wanted=$(wanted_torch)
    # Without a flag the one that is there is good enough, whichever it is.
    if [ -n "$there" ] && { [ -z "$TORCH_BUILD" ] || [ "$there" = "$wanted" ]; }; then return 0; fi
    [ "$(uname -s)" = Linux ] || return 0 # macOS has one build
    if [ "$wanted" != cpu ]; then
        print_info "torch's CUDA build: about 3 GB are fetched, and venv/ takes 5.4 GB (--cpu-torch: 0.5 and 1.8 GB)."
        # Three equal signs, or pip would prefer a CPU build where one is offered: it is the same version and a label.
        [ -z "$wanted" ] || pip_install "torch===$pin" || fail "pip could not install it: what it said stands above."
        return 0
    fi
    [ -n "$TORCH_BUILD" ] ||
        print_info "There is no NVIDIA GPU here: taking torch's CPU build (--cuda-torch for the other)."
    print_info "About 0.5 GB are fetched, and venv/ takes 1.8 GB."
    if offers "$pin+cpu"; then
        pip_install "torch==$pin+cpu" || fail "pip could not install it: what it said stands above."
    elif offers "$pin+cpu" --index-url "$CPU_INDEX" || offers "$pin" --index-url "$CPU_INDEX"; then
        [ "$there" != cuda ] || pip_venv uninstall --yes -qq torch
        pip_install "torch==$pin" --index-url "$CPU_INDEX" ||
            fail "pip could not install it: what it said stands above."
    else
        print_warning "$CPU_INDEX cannot be reached, so torch is what pip finds: it may be the CUDA build, about 3 GB."
    fi
}

# ---- Installing ----

install_dependencies() {
    choose_optional_parts # first, so that whoever answers need not wait for the end of the install to do so
    if is_installed && { [ -z "$TORCH_BUILD" ] || [ "$(torch_there)" = "$TORCH_BUILD" ]; }; then
        print_info "requirements.txt and the package are installed already."
    else
        rm -f "$STAMP" # a failed install leaves neither the old state nor the new
        [ -n "$(torch_there)" ] || check_platform
        install_torch
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
    if [ "$TRITON" = yes ]; then install_triton; fi
}

install_triton() {
    if [ "$(uname -s)" != Linux ]; then
        print_warning "Triton is for Linux only: going on without it."
        return 0
    fi
    if is_stamped "$TRITON_STAMP"; then return 0; fi
    if [ "$(torch_there)" != cuda ]; then # the CUDA build brings its own
        print_info "Installing Triton. About 0.2 GB are fetched, and venv/ takes 0.7 GB more."
        pip_install -r requirements.txt "triton==$(pin triton)" ||
            fail "pip could not install Triton: what it said stands above. The rest is installed."
    fi
    stamp >"$TRITON_STAMP"
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
    if [ "$TORCH_BUILD" != cpu ] && has_nvidia_gpu; then compare_cuda_versions; fi
}

# There is a GPU: says why torch cannot use it, if it cannot.
compare_cuda_versions() {
    local driver built
    built=$("$VENV/bin/python" -Ic 'import torch
print("" if torch.cuda.is_available() else torch.version.cuda or "none")' 2>/dev/null)
    driver=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p')
    case $built in
        "") ;;
        none) print_warning "nvidia-smi finds a GPU (CUDA ${driver:-unknown}), but this torch is the CPU build:" \
            "./setup_env.sh --cuda-torch installs the other." ;;
        *) print_warning "nvidia-smi finds a GPU, but torch cannot use it: the driver is for CUDA ${driver:-unknown}," \
            "torch was built for CUDA $built. A newer driver may mend that." ;;
    esac
}

set_up() {
    print_header "Setting up the environment"
    check_python_version
    create_venv
    find_place_for_caches
    install_dependencies
    verify_installation
}

# ---- What one does in it ----

# Modules and scripts are always given to venv's Python: the first line of a script in venv/bin names its interpreter by
# path, and a space in that path ends it.
build_site() { "$VENV/bin/python" book/build.py "$@"; }

run_lab() {
    local first
    first=$(printf '%s\n' notebooks/[0-9]*.ipynb | head -n 1)
    if [ "$(id -u)" = 0 ]; then set -- --allow-root "$@"; fi
    # The root is the repository, because the notebooks link to pages and sources beside their folder. book/lab makes
    # JupyterLab show pages instead of their source. On the PATH, for the cells that call a command.
    PATH="$VENV/bin:$PATH" JUPYTER_CONFIG_PATH="$ROOT/book/lab${JUPYTER_CONFIG_PATH:+:$JUPYTER_CONFIG_PATH}" \
        exec "$VENV/bin/python" -m jupyterlab --ServerApp.root_dir="$ROOT" --LabApp.default_url="/lab/tree/$first" "$@"
}

# check NAME COMMAND...: whatever failed before it, it is run, and if it fails the name is remembered.
check() {
    local name=$1
    shift
    print_header "$name"
    "$@" || FAILED="$FAILED${FAILED:+, }$name"
}

run_checks() {
    local python="$VENV/bin/python" argument
    for argument; do
        # A question to pytest, not a run of it.
        case $argument in
            -h | --help | --version | --markers | --fixtures | --co | --collect-only)
                exec "$python" -m pytest --nbval "$@"
                ;;
        esac
    done
    check "ruff check" "$python" -m ruff check .
    check "ruff format" "$python" -m ruff format --check .
    check "mypy" "$python" -m mypy
    check "site" build_site --strict # before pytest, which looks at the pages
    check "pytest" "$python" -m pytest --nbval -n 2 "$@"
    printf '\n'
    [ -z "$FAILED" ] || fail "Failed: $FAILED."
    print_success "All checks passed."
}

# ---- ./setup_env.sh ----

check_flags() {
    if [ "$FLASH_ATTN" = yes ]; then
        [ "$TORCH_BUILD" != cpu ] || misuse "--flash-attn needs CUDA, and --cpu-torch takes the build without it."
        TORCH_BUILD=cuda
    fi
}

# Sets what a flag says; fails where the word is none.
take_flag() {
    case $1 in
        --flash-attn) FLASH_ATTN=yes ;;
        --gptq) GPTQ=yes ;;
        --triton) TRITON=yes ;;
        --cpu-torch | --cuda-torch)
            local torch=${1#--}
            torch=${torch%-torch}
            [ "${TORCH_BUILD:-$torch}" = "$torch" ] || misuse "--cpu-torch and --cuda-torch contradict each other."
            TORCH_BUILD=$torch
            ;;
        *) return 1 ;;
    esac
    CHANGES=yes
}

main() {
    local command="" word CHANGES=no
    for word; do # each goes to the end of the list, unless it is taken out
        shift
        if take_flag "$word"; then continue; fi
        case ${command:-none}:$word in
            none:book | none:lab | none:test | none:clean | none:help) command=$word ;;
            none:-h | none:--help | book:-h | book:--help | clean:-h | clean:--help) command=help ;;
            none:*) misuse "There is no command or flag '$word'." ;;
            book:* | clean:*) misuse "$command takes no arguments, and got '$word'." ;;
            *) set -- "$@" "$word" ;;
        esac
    done
    check_flags

    cd "$ROOT"
    trap 'exit 130' INT         # else Ctrl-C would end one check and start the next
    [ -t 0 ] || exec </dev/null # nothing may wait for an answer that cannot come
    case $command in
        help)
            usage
            return 0
            ;;
        clean)
            rm -rf "$VENV" _build
            print_success "Deleted venv/ and the built site."
            return 0
            ;;
        book | lab) QUESTIONS=no ;;
        test)
            QUESTIONS=no
            if [ "$(uname -s)" = Linux ]; then
                TRITON=yes # without it its tests would be skipped
                is_stamped "$TRITON_STAMP" || CHANGES=yes
            fi
            ;;
    esac
    # They are run over and over: what is in place is not looked at again.
    if [ -z "$command" ] || [ "$CHANGES" = yes ] || ! is_installed || [ -n "$(venv_fault)" ]; then set_up; fi
    find_place_for_caches

    case $command in
        book)
            print_header "Building the site"
            build_site || fail "The site could not be built: the warnings and errors stand above."
            print_success "The site is built. Open $ROOT/_build/html/index.html"
            ;;
        lab) run_lab "$@" ;;
        test) run_checks "$@" ;;
        *) print_success "Ready. To activate the environment, type: source activate.sh" ;;
    esac
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -eu
    main "$@"
fi
