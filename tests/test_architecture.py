"""The rules of docs/architecture.md and the public names, checked on the source."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import video_llama
from video_llama import errors, processor
from video_llama.errors import ConfigError, MediaError
from video_llama.registry import Registry

PACKAGE = Path(video_llama.__file__).parent
# From the bottom up: a layer imports layers below it, never above.
LAYERS = [
    {"constants", "errors", "registry", "utils", "prompt_parts"},
    {"config", "schema", "media"},
    {"conversation"},
    {"processor"},
    {"model"},
    {"checkpoints"},
    {"inference"},
    {"captioning", "data"},
    {"training", "evaluation", "demo", "integrations"},
    {"compat", "cli", "__main__"},
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_modules(path: Path) -> set[str]:
    """Files of the package that a file imports, at its head or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
    return (found & MODULES.keys()) - {module_name(path)}


def layer_of(module: str) -> int:
    return next(level for level, names in enumerate(LAYERS) if module.split(".")[1] in names)


def test_imports_point_one_way() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if module not in ("video_llama", "video_llama.model.builder")  # both hand on what is above them
        for name in imported_modules(path) - {"video_llama"}
        if layer_of(name) > layer_of(module)
    ]
    assert not upwards


def test_no_files_import_each_other_in_a_circle() -> None:
    edges = {module: imported_modules(path) for module, path in MODULES.items()}
    TopologicalSorter(edges).prepare()  # raises CycleError, which names the files


def test_media_can_be_imported_without_torch() -> None:
    modules = sorted(name for name in MODULES if name.startswith("video_llama.media"))
    check = f"import sys, {', '.join(modules)}; sys.exit(bool({{'torch', 'transformers'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_the_document_lists_every_file() -> None:
    document = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = document[document.index("## 4.") : document.index("## 5.")]
    listed, folder = set(), ""
    for line in section.split("```")[1].splitlines():
        if not line.startswith(" "):
            folder = "".join(re.findall(r"^[\w/]+/", line))
        # A line begins with one file, or with several that are separated by commas.
        names = re.match(r" *\w+\.py(, \w+\.py)*", line)
        if names:
            listed |= {folder + name for name in re.findall(r"\w+\.py", names[0])}
    there = {path.relative_to(PACKAGE).as_posix() for path in MODULES.values() if path.name != "__init__.py"}
    assert listed == there


def test_the_library_never_prints_swallows_or_hard_codes_a_device() -> None:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"bare except: {place}"
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert name != "cuda", f"hard-coded device: {place}"
                assert name != "print" or {"demo", "cli"} & set(path.parts), f"print: {place}"
                devices = [value.value for value in node.args if isinstance(value, ast.Constant)]
                assert name != "device" or not {"cuda", "cuda:0"} & set(devices), f"hard-coded device: {place}"


@pytest.mark.parametrize("name", [name for name in video_llama.__all__ if name != "__version__"])
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(video_llama, name).__doc__ or name == "conv_templates"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Chatt'"):
        _ = video_llama.Chatt


def test_star_import_of_constants_gives_what_scripts_use() -> None:
    names: dict[str, object] = {}
    exec("from video_llama.constants import *", names)
    assert {"DEFAULT_IMAGE_PATCH_TOKEN", "IGNORE_INDEX", "IMAGE_MEAN"} <= names.keys()


def test_a_registry_builds_by_name_and_refuses_doubles_and_strangers() -> None:
    table: Registry = Registry("colour")
    table.register("red")(dict)
    assert table.build("red", value=1) == {"value": 1}
    assert table.names() == ["red"]
    with pytest.raises(ValueError, match="registered twice"):
        table.register("red")(list)
    with pytest.raises(ConfigError, match=r"unknown colour 'rde'; did you mean 'red'\? Known: red"):
        table.get("rde")


def test_a_registry_imports_its_modules_at_the_first_look_up_only(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(importlib, "import_module", imported.append)
    table: Registry = Registry("colour", ["some.module"])
    assert imported == []
    table.names()
    table.names()
    assert imported == ["some.module"]


def test_a_media_error_survives_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(MediaError("a.mp4", "damaged", "copy it again")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "damaged", "a.mp4: damaged (copy it again)")


def test_the_document_of_the_public_api_names_what_is_public() -> None:
    document = (PACKAGE.parent / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)", document))
    assert set(video_llama.__all__) - {"__version__"} <= named
    assert set(processor.__all__) <= named
    families = {name for name, value in vars(errors).items() if isinstance(value, type) and name in errors.__all__}
    assert families - {"MessagesError"} <= named
