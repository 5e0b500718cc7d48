"""What people get who install the package alone: the wheel, unpacked far from this repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_PART = re.compile(r"__pycache__|.*\.pyc|\.ipynb_checkpoints|training_state\..*")
"""What may lie in the package's folder and is no part of it."""

IMPORT_ALL = """
import importlib, json, pkgutil
import folovllm
from folovllm.tales import default_model
names = ["folovllm", *(module.name for module in pkgutil.walk_packages(folovllm.__path__, "folovllm."))]
files = {name: importlib.import_module(name).__file__ for name in names}
print(json.dumps({"files": files, "model": default_model()}))
"""


def parts_of_the_package(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in (folder / "folovllm").rglob("*")
        if path.is_file() and not any(NO_PART.fullmatch(part) for part in path.parts)
    }


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel, and what was said while it was built, from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "folovllm", source / "folovllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "folovllm" / "tales" / "model" / "training_state.pt").touch()
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stderr


def test_building_it_warns_of_nothing(build: tuple[Path, str]) -> None:
    assert "Warning" not in build[1], build[1]


def test_everything_travels_and_nothing_else(build: tuple[Path, str]) -> None:
    names = zipfile.ZipFile(build[0]).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    expected = parts_of_the_package(ROOT)
    models = {f"folovllm/tales/{name}/model.safetensors" for name in ("model", "draft")}
    assert {*models, "folovllm/py.typed"} <= expected
    assert inside - expected == set()
    assert expected - inside == set(), "name these in pyproject.toml, under package-data"


def test_every_module_is_imported_from_there(build: tuple[Path, str], tmp_path: Path) -> None:
    unpacked = tmp_path / "elsewhere"
    zipfile.ZipFile(build[0]).extractall(unpacked)
    env = {name: value for name, value in os.environ.items() if name != "FOLOVLLM_MODEL"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    modules = {name for name in parts_of_the_package(ROOT) if name.endswith(".py")}
    assert {str(Path(file).relative_to(unpacked)) for file in answer["files"].values()} == modules
    assert Path(answer["model"]).is_relative_to(unpacked) and (Path(answer["model"]) / "tokenizer.json").is_file()


def test_its_metadata(build: tuple[Path, str]) -> None:
    wheel = zipfile.ZipFile(build[0])
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    versions = {line.rpartition(" ")[2] for line in metadata.get_all("Classifier") if "Python :: 3." in line}
    assert versions == {"3.10", "3.11", "3.12", "3.13", "3.14"}
    assert "folovllm = folovllm.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
