"""Calls into other libraries that read what a user gave: each stands where its errors become ours.

The test reads the package's syntax trees. A call counts as guarded inside a `try` with an `except`, or inside a `with`
of one of the translators.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import video_llama

PACKAGE = Path(video_llama.__file__).parent
TRANSLATORS = {"translate_foreign", "translate_errors", "_reported_by_us", "translate_image_errors"}
RISKY = {
    "json": {"load", "loads"},
    "yaml": {"safe_load", "compose"},
    "torch": {"load"},
    "av": {"open"},
    "Image": {"open"},
    "tarfile": {"open"},
    "zipfile": {"ZipFile"},
    "OmegaConf": {"load", "create"},
    "AutoConfig": {"from_pretrained"},
    "AutoTokenizer": {"from_pretrained"},
    "LlamaTokenizer": {"from_pretrained"},
    "VideoLlamaConfig": {"from_pretrained"},
    "VideoLlamaProcessor": {"from_pretrained"},
}
BARE = {"safe_open", "SentencePieceProcessor", "load_file", "ZipFile"}

# What stands elsewhere, and who guards it.
GUARDED_BY_THE_CALLER = {
    "data/examples.py:__getitem__": "reads back what this process packed",
    "captioning/records.py:_check_settings": "reads back what it has just written",
    "compat/settings.py:__init__": "copies a configuration that was read before",
    "config.py:_parse_yaml": "_read_yaml",
    "utils/yaml_repair.py:count_values": "_read_yaml in config.py",
    "processor/processing_video_llama.py:_get_arguments_from_pretrained": "who loads the processor",
    "checkpoints/weight_files.py:_check_archive": "_unpickle",
}


def is_risky(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id in BARE
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return function.attr in RISKY.get(function.value.id, ())
    return False


def is_translator(item: ast.withitem) -> bool:
    call = item.context_expr
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in TRANSLATORS


def unguarded(node: ast.AST, function: str = "", guarded: bool = False) -> Iterator[tuple[str, int]]:
    """Yield the function and the line of each risky call that nothing guards."""
    if isinstance(node, ast.Call) and is_risky(node) and not guarded:
        yield function, node.lineno
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        function, guarded = node.name, False
    for name, value in ast.iter_fields(node):
        inside = guarded
        if isinstance(node, ast.Try) and node.handlers and name == "body":
            inside = True
        if isinstance(node, ast.With) and any(map(is_translator, node.items)):
            inside = True
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from unguarded(child, function, inside)


def in_package() -> list[str]:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        for function, line in unguarded(ast.parse(file.read_text(encoding="utf-8"))):
            if name not in GUARDED_BY_THE_CALLER and f"{name}:{function}" not in GUARDED_BY_THE_CALLER:
                found.append(f"{name}:{line} in {function}")
    return found


def test_no_error_of_another_library_leaves_the_place_where_a_file_is_read() -> None:
    assert in_package() == []


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("def f(p):\n    return json.loads(p.read_text())", 1),
        ("def f(p):\n    try:\n        return json.loads(p)\n    except ValueError:\n        raise Ours from None", 0),
        ("def f(p):\n    try:\n        pass\n    except ValueError:\n        return json.loads(p)", 1),
        ("def f(p):\n    try:\n        return torch.load(p)\n    finally:\n        pass", 1),
        ("def f(p):\n    with translate_foreign(E, p):\n        return safe_open(p)", 0),
        ("def f(p):\n    with translate_foreign(E, p):\n        def g():\n            return safe_open(p)", 1),
        ("def f(p):\n    with open(p) as file:\n        return json.load(file)", 1),
    ],
)
def test_the_test_sees_what_is_not_guarded(source: str, number: int) -> None:
    assert len(list(unguarded(ast.parse(source)))) == number
