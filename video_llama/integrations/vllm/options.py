"""Options of captioning in vLLM's words; what vLLM cannot do is refused. Needs no vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from video_llama.errors import ConfigError
from video_llama.inference.generation import GenerationOptions

__all__ = ["check_options", "parse_engine_options", "sampling_arguments"]

# Where `GenerationOptions` names no number: the default of transformers.
_TOP_K = 50
# Set from the options of the command.
_OWN = ("model", "tokenizer", "limit_mm_per_prompt", "mm_processor_cache_gb", "max_num_seqs", "dtype")


def check_options(options: GenerationOptions) -> None:
    """Check that vLLM can answer as the options say.

    Raises:
        ConfigError: something that vLLM does not do, or does in another way.
    """
    refused = {
        "--num-beams": (options.num_beams > 1, "it has no beam search"),
        "--repetition-penalty": (options.repetition_penalty != 1, "its penalty counts the prompt, not only the answer"),
        "--static-cache and --no-static-cache": (options.static_cache is not None, "its cache is paged"),
        "--compile": (options.compile, "it compiles by itself; see enforce_eager for --engine-options"),
    }
    for name, (is_given, reason) in refused.items():
        if is_given:
            raise ConfigError(f"--engine vllm cannot take {name}: {reason}. Leave it out, or the engine")


def sampling_arguments(
    options: GenerationOptions, stop_strings: Sequence[str], end_ids: Sequence[int]
) -> dict[str, Any]:
    """Return the arguments of vLLM's `SamplingParams`.

    Args:
        options: how answers are generated, as `check_options` allows it.
        stop_strings: texts that end an answer, without those that `end_ids` stand for.
        end_ids: tokens that end an answer.
    """
    arguments: dict[str, Any] = {
        "max_tokens": options.max_new_tokens,
        "min_tokens": min(options.min_new_tokens, options.max_new_tokens),
        "temperature": options.temperature,
        "stop_token_ids": list(end_ids),
        "stop": list(stop_strings),
        # Texts are made of the ids here. vLLM needs its own only to find stop strings.
        "detokenize": bool(stop_strings),
    }
    if options.temperature > 0:
        arguments["top_p"] = options.top_p
        arguments["top_k"] = options.top_k
        if options.top_k is None:
            arguments["top_k"] = _TOP_K
    return arguments


def parse_engine_options(text: str | None) -> dict[str, Any]:
    """Return the JSON of `--engine-options`: arguments of `vllm.LLM`.

    Raises:
        ConfigError: no JSON object, or an argument that is an option of the command itself.
    """
    if text is None:
        return {}
    example = "--engine-options '{\"tensor_parallel_size\": 2}'"
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--engine-options is not JSON ({error}); it looks like this: {example}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"--engine-options must be a JSON object, like this: {example}")
    for name in _OWN:
        if name in options:
            raise ConfigError(f"--engine-options cannot set {name}: the options of the command do")
    return options
