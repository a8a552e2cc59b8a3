"""vLLM's OpenAI server with the defaults of this package."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from video_llama.checkpoints.hub import resolve_source
from video_llama.checkpoints.original_layout import is_transformers_folder
from video_llama.checkpoints.saved_folder import read_saved_config, read_saved_processor
from video_llama.conversation import conv_templates
from video_llama.errors import CheckpointError
from video_llama.processor.prompt import end_token_ids
from video_llama.utils.extras import require_extra

__all__ = ["resolve_folder", "serve", "server_options"]

logger = logging.getLogger(__name__)

# An address that only this machine reaches, and the most likely token, as everywhere in this package.
_DEFAULTS = {"--host": "127.0.0.1", "--override-generation-config": json.dumps({"temperature": 0})}


def serve(model: str, options: Sequence[str]) -> None:
    """Serve a model until the server is stopped; arguments and errors as of `server_options`.

    Raises:
        VideoLlamaError: vLLM is not installed.
    """
    require_extra("vllm", "video-llama serve")
    _serve(server_options(model, options))


def server_options(model: str, options: Sequence[str]) -> list[str]:
    """Return the arguments of `vllm serve` for a model.

    Args:
        model: as on the command line; requests call it by this name.
        options: what the user wants otherwise.

    Raises:
        CheckpointError: there is no such model, or vLLM cannot load its layout.
    """
    folder = resolve_folder(model)
    _report_stop_strings(folder)
    defaults = {**_DEFAULTS, "--served-model-name": model}
    given = {option.partition("=")[0].replace("_", "-") for option in options}
    chosen = [text for name, value in defaults.items() if name not in given for text in (name, value)]
    return [str(folder), *chosen, *options]


def resolve_folder(model: str) -> Path:
    """Return the local folder of a model that vLLM can load.

    Raises:
        CheckpointError: there is no such model, or it is in another layout.
    """
    folder = resolve_source(model, "a saved folder, a hub id or the name of a packaged model")
    if not is_transformers_folder(folder):
        hint = "scripts/convert_checkpoint.py makes one of the original's files"
        raise CheckpointError(
            f"{folder}: not a folder that save_pretrained has written, and vLLM loads no other; {hint}"
        )
    return folder


def _report_stop_strings(folder: Path) -> None:
    """Say what requests must name as `stop`: vLLM ends answers at special tokens by itself, at text only if asked."""
    processor = read_saved_processor(folder, read_saved_config(folder))
    template = conv_templates[processor.conv_template]
    if not end_token_ids(template, processor.tokenizer):
        logger.warning("answers of this model end with text: requests need stop=%s", template.stop_strings)


def _serve(arguments: Sequence[str]) -> None:
    """Run vLLM's server until it is stopped."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    command = ServeSubcommand()
    parsed = make_arg_parser(FlexibleArgumentParser(prog="video-llama serve MODEL")).parse_args(list(arguments))
    command.validate(parsed)
    command.cmd(parsed)
