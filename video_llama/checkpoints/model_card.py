"""Write the model card of a saved model: what it is, and the data, stages, figures and licences of its run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from video_llama.checkpoints.original_layout import IMAGEBIND_FILE, QFORMER_FILE, VISION_FILE
from video_llama.checkpoints.trained_run import CONFIG_FILE, run_checkpoint
from video_llama.config import Config, ModelConfig, load_config
from video_llama.model.configuration import VideoLlamaConfig
from video_llama.model.parts import adapted_parts, trained_parts
from video_llama.schema import FREEZING_KEYS
from video_llama.utils.files import read_json_object, write_whole
from video_llama.utils.jsonl import read_jsonl

__all__ = ["write_model_card"]

CARD = "README.md"
_LOG, _RECORD = "log.jsonl", "checkpoints.json"

# The published files by their names. They keep their terms in whatever is made of them.
_LICENCES = {
    VISION_FILE: "MIT (EVA)",
    QFORMER_FILE: "BSD-3-Clause (LAVIS)",
    IMAGEBIND_FILE: "CC BY-NC-SA 4.0: non-commercial",
}
_USE = """```python
from video_llama import Chat, load_pretrained_model

chat = Chat(load_pretrained_model("{name}"))
chat.upload_video("clip.mp4")
chat.ask("What happens in the video?")
print(chat.answer())
```"""


def write_model_card(folder: Path, config: VideoLlamaConfig, origin: str | os.PathLike[str] | None, name: str) -> None:
    """Write `README.md`.

    Args:
        folder: an existing folder.
        config: of the model.
        origin: what the model was loaded from. Of a training run (its folder, or a checkpoint in it) the card says
            everything; the card of another folder is copied, where there is one.
        name: of the model: a hub id, or the folder's name.
    """
    stage, card = _stage(origin), Path(origin or "").expanduser() / CARD
    if stage is not None:
        text = _card_of_run(*stage, config, name)
    elif origin is not None and card.is_file():
        text = card.read_text(encoding="utf-8")
    else:
        text = _join([*_introduction(config, name), "## Licences", _OTHER_LICENCES], ModelCardData(**_metadata()))
    write_whole(folder / CARD, lambda path: path.write_text(text, encoding="utf-8"))


_OTHER_LICENCES = "The weights that it was made from have licences of their own, which hold for this model, too."


def _metadata() -> dict[str, Any]:
    tags = ["video-llama", "video", "audio"]
    return {"license": "other", "pipeline_tag": "video-text-to-text", "library_name": "video_llama", "tags": tags}


def _join(parts: Sequence[str], data: ModelCardData) -> str:
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", *parts]) + "\n"


def _introduction(config: VideoLlamaConfig, name: str) -> list[str]:
    """Return the title, what the model is, and how it is used."""
    media = "frames and audio" if config.use_audio else "frames"
    text = config.get_text_config()
    what = (
        f"A Video-LLaMA (arXiv 2306.02858), which answers questions about the {media} of videos. Its language model "
        f"is a `{text.model_type}` of {text.num_hidden_layers} layers and width {text.hidden_size}."
    )
    return [f"# {Path(name).name}", what, _USE.format(name=name)]


def _stage(source: str | os.PathLike[str] | None) -> tuple[Path, Path] | None:
    """Return the folder of a training run and the checkpoint that a path stands for; None if it is no run's."""
    path = Path(source or "").expanduser()
    if source is None or not path.exists():
        return None
    run, checkpoint = path, run_checkpoint(path)
    if path.is_file() and (path.parent / CONFIG_FILE).is_file() and (path.parent / _LOG).is_file():
        run, checkpoint = path.parent, path
    return None if checkpoint is None else (run, checkpoint)


def _card_of_run(run: Path, checkpoint: Path, config: VideoLlamaConfig, name: str) -> str:
    # The last stage is this run; its checkpoints may come from runs before it.
    stages = [*_earlier_stages(run, {run.resolve()}), (run, checkpoint)]
    settings = load_config(run / CONFIG_FILE)
    parts = [*_introduction(config, name), "## Training", _stage_table(stages), _data_table(stages)]
    parts += ["## Figures", _figures(run, checkpoint), "## Licences", _licence_table(settings.model, config)]
    data = _metadata() | {"base_model": _hub_id(settings.model.llama_model)}
    return _join(parts, ModelCardData(**data))


