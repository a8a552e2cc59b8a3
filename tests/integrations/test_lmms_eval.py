"""The model of lmms-eval, run by lmms-eval itself on a local task; `scripts/test_engines.sh lmms` installs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: bash scripts/test_engines.sh lmms")

from examples.tiny_world.evaluation.questions import load_questions
from examples.tiny_world.evaluation.report import is_right
from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from video_llama import load_pretrained_model
from video_llama.evaluation.asking import AnsweredQuestion, answer_dialogues, read_media

ROOT = Path(__file__).parents[2]

TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
task: clipworld
test_split: test
output_type: generate_until
doc_to_visual: !function clipworld.doc_to_visual
doc_to_text: !function clipworld.doc_to_text
doc_to_messages: !function clipworld.doc_to_messages
doc_to_target: value
generation_kwargs: {{max_new_tokens: 40, temperature: 0, do_sample: false, image_aspect_ratio: original}}
process_results: !function clipworld.process_results
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
from examples.tiny_world.evaluation.answers import parse_answer

def doc_to_visual(doc):
    return [doc["path"]]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    media = {"type": doc["modality"], "url": doc["path"]}
    return [{"role": "user", "content": [media, {"type": "text", "text": doc["question"]}]}]

def process_results(doc, results):
    return {"right": float(parse_answer(doc["attribute"], results[0]) == doc["value"])}
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> list[AnsweredQuestion]:
    """The first questions of a small world, answered as `scripts/evaluate.py` does."""
    folder = tmp_path_factory.mktemp("world")
    make_corpus(folder, WorldSettings(4, 6, 64, (0, 0, 1)))
    files = load_questions(folder / "test" if (folder / "test").is_dir() else folder)
    model = load_pretrained_model("video-llama-tiny", device="cpu", half=False, verbose=False)
    media = [read_media(model, file.path, file.modality) for file in files]
    return [item for item in answer_dialogues(model, files, media) if item.question.turn == 1]


@pytest.fixture
def tasks(answered: list[AnsweredQuestion], tmp_path: Path) -> Path:
    """A folder with the task of these questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "path": str(item.file.path),
            "modality": item.file.modality,
            "question": item.question.text,
            "attribute": item.question.attribute,
            "value": item.question.value,
        }
        for item in answered
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "clipworld.yaml").write_text(TASK.format(questions=folder / "questions.jsonl"))
    (folder / "clipworld.py").write_text(FUNCTIONS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["chat", "simple"])
def test_lmms_eval_gives_the_figure_of_evaluate(
    answered: list[AnsweredQuestion], tasks: Path, tmp_path: Path, interface: str
) -> None:
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "video_llama", "--tasks", "clipworld"),
        *("--model_args", "pretrained=video-llama-tiny,dtype=float32", "--include_path", str(tasks)),
        *("--batch_size", "4", "--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    if interface == "simple":
        command.append("--force_simple")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT), "LMMS_EVAL_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

    (results,) = (tmp_path / "out").rglob("*results.json")
    figure = json.loads(results.read_text())["results"]["clipworld"]["right,none"]
    assert figure == pytest.approx(sum(map(is_right, answered)) / len(answered))
    assert figure > 0.5
    (samples,) = (tmp_path / "out").rglob("*samples_clipworld.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    texts = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    assert texts == [item.answer for item in answered]


@pytest.mark.slow
def test_likelihoods_decide_a_multiple_choice_and_bad_files_count_as_wrong(
    answered: list[AnsweredQuestion], tmp_path: Path
) -> None:
    from video_llama.integrations.lmms_eval import VideoLlamaSimple

    model = VideoLlamaSimple("video-llama-tiny", batch_size=3, device="cpu", dtype="float32")
    documents: list[dict[str, Any]] = [{"path": str(item.file.path)} for item in answered[:2]]
    documents.append({"path": str(tmp_path / "absent.mp4")})
    model.task_dict = {"choice": {"test": documents}}

    def request(number: int, target: Any) -> Any:
        question = answered[min(number, 1)].question.text
        visuals = lambda document: [document["path"]]  # noqa: E731
        return SimpleNamespace(args=(question, target, visuals, number, "choice", "test"))

    own = [item.answer for item in answered[:2]]
    requests = [request(0, own[0]), request(0, "Nothing at all."), request(1, lambda document: own[1]), request(2, "a")]
    scores = model.loglikelihood(requests)
    assert [greedy for _, greedy in scores] == [True, False, True, False]
    assert scores[0][0] > scores[1][0] > scores[3][0] == float("-inf")
    assert model.num_errors == 1
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
