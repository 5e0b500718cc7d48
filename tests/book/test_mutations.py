"""Proof that the checks bite: what is changed in a copy of the repository must make the check that guards it fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from book_helpers import NOTEBOOKS, ROOT, read

COPIED = (
    "folovllm",
    "notebooks",
    "tests/unit",
    "tests/integration",
    "tests/book",
    "tests/conftest.py",
    "pyproject.toml",
)


def page(name: str, source: str) -> str:
    """nbval's name for the one code cell of a notebook that holds this line."""
    code = read(NOTEBOOKS / f"{name}.ipynb").code
    places = [i for i, cell in enumerate(code) if source in cell.source.splitlines()]
    assert len(places) == 1, f"one code cell of {name} should hold the line {source!r}, and these do: {places}"
    return f"notebooks/{name}.ipynb::Cell {places[0]}"


@dataclass(frozen=True)
class Mutation:
    """One change, and the check that must notice it."""

    name: str
    file: str
    old: str
    """Text that the file holds exactly once."""
    new: str
    check: str
    """What to give to pytest: the smallest part that must fail, and that must pass without the change."""


MUTATIONS = [
    Mutation(
        "a default",
        "folovllm/sampling_params.py",
        "max_tokens: int | None = 16",
        "max_tokens: int | None = 32",
        "tests/unit/test_sampling_params.py::TestSamplingParams::test_fields_and_defaults",
    ),
    Mutation(
        "a default that a page shows",
        "folovllm/config.py",
        "block_size: int = 16",
        "block_size: int = 32",
        page("01_configs", "config.cache_config"),
    ),
    Mutation(
        "a bound",
        "folovllm/sampling_params.py",
        "0 < self.top_p <= 1",
        "0 <= self.top_p <= 1",
        "tests/unit/test_sampling_params.py::TestSamplingParams::test_out_of_bounds",
    ),
    Mutation(
        "an operator",
        "folovllm/sample/sampler.py",
        ".masked_fill(top_k == 0, -torch.inf)\n    return logits.masked_fill(logits < threshold",
        ".masked_fill(top_k == 0, -torch.inf)\n    return logits.masked_fill(logits <= threshold",
        "tests/unit/test_sampler.py::TestTopK",
    ),
    Mutation(
        "a reference count",
        "folovllm/core/kv_cache.py",
        "pool.ref_counts[table[first_written]] > 1",
        "pool.ref_counts[table[first_written]] > 2",
        "tests/unit/test_kv_cache.py::TestManager::test_a_fork_shares_and_the_first_who_writes_copies",
    ),
    Mutation(
        "an order",
        "folovllm/core/scheduler.py",
        "self._enqueue(self.swapped, seq)",
        "self.swapped.append(seq)",
        "tests/unit/test_scheduler.py::test_the_last_makes_room_and_the_first_comes_back_first[swap-swapped]",
    ),
    Mutation(
        "what a failed step leaves behind",
        "folovllm/core/scheduler.py",
        "        self.cache.reset()",
        "        pass",
        "tests/integration/test_engine.py::TestFailure::test_a_block_that_a_failed_step_did_not_write_is_never_found",
    ),
    Mutation(
        "a generator that is shared",
        "folovllm/worker/model_runner.py",
        "make_generator(seq.sampling_params, seq.index)",
        "make_generator(seq.sampling_params, 0)",
        "tests/integration/test_owners.py::TestOneCaller::test_a_hundred_answers_take_turns",
    ),
    Mutation(
        "a salt that is forgotten",
        "folovllm/core/kv_cache.py",
        "_before_the_first(seq.cache_salt)",
        'b""',
        "tests/unit/test_kv_cache.py::TestManager::test_only_those_with_the_same_salt_find_each_other",
    ),
    Mutation(
        "a mask",
        "folovllm/attention/gather.py",
        "places >= lens.unsqueeze(1)",
        "places > lens.unsqueeze(1)",
        "tests/integration/test_engine.py::TestSharing::test_the_second_of_two_requests_finds_the_first_ones_blocks",
    ),
    Mutation(
        "a digit in a stored output",
        "notebooks/01_configs.ipynb",
        "CacheConfig(block_size=16",
        "CacheConfig(block_size=17",
        page("01_configs", "config.cache_config"),
    ),
    Mutation(
        "a cell that cannot be run twice",
        "notebooks/01_configs.ipynb",
        '"config.cache_config"',
        '"config.cache_config if len(In) == 2 else None"',
        page("01_configs", "config.cache_config"),
    ),
    Mutation(
        "a word in code that a page lists",
        "folovllm/config.py",
        "Tokens in one KV block.",
        "Tokens in a KV block.",
        "tests/book/test_listings.py::test_a_listing_is_the_code_of_today[01_configs-show_source(CacheConfig)]",
    ),
]


def make_copy(to: Path) -> Path:
    """Copies what the checks need, without compiled files, which could be older than the change."""
    for name in COPIED:
        source, target = ROOT / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copy(source, target)
    return to


def run_python(copy: Path, *arguments: str, cwd: str = ".") -> subprocess.CompletedProcess[str]:
    """Runs this interpreter in the copy, whose package comes before the installed one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    environment |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy / cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def run_checks(copy: Path, *checks: str) -> subprocess.CompletedProcess[str]:
    plugins = ("-p", "nbval.plugin", "-p", "xdist.plugin")  # those that the settings in pyproject.toml need
    options = (*plugins, "--nbval", "-x", "-q", "--color=no", "--tb=short", "-p", "no:cacheprovider")
    return run_python(copy, "-m", "pytest", *options, *checks)


def test_the_unchanged_copy_passes(tmp_path: Path) -> None:
    done = run_checks(make_copy(tmp_path), *dict.fromkeys(mutation.check for mutation in MUTATIONS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_copys_package_is_what_is_imported(tmp_path: Path) -> None:
    copy = make_copy(tmp_path)
    done = run_python(copy, "-c", "import folovllm; print(folovllm.__file__)", cwd="notebooks")
    assert Path(done.stdout.strip()).resolve() == (copy / "folovllm" / "__init__.py").resolve(), done.stderr


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_change_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    file = make_copy(tmp_path) / mutation.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.file} should hold {mutation.old!r} exactly once"
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    done = run_checks(tmp_path, mutation.check)
    assert done.returncode == 1, f"not noticed, or not run at all ({done.returncode}):\n{done.stdout}{done.stderr}"
    failed = [line for line in done.stdout.splitlines() if line.startswith(f"FAILED {mutation.check}")]
    assert failed, f"something else failed:\n{done.stdout}{done.stderr}"
