"""The API reference holds every public name of the package."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import pkgutil
import zlib
from collections.abc import Iterator
from types import ModuleType

import pytest
from site_pages import SITE, require_site

import folovllm


def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(folovllm.__path__, "folovllm.")
    return [folovllm, *(importlib.import_module(module.name) for module in found)]


def public_members(cls: type) -> Iterator[str]:
    """Methods, properties and fields that a class itself defines."""
    fields = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    members = [field for field in fields if field in vars(cls).get("__annotations__", {})]
    for name, value in vars(cls).items():
        is_routine = isinstance(value, (property, classmethod, staticmethod)) or inspect.isfunction(value)
        is_routine &= getattr(value, "__module__", cls.__module__) == cls.__module__  # not made by a base class
        is_value = issubclass(cls, enum.Enum) and isinstance(value, cls)
        if is_routine or is_value:
            members.append(name)
    yield from (name for name in members if not name.startswith("_") or name == "__call__")


def public_names() -> list[str]:
    """Full names of all that the package defines for others to use."""
    names = []
    for module in modules():
        for name, value in vars(module).items():
            is_ours = getattr(value, "__module__", None) == module.__name__
            if not is_ours or name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            names.append(f"{module.__name__}.{name}")
            if inspect.isclass(value):
                names += [f"{module.__name__}.{name}.{member}" for member in public_members(value)]
    return names


@pytest.fixture(scope="module")
def inventory() -> set[str]:
    """Names in ``objects.inv``: four lines of text, then a compressed line for each entry."""
    require_site()
    lines = (SITE / "objects.inv").read_bytes().split(b"\n", 4)
    entries = zlib.decompress(lines[4]).decode().splitlines()
    return {entry.split(" py:")[0] for entry in entries if " py:" in entry}


def test_the_package_has_names():
    assert len(public_names()) > 100
    assert "folovllm.sample.sampler.Sampler.__call__" in public_names()


def test_every_public_name_is_in_the_api_reference(inventory):
    missing = [name for name in public_names() if name not in inventory]
    assert not missing, f"these have no entry in the API reference (book/api): {', '.join(missing)}"


def test_every_module_is_in_the_api_reference(inventory):
    missing = [module.__name__ for module in modules() if module.__name__ not in inventory]
    assert not missing, f"these modules have no page in book/api: {', '.join(missing)}"


def test_every_public_name_has_a_docstring():
    missing = []
    for name in public_names():
        obj = folovllm
        for part in name.split(".")[1:]:
            obj = getattr(obj, part, None)
        if (inspect.isclass(obj) or inspect.isroutine(obj)) and not inspect.getdoc(obj):
            missing.append(name)
    assert not missing, f"these have no docstring: {', '.join(missing)}"
