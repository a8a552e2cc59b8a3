"""The renderer: chat requests in the template of the weights, and the files they name, read by the package's reader."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaIO
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY
from vllm.renderers.hf import HfRenderer
from vllm.utils.async_utils import make_async

from video_llama.errors import MediaError, MessagesError, VideoLlamaError
from video_llama.integrations.vllm.inputs import VideoLlamaInfo
from video_llama.integrations.vllm.prompts import MediaPart, make_prompt, request_keywords, to_messages
from video_llama.media.sources import is_address

__all__ = ["MAX_DOWNLOAD_BYTES", "VideoLlamaRenderer"]

MAX_DOWNLOAD_BYTES = 2**30
"""Longer files are not downloaded."""


class VideoLlamaRenderer(HfRenderer):
    """Turns chat messages into prompts; text that somebody typed stays text in them."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        # Decoding takes long: other requests are answered meanwhile.
        self._prompt_async = make_async(self._prompt, executor=self._executor)

    def render_messages(self, messages: Any, params: Any) -> tuple[list[Any], Any]:
        """Return the messages as text, and their prompt.

        Raises:
            VLLMValidationError: messages that make no prompt, or a file that cannot be used.
        """
        with _as_client_errors():
            converted, media = to_messages(messages)
            connector = self._connector()
            for part in media:
                self._check_address(part)
                part.item[part.kind] = connector.load_from_url(part.address, _WholeFile(part.name), **_timeout(part))
        return _conversation(converted), self._prompt(converted, params)

    async def render_messages_async(self, messages: Any, params: Any) -> tuple[list[Any], Any]:
        """As `render_messages`; files are fetched side by side, and decoded in a thread."""
        with _as_client_errors():
            converted, media = to_messages(messages)
            connector = self._connector()

            async def load(part: MediaPart) -> None:
                self._check_address(part)
                file = _WholeFile(part.name)
                part.item[part.kind] = await connector.load_from_url_async(part.address, file, **_timeout(part))

            await asyncio.gather(*map(load, media))
        return _conversation(converted), await self._prompt_async(converted, params)

    def _prompt(self, messages: Sequence[Mapping[str, Any]], params: Any) -> dict[str, Any]:
        """Return the prompt of messages whose files are loaded."""
        template = params.chat_template_kwargs
        info: Any = self.get_mm_processor().info
        assert isinstance(info, VideoLlamaInfo)
        # What the server was started with, then what the request says.
        given = {**(info.ctx.get_mm_config().mm_processor_kwargs or {}), **(params.mm_processor_kwargs or {})}
        with _as_client_errors():
            if template.get("tools") or template.get("documents"):
                raise MessagesError("the model takes no tools and no documents")
            return make_prompt(
                info.get_hf_processor(),
                messages,
                chat_template=params.chat_template,
                add_generation_prompt=template.get("add_generation_prompt", True),
                continue_final_message=template.get("continue_final_message", False),
                **request_keywords(given, info.max_num_frames, info.allowed_mm_limits.get("audio", 0) > 0),
            )

    def _connector(self) -> Any:
        """Return vLLM's own way to files, with the limits that the server was started with."""
        config = self.model_config
        return MEDIA_CONNECTOR_REGISTRY.load(
            envs.VLLM_MEDIA_CONNECTOR,
            media_io_kwargs=None,
            allowed_local_media_path=config.allowed_local_media_path,
            allowed_media_domains=config.allowed_media_domains,
        )

    def _check_address(self, part: MediaPart) -> None:
        """Check that an address of the web may be asked: without a list of domains vLLM would ask any of its network.

        Raises:
            MediaError: it may not.
        """
        if is_address(part.address) and not self.model_config.allowed_media_domains:
            hint = "send the file itself as a data: address, or start the server with --allowed-media-domains"
            raise MediaError(part.name, "an address of the web, and none is allowed", hint)


class _WholeFile(MediaIO[dict[str, Any]]):
    """Keeps a file undecoded: the package's reader reads all media, the same way as elsewhere.

    Args:
        name: for error messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def get_max_bytes(self) -> int:
        return MAX_DOWNLOAD_BYTES

    def load_bytes(self, data: bytes) -> dict[str, Any]:
        return {"bytes": data, "path": self.name}

    def load_base64(self, media_type: str, data: str) -> dict[str, Any]:
        try:
            return self.load_bytes(base64.b64decode(data, validate=True))
        except ValueError as error:
            raise MediaError(self.name, f"damaged base64: {error}", "encode it again") from error

    def load_file(self, filepath: Path) -> dict[str, Any]:
        # vLLM has checked that it lies in the folder that may be read.
        return {"path": str(filepath)}


def _timeout(part: MediaPart) -> dict[str, Any]:
    """Return how long a download may take: vLLM has a setting for each kind."""
    return {"fetch_timeout": getattr(envs, f"VLLM_{part.kind.upper()}_FETCH_TIMEOUT")}


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the text of messages, which vLLM repeats if a request asks for it."""
    conversation = []
    for message in messages:
        content = message["content"] or ""
        if not isinstance(content, str):
            content = " ".join(item["text"] for item in content if item["type"] == "text")
        conversation.append({"role": message["role"], "content": content})
    return conversation


@contextmanager
def _as_client_errors() -> Iterator[None]:
    """Raise what a request has done wrong as vLLM's error for it: the client gets status 400 and our message."""
    try:
        yield
    except MediaError as error:
        # The folders of the server are not the client's business.
        shown = MediaError(os.path.basename(error.path), error.reason, error.hint)
        raise VLLMValidationError(str(shown), parameter="messages") from error
    # The others are how vLLM's connector refuses an address.
    except (VideoLlamaError, ValueError, RuntimeError) as error:
        raise VLLMValidationError(str(error), parameter="messages") from error
