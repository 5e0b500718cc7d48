"""The scripts at the root: setup_env.sh, activate.sh, .ci/run, and the files that say what is installed and ignored.

They run in a copy of the repo whose path has a space in it, with fake Pythons on a PATH of their own, so nothing is
downloaded and the answers do not depend on what this machine has.
"""

from __future__ import annotations

import itertools
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash") or "/bin/bash"
ZSH = shutil.which("zsh")
PATIENCE_S = 60  # only so that a script that waits for an answer fails its test, instead of stopping them all

TOOLS = ["bash", "cat", "cksum", "cp", "dirname", "env", "head", "id"]
TOOLS += ["mkdir", "rm", "sed", "sh", "sleep", "tail", "touch"]
PIN = "2.13.0"
TRITON = "-r requirements.txt triton==3.7.1"

# Writes down how it was called, runs `-c` code as if it were the version and on the machine that it says it is, and
# makes venvs of itself. As pip it offers what OFFERED (by its own configuration) and INDEX (by the index it is given)
# list, reads what there is to read, and needs the folder that the relative paths are meant for. HAS_TORCH is the torch
# in venv/: a version, and with a word after it a build that needs CUDA's libraries.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
[ "$1 $2" != "-m pip" ] || echo "$PIP_USER ${{PIP_TARGET-unset}}" >>"$CALLS.environment"
case "$1 $2 $4" in
    "-c import venv, ensurepip "*) exit {ensurepip_status} ;;
    "-c "*) exec "{python}" -I -S -c "import importlib.metadata, platform, sys, types
sys.version_info, sys.modules['pip'] = {version}, sys
sys.argv[1:2], code = [], sys.argv[1]
version, _, cuda = '${{HAS_TORCH-}}'.partition(' ')
def distribution(name):
    if not version: raise importlib.metadata.PackageNotFoundError
    return types.SimpleNamespace(version=version, requires=['nvidia-cublas==13'] if cuda else None)
importlib.metadata.distribution = distribution
system, machine, libc, mac = '${{MACHINE-Linux x86_64 2.28 0}}'.split()
platform.system, platform.machine, platform.mac_ver = lambda: system, lambda: machine, lambda: (mac, (), '')
platform.libc_ver = lambda: ('glibc', libc) if libc != 'musl' else ('', '')
exec(code)" "$2" "$3" ;;
    "-Ic "*) echo "${{TORCH_CUDA-}}" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m $FAILING"*) echo "$FAILING complains" >&2; exit 1 ;;
    "-m pip index")
        case "$*" in *--index-url*) offered=${{INDEX-}} ;; *) offered=${{OFFERED-}} ;; esac
        [ -n "$offered" ] && echo "torch" && echo "Available versions: $offered" ;;
    "-m pip "*)
        [ -t 0 ] || cat >>"$CALLS"
        ${{SLOW-}}
        echo Downloading torch
        echo no such folder >&2
        [ -f requirements.txt ] ;;
    "-Iu - ") exit "${{VERIFY_STATUS-0}}" ;;
    "book/build.py "*) [ "$FAILING" != build ] ;;
