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

TOOLS = ["bash", "cat", "cksum", "cp", "dirname", "env", "head", "mkdir", "rm", "sed", "sh", "touch"]

# Writes down how it was called, runs `-c` code as if it were the version that it says it is, and makes venvs of itself.
# As pip it reads what there is to read, and needs the folder that the relative paths are meant for.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$1 $2" in
    "-c import venv, ensurepip") exit {ensurepip_status} ;;
    "-c import importlib"*) exit "${{TORCH_STATUS-1}}" ;;
    "-c "*) exec "{python}" -I -S -c "import sys
sys.version_info, sys.modules['pip'] = {version}, sys
exec(sys.argv[1])" "$2" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m $FAILING"*) exit 1 ;;
    "-m pip") [ -t 0 ] || cat >>"$CALLS"; [ -f requirements.txt ] ;;
    "-Iu -") exit "${{VERIFY_STATUS-0}}" ;;
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

    @property
    def venv(self) -> Path:
        return self.root / "venv"

    def system(self, name: str) -> None:
        write_script(self.bin / "uname", f"#!/bin/sh\necho {name}\n")

    def add_python(self, name: str, *version: int, at: Path | None = None, ensurepip: bool = True) -> None:
        text = FAKE_PYTHON.format(python=sys.executable, version=version, ensurepip_status=0 if ensurepip else 1)
        write_script((at or self.bin) / name, text)

    def add_venv(self, stamped: bool = False) -> None:
        self.add_python("python", 3, 12, 1, at=self.venv / "bin")
        (self.venv / "mine").touch()
        if stamped:
            self.functions('stamp >"$STAMP"')

    def calls(self, word: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if word in line]

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

    def test_a_broken_one_cannot_be_kept(self, copy: Copy) -> None:
        copy.venv.mkdir()
        status, screen = copy.functions_on_terminal(self.CODE, "n\n")
        assert status == 1
        assert "[ERROR]" in re.sub(r"\x1b\[\d+m", "", screen).splitlines()[-1]
        assert copy.venv.exists()


class TestInstall:
    PIP = "-m pip install"
    REQUIREMENTS = f"{PIP} --no-input --disable-pip-version-check -qq -r requirements.txt"

    @pytest.fixture(autouse=True)
    def python(self, copy: Copy) -> None:
        copy.add_python("python3.12", 3, 12, 1)

    def test_installs_once(self, copy: Copy, tmp_path: Path) -> None:
        for _ in range(2):
            done = copy.run(str(copy.root / "setup_env.sh"), cwd=tmp_path)  # from another folder
            assert done.returncode == 0, done.stdout
            assert done.stdout.endswith("[SUCCESS] Ready. To activate the environment, type: source activate.sh\n")
            assert copy.calls("pip install") == [self.REQUIREMENTS]
        assert "installed already" in done.stdout

    @pytest.mark.parametrize("line", ["./setup_env.sh <&-", "echo an answer | ./setup_env.sh"])
    def test_without_a_terminal_nothing_is_read(self, copy: Copy, line: str) -> None:
        assert copy.run(BASH, "-c", line).returncode == 0
        assert copy.calls("pip install") and not copy.calls("an answer")

    @pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
    def test_installs_again_when_the_list_changes(self, copy: Copy, name: str) -> None:
        copy.add_venv(stamped=True)
        with (copy.root / name).open("a") as file:
            file.write("# changed\n")
        copy.setup()
        assert copy.calls("pip install") == [self.REQUIREMENTS]

    @pytest.mark.parametrize("command", [[], ["lab"], ["test"]])
    def test_a_failed_install_is_an_error_and_is_tried_again(self, copy: Copy, command: list[str]) -> None:
        for _ in range(2):
            done = copy.setup(*command, FAILING="pip")
            assert done.returncode == 1
            assert done.stdout.splitlines()[-1].startswith("[ERROR] pip could not install requirements.txt")
        assert copy.calls("pip install") == [self.REQUIREMENTS] * 2

    def test_a_failed_install_leaves_nothing_to_go_back_to(self, copy: Copy) -> None:
        copy.add_venv(stamped=True)
        before = (copy.root / "requirements.txt").read_text()
        (copy.root / "requirements.txt").write_text("torch==1000\n")
        assert copy.setup(FAILING="pip").returncode == 1
        (copy.root / "requirements.txt").write_text(before)
        assert copy.setup().returncode == 0
        assert len(copy.calls("pip install")) == 2

    def test_a_failed_import_is_an_error_and_is_tried_again(self, copy: Copy) -> None:
        for _ in range(2):
            done = copy.setup(VERIFY_STATUS="1")
            assert done.returncode == 1
            assert done.stdout.splitlines()[-1].startswith("[ERROR] An import failed.")
        assert copy.calls("pip install") == [self.REQUIREMENTS] * 2

    @pytest.mark.parametrize(
        ("flag", "extra", "isolation"), [("--flash-attn", "cuda", "--no-build-isolation "), ("--gptq", "gptq", "")]
    )
    def test_optional_parts_keep_to_the_pins(self, copy: Copy, flag: str, extra: str, isolation: str) -> None:
        write_script(copy.bin / "nvidia-smi", "#!/bin/sh\n")
        copy.add_venv(stamped=True)
        assert copy.setup(flag).returncode == 0
        assert copy.calls("pip install")[-1].endswith(f" {isolation}-r requirements.txt -e .[{extra}]")

    def test_flash_attention_needs_cuda(self, copy: Copy) -> None:
        done = copy.setup("--flash-attn")
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1].startswith("[ERROR] Flash Attention 2 needs CUDA")
        assert not copy.calls("pip install")

    def test_gptq_needs_linux(self, copy: Copy) -> None:
        copy.system("Darwin")
        done = copy.setup("--gptq")
        assert done.returncode == 1
        assert "Linux only" in done.stdout.splitlines()[-1]

    @pytest.mark.parametrize(("answer", "extra"), [("\n", None), ("1\n", None), ("3\n", "gptq")])
    def test_optional_parts_are_asked_for_on_a_terminal(self, copy: Copy, answer: str, extra: str | None) -> None:
        copy.add_venv(stamped=True)
        status, screen = copy.on_terminal("./setup_env.sh", answers="n\n" + answer)
        assert status == 0, screen
        assert "1) none (the default)" in screen
        assert [call.split()[-1] for call in copy.calls("pip install")] == ([f".[{extra}]"] if extra else [])


