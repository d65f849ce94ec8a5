"""The project of the Hugging Face kernel, as it is put together. tests/integrations has the built kernel."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tools import hf_kernel

ROOT = Path(__file__).resolve().parents[2]
PROJECT = hf_kernel.project()
PACKAGE = {name[len(hf_kernel.PACKAGE):-len(".py")]: data.decode() for name, data in PROJECT.items()
           if name.startswith(hf_kernel.PACKAGE)}
WRITTEN_BY_THE_BUILD = {"_ops"}


def imports(text):
    """(the number of dots, the module's name, the names taken from it) of each import."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


@pytest.mark.parametrize("name", PACKAGE)
def test_its_files_import_each_other_and_nothing_but_torch_and_the_standard_library(name):
    for dots, module, names in imports(PACKAGE[name]):
        if dots == 0:
            assert module.split(".")[0] in {"torch", *sys.stdlib_module_names}, module
        else:
            assert dots == 1 and {module} - {""} or names
            assert set([module] if module else names) <= PACKAGE.keys() | WRITTEN_BY_THE_BUILD, (module, names)


def test_no_file_names_the_library_of_the_installed_package():
    """kernel-builder looks for it in some decorators."""
    def names_it(node):
        return isinstance(node, ast.Attribute) and node.attr == "ldm_fused" \
            or isinstance(node, ast.Constant) and str(node.value).startswith("ldm_fused::")

    assert [name for name, text in PACKAGE.items() if any(map(names_it, ast.walk(ast.parse(text))))] == []


def sources(section):
    text = PROJECT["build.toml"].decode().split(f"[{section}]\n")[1].split("\n[")[0]
    return re.findall(r'"(csrc/[^"]*)"', text)


def test_every_source_is_listed_once_for_the_cuda_build_and_none_of_cuda_for_the_cpu_build():
    there = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file())
    assert sorted(sources("torch") + sources("kernel.ldm_fused_cuda")) == there
    assert sorted(sources("torch") + sources("kernel.ldm_fused_cpu")) == [s for s in there if "/cuda/" not in s]


def test_what_is_in_the_project_and_not_in_its_folder_is_the_repository_s():
    own = {str(path.relative_to(ROOT / "hf_kernel")) for path in (ROOT / "hf_kernel").rglob("*") if path.is_file()}
    for name in PROJECT.keys() - own:
        path = ROOT / name.replace("torch-ext/", "")
        assert path.read_bytes() == PROJECT[name], name


@pytest.mark.parametrize("name, changes", [("csrc/ops.cpp", True), ("torch-ext/ldm_fused/layers.py", True),
                                           ("CARD.md", False)])
def test_a_build_has_another_name_if_something_that_is_built_changes(name, changes):
    other = {**PROJECT, name: PROJECT[name] + b"\n"}
    assert (hf_kernel.identifier(other) != hf_kernel.identifier(PROJECT)) is changes
