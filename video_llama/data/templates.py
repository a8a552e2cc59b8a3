"""The one conversation template of a run: chosen from its configuration, and checked before anything trains."""

from __future__ import annotations

import logging
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from video_llama.checkpoints.language_model import family_of, named_template
from video_llama.config import Config
from video_llama.conversation import Conversation, SeparatorStyle, conv_templates
from video_llama.data.tokenization import dialogue_template
from video_llama.errors import ConfigError
from video_llama.processor.processing_video_llama import VideoLlamaProcessor
from video_llama.processor.prompt import end_token_ids
from video_llama.prompt_parts import render_parts

__all__ = ["bind_template", "check_caption_end", "choose_template"]

logger = logging.getLogger(__name__)


def choose_template(config: Config, processor: VideoLlamaProcessor, warns: bool = True) -> str:
    """Return the template of a run's dialogues, by its name in `conv_templates`.

    `model.model_type` and `datasets.*.model_type` name it; without any of them, it belongs to the language model.

    Args:
        config, processor: of the run.
        warns: log what is unusual, which only one of several calls should do.

    Raises:
        ConfigError: two keys contradict each other, or the template cannot be written or teaches no end token.
    """
    named = _named_templates(config)
    template = named or named_template(family_of(processor.conv_template), learnt=True) or processor.conv_template
    _check_ends(template, processor.tokenizer, is_named=named is not None, warns=warns)
    if warns and conv_templates[template].sep_style is SeparatorStyle.CHAT_TEMPLATE:
        _check_turns(conv_templates[template], processor.tokenizer)
    return template


def bind_template(config: Config, processor: VideoLlamaProcessor, template: str) -> Config:
    """Bind a run's processor and configuration to the template that it learns, so that its model is asked in it.

    Args:
        config, processor: of the run; the processor is changed.
        template: as `TextSettings.template`.

    Returns:
        the configuration with the template's name as `model.model_type`.
    """
    processor.conv_template = named_template(template, learnt=True) or template
    return replace(config, model=replace(config.model, model_type=processor.conv_template))


def _named_templates(config: Config) -> str | None:
    """Return the template that the configuration names; None if it leaves the choice to the language model."""
    keys = {f"datasets.{name}.model_type": section.model_type for name, section in config.datasets.items()}
    # The key of a dataset is the narrower one: it says which template of the family.
    keys["model.model_type"] = config.model.model_type
    named: dict[str, str] = {}
    for key, value in keys.items():
        if value is None:
            continue
        if named_template(value, learnt=True) is None:
            # It raises the error that lists the known names.
            dialogue_template(value)
        named[key] = str(named_template(value, learnt=True))
    if not named:
        return None
    first, template = next(iter(named.items()))
    for key, other in named.items():
        # The model's key names a family; two datasets in two templates of one family still contradict each other.
        is_same = family_of(other) == family_of(template) if key == "model.model_type" else other == template
        if not is_same:
            raise ConfigError(
                f"{first} is {keys[first]!r}, but {key} is {keys[key]!r}: a run has one conversation template; leave "
                "one of the keys out"
            )
    return template


def _check_ends(template: str, tokenizer: PreTrainedTokenizerBase, is_named: bool, warns: bool) -> None:
    """Check that labels teach how an answer ends.

    Raises:
        ConfigError: the template cannot be written with this tokenizer, an answer in it would never end, or it is a
            guess that does not teach the end token.
    """
    learnt, stops = end_token_ids(conv_templates[template], tokenizer), conv_templates[template].stop_strings
    if tokenizer.eos_token_id in learnt:
        return
    if not learnt and not stops:
        raise ConfigError(
            "the tokenizer's chat template writes no special token behind an answer, so no answer would end; set "
            f"model.model_type to another template ({', '.join(conv_templates)})"
        )
    # Vicuna's dialogues are meant so: the text ends an answer, and LLaMA's EOS never comes.
    if stops and tokenizer.eos_token == "</s>":
        return
    end = " or ".join(map(repr, stops or tokenizer.convert_ids_to_tokens(learnt)))
    what = f"no label teaches the tokenizer's end token {tokenizer.eos_token!r}: answers in the template {template!r}"
    if stops and not is_named:
        raise ConfigError(
            f"{what} would end with {end}. The tokenizer has no chat template, so it is not known how this language "
            f"model writes conversations: set model.model_type to one of {', '.join(conv_templates)}"
        )
    if warns:
        logger.warning("%s end with %s", what, end)


def _check_turns(template: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of a template that writes an earlier turn otherwise than it asks it."""
    user, assistant = template.roles
    asked, longer = template.copy(), template.copy()
    asked.messages = [[user, "?"], [assistant, None]]
    longer.messages = [[user, "?"], [assistant, "!"], [user, "?"], [assistant, "!"]]
    prompt = render_parts(asked.get_parts(tokenizer))
    if not render_parts(longer.get_parts(tokenizer)).startswith(prompt):
        logger.warning(
            "the tokenizer's chat template writes the first turn of a longer dialogue otherwise than it asks it; "
            "split dialogues into samples of one turn to learn them as they are asked"
        )


def check_caption_end(end_sym: str, processor: VideoLlamaProcessor) -> None:
    """Warn of an `end_sym` that neither is the end token nor ends answers in the processor's template."""
    tokenizer, stops = processor.tokenizer, conv_templates[processor.conv_template].stop_strings
    if tokenizer.eos_token is None or tokenizer.eos_token in end_sym or any(stop in end_sym for stop in stops):
        return
    logger.warning(
        "captions end with %r (model.end_sym), so no label teaches the end token; end_sym: %r would",
        end_sym,
        tokenizer.eos_token,
    )