class TestCpuTorch:
    @pytest.fixture(autouse=True)
    def python(self, copy: Copy) -> None:
        copy.add_python("python3.12", 3, 12, 1)

    @pytest.fixture
    def line(self, copy: Copy) -> str:
        pin = next(line for line in (copy.root / "requirements.txt").read_text().splitlines() if "torch==" in line)
        return f"{pin} --index-url https://download.pytorch.org/whl/cpu"

    def test_is_hinted_at(self, copy: Copy, line: str) -> None:
        done = copy.setup()
        assert f"    venv/bin/python -m pip install {line}\n    ./setup_env.sh\n" in done.stdout
        assert len(copy.calls("pip install")) == 1

    def assert_no_hint(self, copy: Copy, **env: str) -> None:
        done = copy.setup(**env)
        assert done.returncode == 0
        assert "pytorch.org" not in done.stdout

    def test_no_hint_with_a_gpu(self, copy: Copy) -> None:
        write_script(copy.bin / "nvidia-smi", "#!/bin/sh\n")
        self.assert_no_hint(copy)

    def test_no_hint_on_macos(self, copy: Copy) -> None:
        copy.system("Darwin")
        self.assert_no_hint(copy)

    def test_no_hint_when_torch_is_there(self, copy: Copy) -> None:
        self.assert_no_hint(copy, TORCH_STATUS="0")

    def test_flag(self, copy: Copy, line: str) -> None:
        assert copy.setup("--cpu-torch").returncode == 0
        first, second = copy.calls("pip install")
        assert first.endswith(f" {line}")
        assert second == TestInstall.REQUIREMENTS

    @pytest.mark.parametrize(("answer", "installs"), [("\n", 2), ("n\n", 1)])
    def test_is_asked_for_on_a_terminal(self, copy: Copy, answer: str, installs: int) -> None:
        status, screen = copy.on_terminal("./setup_env.sh", answers="\n" + answer)
        assert status == 0, screen
        assert "Install the small CPU build of torch? (Y/n)" in screen
        assert len(copy.calls("pip install")) == installs


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

    @pytest.mark.parametrize("arguments", [["serve"], ["--fast"], ["--gptq", "book"], ["book", "now"]])
    def test_unknown(self, copy: Copy, arguments: list[str]) -> None:
        done = copy.setup(*arguments)
        assert done.returncode == 2
        assert done.stdout.startswith("[ERROR] ") and arguments[-1] in done.stdout and "--help" in done.stdout
        assert not copy.calls("")

    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_help(self, copy: Copy, flag: str) -> None:
        done = copy.setup(flag)
        assert done.returncode == 0
        for word in ["book", "lab", "test", "--flash-attn", "--gptq", "--cpu-torch"]:
            assert word in done.stdout

    def test_book_ends_with_the_file_to_open(self, copy: Copy) -> None:
        (copy.root / "_build").mkdir()
        done = copy.setup("book")
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1].endswith(f" {copy.root}/_build/html/index.html")
        assert not (copy.root / "_build").exists()
        assert copy.calls("jupyter-book") == [f"{copy.venv}/bin/jupyter-book build . --all -W -n --keep-going"]

    def test_book_sets_up_first(self, copy: Copy) -> None:
        shutil.rmtree(copy.venv)
        assert copy.setup("book").returncode == 0
        assert copy.calls("pip install") == [TestInstall.REQUIREMENTS]

    def test_lab(self, copy: Copy) -> None:
        assert copy.setup("lab", "--no-browser").returncode == 0
        assert copy.calls("jupyterlab") == ["-m jupyterlab --notebook-dir notebooks --no-browser"]

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
            f"{copy.venv}/bin/jupyter-book build . --all -W -n --keep-going",
            "-m pytest --nbval -n 2 --dist loadfile -k one or two",
        ]

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
