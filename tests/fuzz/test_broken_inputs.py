"""The short form of scripts/fuzz.sh: every format with every damage once, and broken checkpoints and annotations."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.bases import make_bases
from tests.fuzz.campaign import Table, Worker, run_cases
from tests.fuzz.cases import Case, mutate, write_case, write_media
from tests.fuzz.damages import DAMAGES
from video_llama.config import load_config
from video_llama.data.datasets import build_examples
from video_llama.errors import VideoLlamaError
from video_llama.schema import BuildInfo, DatasetConfig

pytestmark = pytest.mark.slow

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
_KEYS = st.sampled_from(["messages", "conversations", "video", "image", "query", "response", "id", "text", "x"])
_quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def every_damage(folder: Path, bases: Sequence[Path]) -> Iterator[tuple[Path, Case]]:
    for base in bases:
        for damage in DAMAGES:
            place = folder / f"{base.name}-{damage}"
            place.mkdir()
            yield place, write_media(random.Random(place.name), place, base, damage)


def some_cases(folder: Path, kind: str, number: int) -> Iterator[tuple[Path, Case]]:
    for index in range(number):
        place = folder / f"{kind}{index}"
        yield place, write_case(kind, f"short/{index}", place, [])


def check_table(table: Table) -> None:
    assert not table.failures, "\n".join(f"{case}: {outcome}: {detail}" for case, outcome, detail in table.failures[:5])
    outcomes = {key[3] for key in table.counts}
    # Nothing can be said of a generator whose files are all read, or all refused.
    assert outcomes == {"answer", "refusal"}


def test_no_media_file_crashes_hangs_or_leaks(tmp_path: Path) -> None:
    bases = make_bases(tmp_path / "bases")
    assert len(bases) >= 21
    table = run_cases(every_damage(tmp_path, bases))
    check_table(table)
    assert sum(table.counts.values()) == len(bases) * len(DAMAGES) * 6


def test_no_checkpoint_annotation_or_configuration_does(tmp_path: Path) -> None:
    cases = [(kind, number) for kind, number in (("annotations", 80), ("config", 40), ("checkpoint", 30))]
    check_table(run_cases(case for kind, number in cases for case in some_cases(tmp_path, kind, number)))


def test_the_campaign_sees_crashes_hangs_and_foreign_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.campaign.SECONDS", 10.0)
    worker = Worker()
    try:
        outcomes = []
        for damage in ("raise", "wait", "die", "grow", "whole"):
            outcomes.append([outcome for outcome, _ in worker.read(Case("self-test", "", damage, str(tmp_path)))])
        assert outcomes == [["foreign"], ["hang"], ["crash"], ["answer", "memory"], ["answer"]]
    finally:
        worker.close()


def test_the_same_seed_breaks_in_the_same_way(tmp_path: Path) -> None:
    for kind in ("annotations", "config", "checkpoint"):
        contents = []
        for attempt in ("a", "b"):
            case = write_case(kind, "7", tmp_path / attempt / kind, [])
            files = [path for path in (tmp_path / attempt / kind).iterdir() if not path.is_symlink()]
            contents.append([case.damage, *(path.read_bytes() for path in sorted(files))])
        assert contents[0] == contents[1]
    assert mutate({"a": [1, 2]}, random.Random(3)) == mutate({"a": [1, 2]}, random.Random(3))


@_quick
@given(rows=st.lists(st.dictionaries(_KEYS, _JSON, max_size=4), max_size=3))
def test_rows_of_any_values_are_read_or_refused(rows: list[dict[str, object]], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("messages", "table"):
        config = DatasetConfig(data_type="video", build_info=BuildInfo(anno_dir=str(path)))
        with contextlib.suppress(VideoLlamaError):
            assert len(build_examples(name, config)) <= len(rows)


_SECTIONS = st.sampled_from(["model", "datasets", "run", "features", "lora", "x"])
_NAMES = st.sampled_from(
    ["arch", "llama_model", "ckpt", "webvid", "init_lr", "max_epoch", "seed", "output_dir", "dir", "x"]
)


@_quick
@given(content=st.dictionaries(_SECTIONS, _JSON | st.dictionaries(_NAMES, _JSON, max_size=3), max_size=3))
def test_configurations_of_any_values_are_read_or_refused(content: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    message = str(path)
    try:
        load_config(path)
    except VideoLlamaError as error:
        message = str(error)
    assert str(path) in message