def _earlier_stages(run: Path, seen: set[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield the runs whose checkpoints a run began with, first ones first, with the file that was taken."""
    model = load_config(run / CONFIG_FILE).model
    for named in (model.ckpt, model.ckpt_2):
        stage = _stage(named)
        if stage is not None and stage[0].resolve() not in seen:
            seen.add(stage[0].resolve())
            yield from _earlier_stages(stage[0], seen)
            yield stage


def _table(header: str, rows: Sequence[Sequence[Any]]) -> str:
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _stage_table(stages: Sequence[tuple[Path, Path]]) -> str:
    rows = []
    for run, checkpoint in stages:
        config = load_config(run / CONFIG_FILE)
        iterations = _record(run, checkpoint).get("iteration") or _last(run, "train").get("iteration", "?")
        batch = config.run.batch_size_train * config.run.accum_grad_iters
        rows.append([run.name, _trained(config), iterations, batch, config.run.init_lr])
    return _table("stage | trained | iterations | samples per step and process | learning rate", rows)


def _trained(config: Config) -> str:
    whole, adapted = trained_parts(config.model), adapted_parts(config.lora, config.model)
    names = {part: part.replace("_", " ").replace("qformer", "Q-Former") for part in FREEZING_KEYS}
    said = [name for part, name in names.items() if part in whole]
    said += [f"adapters of the {name}" for part, name in names.items() if part in adapted]
    return ", ".join(said)


def _data_table(stages: Sequence[tuple[Path, Path]]) -> str:
    # No paths: they are of the machine that trained.
    rows = []
    for run, _ in stages:
        config: Config = load_config(run / CONFIG_FILE)
        for name, section in config.datasets.items():
            share = "by size" if section.sample_ratio is None else section.sample_ratio
            rows.append([run.name, f"`{name}`", section.data_type, share])
    return _table("stage | data | kind | share of the batches", rows)


def _record(run: Path, checkpoint: Path) -> dict[str, Any]:
    """Return what `checkpoints.json` says of a checkpoint; nothing in the folders of older versions."""
    if not (run / _RECORD).is_file():
        return {}
    entries = read_json_object(run / _RECORD).values()
    return next((entry for entry in entries if entry.get("file") == checkpoint.name), {})


def _last(run: Path, event: str, until: int | None = None, **wanted: Any) -> dict[str, Any]:
    """Return the last line of a kind in a run's log."""
    found: dict[str, Any] = {}
    for line in read_jsonl(run / _LOG, None):
        is_wanted = line.get("event") == event and all(line.get(key) == value for key, value in wanted.items())
        if is_wanted and (until is None or line["iteration"] <= until):
            found = line
    return found


def _figures(run: Path, checkpoint: Path) -> str:
    """Return the losses at the checkpoint: of training and, where there is validation, of each set."""
    until = _record(run, checkpoint).get("iteration")
    training = _last(run, "train", until)
    rows = [["training, mean since the line before", training.get("iteration", "?"), _number(training.get("loss")), ""]]
    names = {line["dataset"] for line in read_jsonl(run / _LOG, None) if line.get("event") == "valid"}
    lines = [(f"validation: `{name}`", _last(run, "valid", until, dataset=name)) for name in sorted(names)]
    lines.append(("validation: all", _last(run, "validation", until)))
    for label, line in lines:
        if line:
            rows.append([label, line["iteration"], _number(line.get("loss")), _number(line.get("token_accuracy"))])
    return _table("figures of | iteration | loss | token accuracy", rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _licence_table(model: ModelConfig, config: VideoLlamaConfig) -> str:
    name = Path(model.llama_model or "").name
    rows = [["language model", f"`{name}`", _language_model_licence(model.llama_model)]]
    files = {"frame encoder": model.vit_ckpt, "Q-Former": model.q_former_model}
    if config.use_audio:
        # A folder stands for the file of this name in it.
        files["audio encoder"] = IMAGEBIND_FILE
    for part, source in files.items():
        file = Path(source or "").name
        rows.append([part, f"`{file}`", _LICENCES.get(file, "that of its source")])
    return _table("part | from | licence", rows) + f"\n\n{_OTHER_LICENCES}"


def _language_model_licence(source: str | None) -> str:
    card = Path(source or "").expanduser() / CARD
    if source and card.is_file():
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.license
        if licence:
            return str(licence)
    return "that of its source"


def _hub_id(source: str | None) -> str | None:
    """Return a hub id as it is; None for a path."""
    if source is None or Path(source).expanduser().exists() or source.count("/") != 1 or source[0] in "./~":
        return None
    return source
