"""Captioning with vLLM: windows are decoded as elsewhere; vLLM runs the branches and the language model on them.

vLLM answers continuously: an answer that ends gives its place to the next window. So this hands windows on as they are
read and takes captions as they end; both meet in an event loop of vLLM's, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from video_llama.checkpoints.saved_folder import read_saved_config, read_saved_processor
from video_llama.conversation import conv_templates
from video_llama.errors import ConfigError, VideoLlamaError
from video_llama.inference.captioning import WindowCaption, begin_caption
from video_llama.inference.generation import GenerationOptions, cut_at_stop
from video_llama.inference.workers import WindowRead
from video_llama.integrations.vllm import OWNER
from video_llama.integrations.vllm.options import check_options, sampling_arguments
from video_llama.integrations.vllm.prompts import window_prompt
from video_llama.integrations.vllm.serve import resolve_folder
from video_llama.processor.prompt import end_token_ids
from video_llama.utils.devices import resolve_dtype
from video_llama.utils.extras import require_extra

__all__ = ["VllmCaptioner"]

# As many as the package's own captioner takes on the largest GPUs.
_CLIPS_AT_ONCE = 128
# So many more wait in vLLM, so that a place that becomes free is taken at once.
_WAITING = 8
_SECONDS_TO_CANCEL = 10.0


class VllmCaptioner:
    """Answers one question about each of many windows, as `BatchCaptioner` does.

    It is a context manager: `with` starts vLLM, and its end ends vLLM's processes.

    Args:
        model: a saved folder, a hub id of one, or a packaged model.
        prompt, options, batch_size: as for `BatchCaptioner`; by default 128 are answered together.
        audio: use the audio branch, if there is one.
        dtype: precision by name; "auto" on a CPU is what the package chooses there, elsewhere what vLLM does.
        engine_options: further arguments of `vllm.LLM`.

    Attributes:
        processor: of the model.
        device_type: what vLLM runs on.

    Raises:
        ConfigError: vLLM is not installed, or cannot do what an option says.
        CheckpointError: there is no such model, or vLLM cannot load its layout.
    """

    def __init__(
        self,
        model: str,
        prompt: str,
        options: GenerationOptions,
        batch_size: int | None = None,
        *,
        audio: bool = True,
        dtype: str = "auto",
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        require_extra("vllm", "--engine vllm")
        check_options(options)
        folder = resolve_folder(model)
        config = read_saved_config(folder)
        self.processor = read_saved_processor(folder, config, use_audio=config.use_audio and audio)
        self.clips_at_once = batch_size or _CLIPS_AT_ONCE
        self._question = prompt
        template, tokenizer = conv_templates[self.processor.conv_template], self.processor.tokenizer
        # The end-of-sequence token ends the answer anyway.
        self._stop_strings = [stop for stop in template.stop_strings if stop != tokenizer.eos_token]
        self._sampling = sampling_arguments(options, self._stop_strings, end_token_ids(template, tokenizer))
        width = max(config.vision_config.hidden_size, config.get_text_config().hidden_size)
        self._arguments = {**self._default_arguments(folder, dtype, width), **(engine_options or {})}
        self._numbers = count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="video-llama-vllm", daemon=True)

    def _default_arguments(self, folder: Path, dtype: str, width: int) -> dict[str, Any]:
        """Return what vLLM is started with, but for what the user adds."""
        from vllm.platforms import current_platform

        self.device_type: str = current_platform.device_type
        if self.device_type == "cpu":
            dtype = str(resolve_dtype(dtype, "cpu", width=width)).removeprefix("torch.")
        return {
            "model": str(folder),
            "dtype": dtype,
            "max_num_seqs": self.clips_at_once,
            # An audio branch that is not used is not loaded.
            "limit_mm_per_prompt": {"video": 1, "image": 0, "audio": int(self.processor.use_audio)},
            # Every clip comes once.
            "mm_processor_cache_gb": 0,
        }

    def __enter__(self) -> VllmCaptioner:
        """Start vLLM.

        Raises:
            ConfigError: it does not start.
        """
        self._thread.start()
        # Its processes inherit this.
        os.environ[OWNER] = str(os.getpid())
        try:
            self._engine = self._in_loop(self._start()).result()
        except BaseException as error:
            self._end_loop()
            if isinstance(error, Exception):
                raise ConfigError(f"vLLM does not start: {error} (its messages are above)") from error
            raise
        finally:
            os.environ.pop(OWNER, None)
        return self

    def __exit__(self, *error: object) -> None:
        self._in_loop(_cancel_others()).result()
        self._engine.shutdown()
        # It looks after itself once more when it is freed, which must be before Python ends.
        del self._engine
        self._end_loop()

    def run(self, reads: Iterable[WindowRead]) -> Iterator[WindowCaption]:
        """Caption windows as they come; captions and errors come out in any order.

        Raises:
            VideoLlamaError: vLLM has stopped.
        """
        begun: dict[Future[list[int]], WindowCaption] = {}
        for read in reads:
            if isinstance(read.window, VideoLlamaError):
                yield begin_caption(read, read.window)
                continue
            prompt = window_prompt(self.processor, read.window, self._question)
            begun[self._in_loop(self._answer(prompt))] = begin_caption(read)
            yield from self._take(begun, 0)
            while len(begun) >= self.clips_at_once + _WAITING:
                yield from self._take(begun)
        while begun:
            yield from self._take(begun)

    def _take(self, begun: dict[Future[list[int]], WindowCaption], seconds: float | None = None) -> list[WindowCaption]:
        """Return the captions that have ended; wait for one, by default for ever."""
        done, _ = wait(begun, seconds, FIRST_COMPLETED)
        return [self._finish(begun.pop(answer), answer) for answer in done]

    def _finish(self, caption: WindowCaption, answer: Future[list[int]]) -> WindowCaption:
        from vllm.exceptions import VLLMClientError

        try:
            text = self.processor.tokenizer.decode(answer.result(), skip_special_tokens=True)
        except VLLMClientError as error:
            # Of this clip alone, such as a prompt that is too long.
            return replace(caption, error=VideoLlamaError(str(error)))
        except Exception as error:
            # vLLM's own error may say nothing but that there was one.
            reason = error.__cause__ or error
            raise VideoLlamaError(f"vLLM has stopped: {reason!r} (its messages are above)") from error
        return replace(caption, text=cut_at_stop(text, self._stop_strings))

    # In the thread of the event loop.

    async def _start(self) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments))

    async def _answer(self, prompt: dict[str, Any]) -> list[int]:
        """Return the ids of the answer to a prompt."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(**self._sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        [rendered] = await self._engine.renderer.render_cmpl_async([prompt])
        ids: list[int] = []
        async for output in self._engine.generate(rendered, parameters, str(next(self._numbers))):
            ids = list(output.outputs[0].token_ids)
        return ids

    def _in_loop(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    """End what still runs in this loop: answers that nobody takes any more."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        # Where vLLM has died, an answer may wait for it for ever.
        await asyncio.wait(others, timeout=_SECONDS_TO_CANCEL)