esac
"""


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Copy:
    """A copy of the repo's scripts, and the small world that they run in."""

    def __init__(self, folder: Path):
        self.root = folder / "a folder"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.root.mkdir()
        self.bin.mkdir()
        self.calls_file.touch()
        for name in ["setup_env.sh", "activate.sh", "requirements.txt", "pyproject.toml"]:
            shutil.copy(ROOT / name, self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.system("Linux")
        self.env = {"PATH": str(self.bin), "HOME": str(folder), "CALLS": str(self.calls_file), "FAILING": "nothing"}
        self.env["HAS_TORCH"] = f"{PIN}+cpu"  # so that torch is no subject, but in the tests about it

    @property
    def venv(self) -> Path:
        return self.root / "venv"

    def system(self, name: str) -> None:
        write_script(self.bin / "uname", f"#!/bin/sh\necho {name}\n")

    def add_python(self, name: str, *version: int, at: Path | None = None, ensurepip: bool = True) -> None:
        text = FAKE_PYTHON.format(python=sys.executable, version=version, ensurepip_status=0 if ensurepip else 1)
        write_script((at or self.bin) / name, text)

    def add_gpu(self) -> None:
        write_script(self.bin / "nvidia-smi", "#!/bin/sh\necho '| Driver Version: 550.54   CUDA Version: 12.4  |'\n")

    def add_venv(self, stamped: bool = False) -> None:
        self.add_python("python", 3, 12, 1, at=self.venv / "bin")
        (self.venv / "mine").touch()
        if stamped:
            self.functions('stamp >"$STAMP"; stamp >"$TRITON_STAMP"')

    def calls(self, word: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if word in line]

    def installs(self) -> list[str]:
        """What pip was asked to install, each time."""
        return [line.partition("-bar=off ")[2] for line in self.calls(" install --no-input ")]

    def run(self, *command: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a command without a terminal; `stdout` holds its stderr too."""
        return subprocess.run(
            command,
            cwd=cwd or self.root,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )

    def setup(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("./setup_env.sh", *arguments, **env)

    def functions(self, code: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(BASH, "-c", f"source ./setup_env.sh\n{code}", **env)

    def on_terminal(self, *command: str, answers: str = "", **env: str) -> tuple[int, str]:
        """Runs a command on a terminal of its own, types the answers, gives its status and what was on the screen."""
        ours, its = pty.openpty()
        env = {**self.env, **env}
        process = subprocess.Popen(command, cwd=self.root, env=env, stdin=its, stdout=its, stderr=its)
        os.close(its)
        os.write(ours, answers.encode())
        screen = b""
        try:
            while select.select([ours], [], [], PATIENCE_S)[0]:
                try:
                    piece = os.read(ours, 4096)
                except OSError:  # how Linux says that the other end is closed
                    break
                if not piece:
                    break
                screen += piece
            else:
                pytest.fail(f"It waits for an answer. The screen so far: {screen.decode()}")
            return process.wait(), screen.decode().replace("\r\n", "\n")
        finally:
            process.kill()
            os.close(ours)

    def functions_on_terminal(self, code: str, answers: str = "", **env: str) -> tuple[int, str]:
        return self.on_terminal(BASH, "-c", f"source ./setup_env.sh\n{code}", answers=answers, **env)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path.resolve())


@pytest.mark.parametrize("script", ["setup_env.sh", "activate.sh", ".ci/run"])
def test_scripts_are_bash_and_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run([BASH, "-n", ROOT / script], capture_output=True, text=True).stderr == ""


class TestHelpers:
    ALL = "print_header One; print_info two; print_success three; print_warning four; print_error five"
    PLAIN = "\n==> One\n[INFO] two\n[SUCCESS] three\n[WARNING] four\n[ERROR] five\n"

    def test_plain_when_piped(self, copy: Copy) -> None:
        assert copy.functions(self.ALL).stdout == self.PLAIN

    def test_coloured_on_a_terminal(self, copy: Copy) -> None:
        _, screen = copy.functions_on_terminal(self.ALL)
        assert screen.count("\x1b[") == 2 * 5
        assert re.sub(r"\x1b\[\d+m", "", screen) == self.PLAIN

    @pytest.mark.parametrize("value", ["1", ""])
    def test_plain_with_no_color(self, copy: Copy, value: str) -> None:
        assert copy.functions_on_terminal(self.ALL, NO_COLOR=value)[1] == self.PLAIN

    def test_warnings_and_errors_go_to_stderr(self, copy: Copy) -> None:
        assert copy.functions(f"{{ {self.ALL}; }} 2>/dev/null").stdout == "\n==> One\n[INFO] two\n[SUCCESS] three\n"


class TestCheckPythonVersion:
    @pytest.mark.parametrize(
        ("there", "taken"),
        [
            ({"python3": (3, 9, 18), "python3.12": (3, 12, 1)}, "python3.12: Python 3.12.1"),
            ({"python3.14": (3, 14, 0), "python3.10": (3, 10, 2)}, "python3.10: Python 3.10.2"),
            ({"python": (3, 13, 0), "python3": (3, 11, 5)}, "python3: Python 3.11.5"),
            ({"python3": (3, 9, 18), "python": (4, 0, 0)}, "python: Python 4.0.0"),
            ({"python3": (3, 15, 1), "python": (3, 13, 0)}, "python: Python 3.13.0"),
            ({"python3": (3, 15, 1), "python": (4, 0, 0)}, "python3: Python 3.15.1"),
        ],
    )
    def test_takes_the_first_that_is_new_enough(self, copy: Copy, there: dict, taken: str) -> None:
        for name, version in there.items():
            copy.add_python(name, *version)
        done = copy.functions('check_python_version; echo "PYTHON=$PYTHON"')
        assert f"[INFO] Using {taken} at {copy.bin}/" in done.stdout
        assert f"PYTHON={copy.bin / taken.split(':')[0]}\n" in done.stdout

    def test_a_shim_with_nothing_behind_it_does_not_count(self, copy: Copy) -> None:
        write_script(copy.bin / "python3.10", "#!/bin/sh\necho 'pyenv: python3.10: command not found' >&2\nexit 127\n")
        copy.add_python("python3.11", 3, 11, 7)
        assert copy.functions("check_python_version").stdout.startswith("[INFO] Using python3.11: Python 3.11.7")

    def test_one_that_cannot_make_a_venv_is_passed_over(self, copy: Copy) -> None:
        copy.add_python("python3.11", 3, 11, 2, ensurepip=False)
        copy.add_python("python3.12", 3, 12, 1)
        done = copy.functions("check_python_version")
        assert "[WARNING]" in done.stdout and "python3.11-venv" in done.stdout
        assert "Using python3.12" in done.stdout

    @pytest.mark.parametrize(("version", "warns"), [((3, 14, 2), False), ((3, 15, 0), True), ((4, 0, 0), True)])
    def test_warns_of_one_too_new(self, copy: Copy, version: tuple, warns: bool) -> None:
        copy.add_python("python3", *version)
        done = copy.functions("check_python_version")
        assert done.returncode == 0
        assert ("[WARNING] torch may have no wheel for Python" in done.stdout) == warns

    @pytest.mark.parametrize("how", ["python3.13", "{bin}/python3.13"])
    def test_one_can_be_named(self, copy: Copy, how: str) -> None:
        for minor in (10, 13):
            copy.add_python(f"python3.{minor}", 3, minor, 0)
        done = copy.functions("check_python_version", PYTHON=how.format(bin=copy.bin))
        assert f": Python 3.13.0 at {copy.bin}/python3.13\n" in done.stdout

    @pytest.mark.parametrize("name", ["python3.8", "no-python"])
    def test_one_that_is_named_is_not_replaced(self, copy: Copy, name: str) -> None:
        copy.add_python("python3.8", 3, 8, 18)
        copy.add_python("python3.12", 3, 12, 1)
        done = copy.functions("check_python_version", PYTHON=name)
        assert done.returncode == 1
        assert done.stdout.startswith(f"[ERROR] PYTHON names {name}, which is no Python 3.10 or newer")

    @pytest.mark.parametrize("too_old", [None, (2, 7, 18), (3, 9, 18)])
    def test_none(self, copy: Copy, too_old: tuple | None) -> None:
        if too_old:
            copy.add_python("python3", *too_old)
        done = copy.functions("check_python_version; echo went on")
        assert done.returncode == 1
        assert done.stdout.startswith("[ERROR] No Python 3.10 or newer was found.")
        assert done.stdout.count("\n") == 1

    def test_venv_is_not_made_from_itself(self, copy: Copy) -> None:
        copy.add_python("python3.12", 3, 12, 1)
        copy.add_venv()
        copy.add_python("python3.10", 3, 10, 0, at=copy.venv / "bin")
        activated = f"{copy.venv / 'bin'}:{copy.bin}"
        assert "Using python3.12" in copy.functions("check_python_version", PATH=activated).stdout


class TestCreateVenv:
    CODE = "PYTHON=python3.12; create_venv"

    @pytest.fixture(autouse=True)
    def python(self, copy: Copy) -> None:
        copy.add_python("python3.12", 3, 12, 1)

    def test_makes_one(self, copy: Copy) -> None:
        assert copy.functions(self.CODE).stdout == "[SUCCESS] Made venv/.\n"
        assert copy.calls("-m venv") == [f"-m venv {copy.venv}"]

    def test_without_a_terminal_it_is_kept(self, copy: Copy) -> None:
        copy.add_venv()
        assert "[INFO] Keeping venv/" in copy.functions(self.CODE).stdout
        assert (copy.venv / "mine").exists()

    def test_with_stdin_closed_it_is_kept(self, copy: Copy) -> None:
        copy.add_venv()
        assert "[INFO] Keeping venv/" in copy.functions(f"{self.CODE} <&-").stdout

    @pytest.mark.parametrize(("answer", "kept"), [("y\n", False), ("Yes\n", False), ("\n", True), ("n\n", True)])
    def test_on_a_terminal_it_asks(self, copy: Copy, answer: str, kept: bool) -> None:
        copy.add_venv()
        status, screen = copy.functions_on_terminal(self.CODE, answer)
        assert status == 0
        assert "delete and recreate? (y/N)" in screen
        assert (copy.venv / "mine").exists() == kept
        assert bool(copy.calls("-m venv")) != kept

    def test_book_lab_and_test_do_not_ask(self, copy: Copy) -> None:
        copy.add_venv()
        _, screen = copy.functions_on_terminal(f"QUESTIONS=no; {self.CODE}")
        assert "delete" not in screen
        assert (copy.venv / "mine").exists()

    def test_half_made_is_made_anew(self, copy: Copy) -> None:
        copy.venv.mkdir()
        done = copy.functions(self.CODE)
        assert done.stdout.startswith("[WARNING] venv/ has no working Python")
        assert (copy.venv / "bin" / "python").exists()

    def test_made_for_another_folder_is_made_anew(self, copy: Copy) -> None:
        copy.add_venv(stamped=True)
        moved = copy.root.with_name("moved here")
        copy.root.rename(moved)
        done = copy.run(BASH, "-c", f"source ./setup_env.sh; {self.CODE}", cwd=moved)
        assert done.stdout.startswith(f"[WARNING] venv/ was made for another folder, {copy.root}: making it anew.")
        assert not (moved / "venv" / "mine").exists()

    def test_a_broken_one_is_made_anew_by_a_bare_enter(self, copy: Copy) -> None:
        copy.venv.mkdir()
        status, screen = copy.functions_on_terminal(self.CODE, "\n")
        assert status == 0
        assert "venv/ exists, but has no working Python (3.10 or newer, with pip): delete and recreate? (Y/n)" in screen
        assert (copy.venv / "bin" / "python").exists()

    def test_a_broken_one_cannot_be_kept(self, copy: Copy) -> None:
        copy.venv.mkdir()
        status, screen = copy.functions_on_terminal(self.CODE, "n\n")
        assert status == 1
        assert "[ERROR]" in re.sub(r"\x1b\[\d+m", "", screen).splitlines()[-1]
        assert copy.venv.exists()


class TestInstall:
    REQUIREMENTS = "-r requirements.txt"

    @pytest.fixture(autouse=True)
    def python(self, copy: Copy) -> None:
        copy.add_python("python3.12", 3, 12, 1)

    def test_installs_once(self, copy: Copy, tmp_path: Path) -> None:
        for _ in range(2):
            done = copy.run(str(copy.root / "setup_env.sh"), cwd=tmp_path)  # from another folder
            assert done.returncode == 0, done.stdout
            assert "no such folder" not in done.stdout  # what pip warns of is of no use to readers
            assert done.stdout.endswith("[SUCCESS] Ready. To activate the environment, type: source activate.sh\n")
            assert copy.installs() == [self.REQUIREMENTS]
        assert "installed already" in done.stdout

    @pytest.mark.parametrize("line", ["./setup_env.sh <&-", "echo an answer | ./setup_env.sh"])
    def test_without_a_terminal_nothing_is_read(self, copy: Copy, line: str) -> None:
        assert copy.run(BASH, "-c", line).returncode == 0
        assert copy.installs() and not copy.calls("an answer")

    @pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
    def test_installs_again_when_the_list_changes(self, copy: Copy, name: str) -> None:
        copy.add_venv(stamped=True)
        with (copy.root / name).open("a") as file:
            file.write("# changed\n")
        copy.setup()
        assert copy.installs() == [self.REQUIREMENTS]

    @pytest.mark.parametrize("command", [[], ["lab"], ["test"]])
    def test_a_failed_install_is_an_error_and_is_tried_again(self, copy: Copy, command: list[str]) -> None:
        for _ in range(2):
            done = copy.setup(*command, FAILING="pip")
            assert done.returncode == 1
            *_, why, sentence = done.stdout.splitlines()
            assert why == "pip complains"
            assert sentence.startswith("[ERROR] pip could not install requirements.txt")
        assert copy.installs() == [self.REQUIREMENTS] * 2

    def test_a_failed_install_leaves_nothing_to_go_back_to(self, copy: Copy) -> None:
        copy.add_venv(stamped=True)
        before = (copy.root / "requirements.txt").read_text()
        (copy.root / "requirements.txt").write_text("torch==1000\n")
        assert copy.setup(FAILING="pip").returncode == 1
        (copy.root / "requirements.txt").write_text(before)
        assert copy.setup().returncode == 0
        assert len(copy.installs()) == 2

    def test_a_failed_import_is_an_error_and_is_tried_again(self, copy: Copy) -> None:
        for _ in range(2):
            done = copy.setup(VERIFY_STATUS="1")
            assert done.returncode == 1
            assert done.stdout.splitlines()[-1].startswith("[ERROR] An import failed.")
        assert copy.installs() == [self.REQUIREMENTS] * 2

    @pytest.mark.parametrize(
        ("flag", "extra", "isolation"), [("--flash-attn", "cuda", "--no-build-isolation "), ("--gptq", "gptq", "")]
    )
    def test_optional_parts_keep_to_the_pins(self, copy: Copy, flag: str, extra: str, isolation: str) -> None:
        copy.add_gpu()
        copy.add_venv(stamped=True)
        assert copy.setup(flag, HAS_TORCH=f"{PIN} CUDA").returncode == 0
        assert copy.installs()[-1] == f"{isolation}-r requirements.txt -e .[{extra}]"

    def test_flash_attention_needs_cuda(self, copy: Copy) -> None:
        done = copy.setup("--flash-attn")
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1].startswith("[ERROR] Flash Attention 2 needs CUDA")
        assert not copy.installs()

    def test_gptq_needs_linux(self, copy: Copy) -> None:
        copy.system("Darwin")
        done = copy.setup("--gptq")
        assert done.returncode == 1
        assert "Linux only" in done.stdout.splitlines()[-1]

    @pytest.mark.parametrize(
        ("answer", "installed"), [("\n", []), ("1\n", []), ("3\n", [".[gptq]"]), ("4\n", ["triton==3.7.1"])]
    )
    def test_optional_parts_are_asked_for_on_a_terminal(self, copy: Copy, answer: str, installed: list[str]) -> None:
        copy.add_venv()
        copy.functions('stamp >"$STAMP"')
        status, screen = copy.on_terminal("./setup_env.sh", answers="n\n" + answer)
        assert status == 0, screen
        assert "1) none (the default)" in screen
        calls = copy.calls("pip --disable-pip-version-check install")
        assert [call.split()[-1] for call in calls] == installed

    @pytest.mark.parametrize(
        ("command", "wanted"), [([], False), (["book"], False), (["lab"], False), (["test"], True)]
    )
    def test_triton_is_for_the_tests(self, copy: Copy, command: list[str], wanted: bool) -> None:
        for _ in range(2):
            assert copy.setup(*command).returncode == 0
            assert copy.installs() == [self.REQUIREMENTS] + [TRITON] * wanted

    @pytest.mark.parametrize("words", [["--triton"], ["book", "--triton"], ["test", "--triton"]])
    def test_triton_by_a_flag(self, copy: Copy, words: list[str]) -> None:
        for _ in range(2):
            assert copy.setup(*words).returncode == 0
            assert copy.installs() == [self.REQUIREMENTS, TRITON]

    def test_triton_is_installed_again_when_the_list_changes_or_venv_is_new(self, copy: Copy) -> None:
        copy.add_venv(stamped=True)
        with (copy.root / "requirements.txt").open("a") as file:
            file.write("# changed\n")
        assert copy.setup("test").returncode == 0
        assert copy.installs() == [self.REQUIREMENTS, TRITON]
        (copy.venv / "bin" / "python").unlink()
        assert copy.setup("test").returncode == 0
        assert copy.installs() == [self.REQUIREMENTS, TRITON] * 2

    @pytest.mark.parametrize("words", [["--triton"], ["test"]])
    def test_torchs_cuda_build_brings_its_own_triton(self, copy: Copy, words: list[str]) -> None:
        assert copy.setup(*words, HAS_TORCH=f"{PIN} CUDA").returncode == 0
        assert copy.installs() == [self.REQUIREMENTS]

    @pytest.mark.parametrize(("words", "says"), [(["--triton"], True), (["test"], False)])
    def test_macos_goes_on_without_triton(self, copy: Copy, words: list[str], says: bool) -> None:
        copy.system("Darwin")
        done = copy.setup(*words, MACHINE="Darwin arm64 0 15.1")
        assert done.returncode == 0, done.stdout
        assert copy.installs() == [self.REQUIREMENTS]
        assert ("[WARNING] Triton is for Linux only: going on without it." in done.stdout) == says

    def test_a_triton_that_cannot_be_installed_is_an_error(self, copy: Copy) -> None:
        copy.add_venv()
        copy.functions('stamp >"$STAMP"')
        for _ in range(2):
            done = copy.setup("test", FAILING="pip")
            assert done.returncode == 1
            assert done.stdout.splitlines()[-1].startswith("[ERROR] pip could not install Triton")
        assert copy.installs() == [TRITON] * 2


class TestPipsSurroundings:
    @pytest.fixture(autouse=True)
    def python(self, copy: Copy) -> None:
        copy.add_python("python3.12", 3, 12, 1)

    def test_what_people_set_for_their_own_pip_does_not_count(self, copy: Copy) -> None:
        assert copy.setup(PIP_USER="1", PIP_TARGET="/elsewhere").returncode == 0
        assert set(Path(f"{copy.calls_file}.environment").read_text().splitlines()) == {"no unset"}

    def test_a_line_now_and_then(self, copy: Copy) -> None:
        """A minute is a twentieth of a second here, and pip takes as long as it takes to see three."""
        slow = copy.bin / "slow"
        write_script(slow, f"#!/bin/sh\necho Collecting torch\nuntil [ -f '{copy.root}/seen' ]; do sleep 0.05; done\n")
        watch = 'while read -r line; do echo "$line"; case $line in *"Minute 3"*) : >seen ;; esac; done'
        done = copy.run(BASH, "-c", f"./setup_env.sh | {watch}", SLOW=str(slow), TICK_S="0.05")
        assert "[INFO] Minute 2: Collecting torch\n[INFO] Minute 3: Collecting torch\n" in done.stdout
        assert done.stdout.endswith("source activate.sh\n")

    @pytest.mark.parametrize(
        ("machine", "why"),
        [
            ("Linux x86_64 2.28 0", None),
            ("Linux aarch64 2.39 0", None),
            ("Darwin arm64 0 14.0", None),
            ("Darwin arm64 0 26.1", None),
            ("Darwin x86_64 0 14.5", "an Intel processor"),
            ("Darwin arm64 0 13.7", "macOS 13.7, and 14 is needed"),
            ("Linux x86_64 2.27 0", "glibc 2.27, and glibc 2.28 is needed"),
            ("Linux x86_64 2.5 0", "glibc 2.28 is needed"),
            ("Linux x86_64 musl 0", "glibc 2.28 is needed"),
            ("Linux armv7l 2.36 0", "armv7l"),
            ("Windows AMD64 0 0", "work in WSL"),
        ],
    )
    def test_where_torch_has_no_wheel_it_is_said_before_pip_is_called(
        self, copy: Copy, machine: str, why: str | None
    ) -> None:
        copy.system(machine.split()[0])
        done = copy.setup(MACHINE=machine, HAS_TORCH="")
        if why is None:
            assert done.returncode == 0, done.stdout
        else:
            assert done.returncode == 1
            assert done.stdout.splitlines()[-1].startswith(f"[ERROR] torch {PIN} has no wheel for this machine: ")
            assert why in done.stdout
            assert not copy.installs()

    def test_caches_go_under_venv_where_home_cannot_be_written(self, copy: Copy) -> None:
        show = 'find_place_for_caches; echo "${MPLCONFIGDIR-} ${JUPYTER_DATA_DIR-} ${IPYTHONDIR-}"'
        assert copy.functions(show).stdout == "  \n"
        done = copy.functions(show, HOME=str(copy.root / "nowhere"), IPYTHONDIR="/mine")
        home = copy.venv / "home"
        assert done.stdout == f"{home}/matplotlib {home}/jupyter/data /mine\n"


class TestWhichTorch:
    """What pip is asked for, by machine, flag, the torch that is there, and what is offered where."""

    CPU, ALL = f"torch=={PIN}+cpu", "-r requirements.txt"
    FROM_PYTORCH = f"torch=={PIN} --index-url https://download.pytorch.org/whl/cpu"
    CUDA = f"torch==={PIN}"
    OURS, PYPI, PYTORCH = f"2.15.0, {PIN}+cpu, {PIN}", f"2.15.0, {PIN}, 2.12.0", f"2.15.0+cpu, {PIN}+cpu"

    @pytest.fixture(autouse=True)
    def python(self, copy: Copy) -> None:
        copy.add_python("python3.12", 3, 12, 1)

    @pytest.mark.parametrize("command", [[], ["book"], ["lab"], ["test"]])
    def test_every_command_takes_the_cpu_build_without_a_gpu(self, copy: Copy, command: list[str]) -> None:
        done = copy.setup(*command, HAS_TORCH="", OFFERED=self.PYPI, INDEX=self.PYTORCH)
        assert done.returncode == 0, done.stdout
        assert (
            "[INFO] There is no NVIDIA GPU here: taking torch's CPU build (--cuda-torch for the other)." in done.stdout
        )
        assert "GB are fetched" in done.stdout
        assert copy.installs() == [self.FROM_PYTORCH, self.ALL] + [TRITON] * (command == ["test"])

    def test_what_pips_own_configuration_offers_comes_first(self, copy: Copy) -> None:
        copy.setup(HAS_TORCH="", OFFERED=self.OURS, INDEX=self.PYTORCH)
        assert copy.installs() == [self.CPU, self.ALL]
        assert not copy.calls("--index-url")

    def test_the_one_that_is_there_is_enough(self, copy: Copy) -> None:
        for torch in (f"{PIN}+cpu", f"{PIN} CUDA", f"{PIN}+cu130 CUDA"):
            copy.setup(HAS_TORCH=torch)
        assert copy.installs() == [self.ALL]
        assert not copy.calls("-m pip --disable-pip-version-check index")

    @pytest.mark.parametrize("there", ["", "2.12.0+cpu", "2.13.1"])
    def test_what_counts_is_the_version_in_its_metadata(self, copy: Copy, there: str) -> None:
        """A folder of torch without metadata is what Ctrl-C leaves; another version is what a raised pin leaves."""
        copy.add_venv()
        (copy.venv / "lib" / "python3.12" / "site-packages" / "torch").mkdir(parents=True)
        copy.setup(HAS_TORCH=there, INDEX=self.PYTORCH)
        assert copy.installs() == [self.FROM_PYTORCH, self.ALL]

    def test_goes_on_where_pytorchs_index_cannot_be_reached(self, copy: Copy) -> None:
        done = copy.setup(HAS_TORCH="", OFFERED=self.PYPI)
        assert done.returncode == 0
        assert (
            "[WARNING] https://download.pytorch.org/whl/cpu cannot be reached, so torch is what pip finds"
            in done.stdout
        )
        assert copy.installs() == [self.ALL]
        assert all("--retries 0 --timeout 10" in call for call in copy.calls("index versions torch"))

    def test_with_a_gpu_pip_is_left_alone(self, copy: Copy) -> None:
        copy.add_gpu()
        done = copy.setup(HAS_TORCH="")
        assert copy.installs() == [self.ALL]
        assert "5.4 GB" in done.stdout

    def test_on_macos_there_is_one_build(self, copy: Copy) -> None:
        copy.system("Darwin")
        copy.setup(HAS_TORCH="", MACHINE="Darwin arm64 0 15.1")
        assert copy.installs() == [self.ALL]
        assert not copy.calls("index versions")

    def test_cpu_by_a_flag_with_a_gpu(self, copy: Copy) -> None:
        copy.add_gpu()
        copy.setup("--cpu-torch", HAS_TORCH="", INDEX=self.PYTORCH)
        assert copy.installs() == [self.FROM_PYTORCH, self.ALL]

    @pytest.mark.parametrize(
        "command", [["--cuda-torch"], ["book", "--cuda-torch"], ["--cuda-torch", "lab", "--port=1"]]
    )
    def test_cuda_by_a_flag_replaces_the_cpu_build(self, copy: Copy, command: list[str]) -> None:
        copy.add_venv(stamped=True)
        done = copy.setup(*command)
        assert copy.installs() == [self.CUDA, self.ALL], done.stdout

    def test_cpu_by_a_flag_replaces_the_cuda_build(self, copy: Copy) -> None:
        copy.add_venv(stamped=True)
        copy.setup("--cpu-torch", HAS_TORCH=f"{PIN} CUDA", INDEX=self.PYTORCH)
        assert copy.calls("uninstall --yes -qq torch")
        assert copy.installs() == [self.FROM_PYTORCH, self.ALL]

    @pytest.mark.parametrize("other", ["--flash-attn", "--cuda-torch"])
    def test_contradictions_are_refused(self, copy: Copy, other: str) -> None:
        copy.add_gpu()
        for flags in (["--cpu-torch", other], [other, "book", "--cpu-torch"]):
            done = copy.setup(*flags)
            assert done.returncode == 2
            assert done.stdout.startswith("[ERROR] --")
        assert not copy.calls("")


class TestVerifyInstallation:
    """With stand-ins for the three packages, which a real Python imports."""

    CUDA = """
class cuda:
    is_available = staticmethod(lambda: {gpus} > 0)
    device_count = staticmethod(lambda: {gpus})
    @staticmethod
    def get_device_properties(index):
        class gpu:
            name, total_memory = "NVIDIA H100", 79 * 2**30 + 2**28
        return gpu
"""

    def verify(self, copy: Copy, gpus: int = 0, without: str = "") -> subprocess.CompletedProcess[str]:
        packages = copy.root / "packages"
        packages.mkdir()
        for name in {"folovllm", "torch", "transformers"} - {without}:
            (packages / f"{name}.py").write_text(f"__version__ = '1.2.3'\n{self.CUDA.format(gpus=gpus)}")
        code = f"import sys; sys.path.insert(0, '{packages}'); exec(sys.stdin.read())"
        write_script(copy.venv / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" -IuS -c "{code}"\n')
        return copy.functions("verify_installation")

    def test_without_a_gpu(self, copy: Copy) -> None:
        done = self.verify(copy)
        assert done.returncode == 0
        versions = "    folovllm 1.2.3\n    torch 1.2.3\n    transformers 1.2.3\n"
        assert done.stdout.startswith(f"{versions}    CUDA: no\n[SUCCESS]")

    def test_with_gpus(self, copy: Copy) -> None:
        lines = self.verify(copy, gpus=2).stdout.splitlines()
        assert lines[3:6] == ["    CUDA: yes", "    GPU 0: NVIDIA H100, 79.2 GiB", "    GPU 1: NVIDIA H100, 79.2 GiB"]

    @pytest.mark.parametrize(
        ("built", "says"),
        [
            ("", None),
            ("13.0", "the driver is for CUDA 12.4, torch was built for CUDA 13.0."),
            (
                "none",
                "nvidia-smi finds a GPU (CUDA 12.4), but this torch is the CPU build: ./setup_env.sh --cuda-torch",
            ),
        ],
    )
    def test_a_gpu_that_torch_does_not_see(self, copy: Copy, built: str, says: str | None) -> None:
        copy.add_gpu()
        copy.add_venv()
        done = copy.functions("verify_installation", TORCH_CUDA=built)
        assert ("[WARNING]" in done.stdout) == (says is not None)
        assert (says or "") in done.stdout
        assert "[WARNING]" not in copy.functions("TORCH_BUILD=cpu; verify_installation", TORCH_CUDA=built).stdout

    @pytest.mark.parametrize("name", ["folovllm", "torch", "transformers"])
    def test_an_import_that_fails(self, copy: Copy, name: str) -> None:
        done = self.verify(copy, without=name)
        assert done.returncode == 1
        *_, why, sentence = done.stdout.splitlines()
        assert why == f"import {name}: ModuleNotFoundError: No module named '{name}'"
        assert sentence.startswith("[ERROR] An import failed.")


class TestCommands:
    @pytest.fixture(autouse=True)
    def venv(self, copy: Copy) -> None:
        copy.add_python("python3.12", 3, 12, 1)
        copy.add_venv(stamped=True)
        copy.calls_file.write_text("")

    @pytest.mark.parametrize("arguments", [["serve"], ["--fast"], ["book", "now"], ["clean", "now"], ["now", "book"]])
    def test_unknown(self, copy: Copy, arguments: list[str]) -> None:
        done = copy.setup(*arguments)
        assert done.returncode == 2
        (sentence,) = done.stdout.splitlines()
        assert sentence.startswith("[ERROR] ") and "--help" in sentence
        assert any(f"'{argument}'" in sentence for argument in arguments)
        assert not copy.calls("")

    @pytest.mark.parametrize("words", [["-h"], ["--help"], ["help"], ["--gptq", "--help"], ["book", "-h"]])
    def test_help(self, copy: Copy, words: list[str]) -> None:
        done = copy.setup(*words)
        assert done.returncode == 0
        flags = ["--flash-attn", "--gptq", "--triton", "--cpu-torch", "--cuda-torch"]
        for word in ["book", "lab", "test", "clean", *flags, "1.8 GB"]:
            assert word in done.stdout
        assert not copy.calls("")

    def test_clean(self, copy: Copy) -> None:
        (copy.root / "_build").mkdir()
        for _ in range(2):
            assert copy.setup("clean").stdout == "[SUCCESS] Deleted venv/ and the built site.\n"
        assert not copy.venv.exists() and not (copy.root / "_build").exists()

    def test_under_sh_it_goes_on_under_bash(self, copy: Copy) -> None:
        dash = shutil.which("dash")
        done = copy.run(dash or "sh", "setup_env.sh", "help")
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: ")

    @pytest.mark.parametrize("words", [["--gptq", "test", "-x"], ["test", "--gptq", "-x"], ["test", "-x", "--gptq"]])
    def test_flags_go_before_and_after_a_command(self, copy: Copy, words: list[str]) -> None:
        assert copy.setup(*words).returncode == 0
        assert copy.installs() == ["-r requirements.txt -e .[gptq]"]
        assert copy.calls("-m pytest") == ["-m pytest --nbval -n 2 -x"]

    def test_book_ends_with_the_file_to_open(self, copy: Copy) -> None:
        done = copy.setup("book")
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1].endswith(f" {copy.root}/_build/html/index.html")
        assert copy.calls("build.py") == ["book/build.py"]

    def test_book_says_that_it_failed(self, copy: Copy) -> None:
        done = copy.setup("book", FAILING="build")
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1].startswith("[ERROR] The site could not be built")

    def test_book_sets_up_first(self, copy: Copy) -> None:
        shutil.rmtree(copy.venv)
        assert copy.setup("book").returncode == 0
        assert copy.installs() == [TestInstall.REQUIREMENTS]

    @pytest.mark.parametrize("user", ["0", "1000"])
    def test_lab(self, copy: Copy, user: str) -> None:
        (copy.bin / "id").unlink()
        write_script(copy.bin / "id", f"#!/bin/sh\necho {user}\n")
        (copy.root / "notebooks").mkdir()
        for name in ("01_second", "00_first", "Untitled"):
            (copy.root / "notebooks" / f"{name}.ipynb").touch()
        assert copy.setup("lab", "--no-browser").returncode == 0
        (call,) = copy.calls("jupyterlab")
        root = f"--ServerApp.root_dir={copy.root}"
        assert call.startswith(f"-m jupyterlab {root} --LabApp.default_url=/lab/tree/notebooks/00_first.ipynb ")
        assert call.endswith(" --allow-root --no-browser" if user == "0" else ".ipynb --no-browser")

    def test_test_runs_every_check_and_nothing_else(self, copy: Copy) -> None:
        done = copy.setup("test", "-k", "one or two")
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1] == "[SUCCESS] All checks passed."
        look_at_venv, *checks = copy.calls("")
        assert look_at_venv.startswith("-c import pip")
        assert checks == [
            "-m ruff check .",
            "-m ruff format --check .",
            "-m mypy",
            "book/build.py --strict",
            "-m pytest --nbval -n 2 -k one or two",
        ]

    @pytest.mark.parametrize("question", ["-h", "--help", "--collect-only"])
    def test_a_question_to_pytest_goes_to_pytest(self, copy: Copy, question: str) -> None:
        copy.setup("test", "-q", question)
        assert copy.calls("")[-1] == f"-m pytest --nbval -q {question}"
        assert not copy.calls("ruff")

    @pytest.mark.parametrize("failing", ["mypy", "pytest"])
    def test_test_goes_on_after_a_failure_and_names_it(self, copy: Copy, failing: str) -> None:
        done = copy.setup("test", FAILING=failing)
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1] == f"[ERROR] Failed: {failing}."
        assert copy.calls("-m pytest")

    def test_ci_runs_the_same(self, copy: Copy, tmp_path: Path) -> None:
        (copy.root / ".ci").mkdir()
        shutil.copy(ROOT / ".ci" / "run", copy.root / ".ci")
        done = copy.run(str(copy.root / ".ci" / "run"), cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        assert copy.calls("-m pytest")


SHELLS = [BASH, pytest.param(ZSH, marks=pytest.mark.skipif(ZSH is None, reason="zsh is not installed"))]


class TestActivate:
    @pytest.mark.parametrize("shell", [*SHELLS, "sh"])
    def test_run_instead_of_sourced(self, copy: Copy, shell: str) -> None:
        done = copy.run(shell, "activate.sh")
        assert done.returncode == 1
        assert done.stdout.startswith("[ERROR]") and "source activate.sh" in done.stdout

    @pytest.mark.parametrize("shell", SHELLS)
    def test_no_venv_yet(self, copy: Copy, shell: str) -> None:
        done = copy.run(shell, "-uc", "source ./activate.sh; echo $? and the shell lives")
        assert done.stdout.startswith("[ERROR] There is no venv/") and "./setup_env.sh" in done.stdout
        assert done.stdout.endswith("1 and the shell lives\n")

    @pytest.mark.parametrize("shell", SHELLS)
    def test_activates(self, copy: Copy, shell: str) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy.venv], check=True)
        code = 'source "a folder/activate.sh"; echo "$? $VIRTUAL_ENV"; command -v python'
        done = copy.run(shell, "-uc", code, cwd=copy.root.parent)
        version = ".".join(map(str, sys.version_info[:3]))
        assert done.stdout.startswith(f"[INFO] Python {version}")
        assert done.stdout.endswith(f" at {copy.venv}/bin/python\n0 {copy.venv}\n{copy.venv}/bin/python\n")

    def test_a_venv_made_for_another_folder(self, copy: Copy) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy.venv], check=True)
        copy.root = copy.root.rename(copy.root.with_name("moved here"))
        done = copy.run(BASH, "-c", 'source ./activate.sh; echo "$? ${VIRTUAL_ENV-none}"')
        assert done.stdout.startswith("[ERROR] venv/ was made for another folder.")
        assert done.stdout.endswith("\n1 none\n")


IGNORED = [
    "folovllm/__pycache__/config.cpython-312.pyc",
    "folovllm.egg-info/PKG-INFO",
    "venv/bin/python",
    ".vscode/settings.json",
    ".idea/workspace.xml",
    "notebooks/.ipynb_checkpoints/01-checkpoint.ipynb",
    "model.bin",
    "models/model.safetensors",
    "folovllm/model.safetensors",
    "model.pth",
    "run.log",
    "notes.tmp",
    "notes.md~",
    "_build/html/index.html",
    ".pytest_cache/README.md",
]
KEPT = [
    "folovllm/tales/model/model.safetensors",
    "folovllm/tales/model/config.json",
    "folovllm/config.py",
    "notebooks/01_first.ipynb",
    "book/setup.md",
    ".github/workflows/test.yml",
    ".ci/run",
]


def test_gitignore(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", "init", "--quiet", "--template=", tmp_path], check=True, env=env)
    done = subprocess.run(
        ["git", "check-ignore", "--stdin"],
        cwd=tmp_path,
        env=env,
        input="\n".join(IGNORED + KEPT),
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == IGNORED


def test_line_ends_are_those_of_linux_everywhere() -> None:
    """As git on Windows would check them out, which is where WSL finds them."""
    files = ["setup_env.sh", "activate.sh", ".ci/run", "book/build.py", "notebooks/01_configs.ipynb"]
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git repository")
    done = subprocess.run(
        ["git", "-c", "core.autocrlf=true", "check-attr", "eol", "--", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [f"{name}: eol: lf" for name in files]


class TestWorkflow:
    WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    JOBS = WORKFLOW["jobs"]

    @pytest.mark.parametrize("name", list(JOBS))
    def test_a_job_ends_and_runs_once(self, name: str) -> None:
        job = self.JOBS[name]
        assert 5 <= job["timeout-minutes"] <= 60
        assert "github.event_name == 'push'" in job["if"]
        assert self.WORKFLOW["concurrency"]["cancel-in-progress"]

    def test_the_pythons_are_the_oldest_the_newest_and_that_of_the_outputs(self) -> None:
        packages = [
            step for job in self.JOBS.values() for step in job["steps"] if "setup-python" in step.get("uses", "")
        ]
        assert all(step["with"]["cache"] == "pip" for step in packages)
        assert self.JOBS["package"]["strategy"]["matrix"]["python"] == ["3.10", "3.14"]
        for name in ("everything", "package"):
            (step,) = [step for step in self.JOBS[name]["steps"] if "./setup_env.sh" in step.get("run", "")]
            assert step["env"]["PYTHON"] == "${{ steps.python.outputs.python-path }}"

    def test_the_site_is_published_only_where_pages_is_on(self) -> None:
        assert "github.event.repository.has_pages" in self.JOBS["publish"]["if"]
        assert self.JOBS["publish"]["needs"] == "everything"


def test_every_pin_lies_in_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    needs = map(Requirement, itertools.chain.from_iterable(lists))
    ranges = {canonicalize_name(need.name): need.specifier for need in needs}
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line and not line.startswith("-")]
    assert "torch" in {pin.name for pin in pins}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert ranges[canonicalize_name(pin.name)].contains(specifier.version, prereleases=True), pin


def test_everything_that_is_named_is_pinned() -> None:
    """For each Python: a requirement that is not pinned is another version next month."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *extras["book"], *extras["test"], *extras["triton"]]
    named = {Requirement(need).name for need in needs}
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line and not line.startswith("-")]
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        setting = {"python_version": python, "extra": "triton"}
        here = [pin.name for pin in pins if not pin.marker or pin.marker.evaluate(setting)]
        assert len(here) == len(set(here)), f"pinned twice for Python {python}"
        assert named == set(here), f"pinned for Python {python}: {named ^ set(here)}"
