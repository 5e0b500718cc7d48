"""What of `tests/gpu` can be seen without a GPU: that nothing is pretended there, and that its report is honest."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
PASSING, FAILING = (
    "def test_a(record_property):\n    record_property('speed', '7 | s')\n",
    "def test_b():\n    assert 1 == 2\n",
)
SKIPPED = "import pytest\n\n\ndef test_c():\n    pytest.skip('no such thing')\n"


def pytest_without_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True)


@pytest.fixture
def runner(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "tests" / "gpu" / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(runner, monkeypatch, tmp_path):
    """Runs a part that consists of one file with these tests."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # these need none, and start sooner without

    def run_part(*tests: str, limit: int = 60):
        path = tmp_path / "test_it.py"
        path.write_text("\n\n".join(tests), encoding="utf-8")
        return runner.run_part("part", runner.Part(limit, (str(path),)))

    return run_part


class TestWithoutGpu:
    def test_every_test_is_skipped_with_the_reason(self):
        done = pytest_without_gpu("-q", "-rs", "tests/gpu")
        assert done.returncode == 0, done.stdout
        last = done.stdout.splitlines()[-1]
        assert "skipped" in last and not any(word in last for word in ("passed", "failed", "error")), last
        assert all("no CUDA device" in line for line in done.stdout.splitlines() if line.startswith("SKIPPED"))

    def test_who_runs_all_tests_does_not_collect_them(self):
        others = [f"--ignore=tests/{name}" for name in ("unit", "integration", "book")]
        done = pytest_without_gpu("-q", "--collect-only", "tests", *others)
        assert "no tests collected" in done.stdout and done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED

    def test_the_command_says_so_and_writes_no_report(self, tmp_path):
        command = [sys.executable, "tests/gpu/run.py", "--report", str(tmp_path / "report.md")]
        done = subprocess.run(command, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True)
        assert done.returncode == 1 and list(tmp_path.iterdir()) == []
        assert done.stderr == "no CUDA device: nothing was run, and no report was written\n"


class TestParts:
    def test_what_passed_failed_and_was_skipped(self, run):
        result = run(PASSING, FAILING, SKIPPED)
        assert (result.passed, result.ok, dict(result.skipped)) == (1, False, {"no such thing": 1})
        ((name, text),) = result.failures
        assert name.endswith("test_it.test_b") and "assert 1 == 2" in text
        assert result.measured == [("speed", "7 | s")]

    @pytest.mark.parametrize(
        ("tests", "why"),
        [
            ("import os\n\n\ndef test_d():\n    os._exit(9)\n", "pytest ended with exit status 9"),
            (SKIPPED, "no test ran"),
            ("import time\n\n\ndef test_e():\n    time.sleep(600)\n", "the limit of 3 s"),
        ],
    )
    def test_what_did_not_come_to_its_end_has_failed(self, run, tests, why):
        result = run(tests, limit=3 if "sleep" in tests else 60)
        assert not result.ok and [name for name, _ in result.failures] == [why]

    def test_parts_fit_into_ten_minutes_and_name_files_that_there_are(self, runner):
        assert sum(part.limit for part in runner.PARTS.values()) < 600
        for part in runner.PARTS.values():
            files = [argument for argument in part.arguments if argument.startswith(("tests/", "notebooks"))]
            assert files and all((ROOT / name).exists() for name in files)


class TestReport:
    def test_it_says_whether_all_passed_and_why_not(self, runner):
        good = runner.Result("good", 5.0, passed=3, measured=[("a | b", "7 x")])
        bad = runner.Result("bad", 2.0, passed=1, failures=[("test_x", "boom")])
        bad.skipped["too small"] = 2
        report = runner.format_report("A card", [good, bad])
        assert report.startswith("# On a GPU: FAILED\n\nA card\n")
        assert "| good | passed | 3 | 0 | 0 | 5 |\n| bad | FAILED | 1 | 1 | 2 | 2 |\n" in report
        assert "| a / b | 7 x |" in report and "### bad: test_x\n\n~~~text\nboom\n~~~" in report
        assert "- bad, 2 x: too small" in report
        assert runner.format_report("A card", [good]).startswith("# On a GPU: passed\n")
        assert runner.format_report("A card", [good], 2).startswith("# On a GPU: not finished, 2 parts missing\n")

    def test_the_exit_status_is_that_of_the_parts(self, runner, monkeypatch, tmp_path):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(runner, "describe_machine", lambda: "A card")
        monkeypatch.setattr(runner, "run_part", lambda name, part: runner.Result(name, passed=int(name != "speed")))
        path = tmp_path / "report.md"
        assert runner.main(["backends", "captured", "--report", str(path)]) == 0
        assert path.read_text().startswith("# On a GPU: passed\n")
        assert runner.main(["--report", str(path)]) == 1
        assert path.read_text().startswith("# On a GPU: FAILED\n")
        with pytest.raises(SystemExit):
            runner.main(["sped"])
