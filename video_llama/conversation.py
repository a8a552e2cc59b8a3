"""Conversations: messages by role, and the templates that turn them into a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from video_llama.errors import ConfigError
from video_llama.prompt_parts import Content, Placeholder, PromptPart, Text, render_parts

__all__ = ["Conversation", "SeparatorStyle", "conv_templates"]


class SeparatorStyle(Enum):
    """How turns are written and separated."""

    SINGLE = auto()
    """`system###Human: question###Assistant: answer###`"""
    LINES = auto()
    """As SINGLE with every message on a line of its own; for instruction-tuning Vicuna models."""
    LLAMA_2 = auto()
    """`[INST] <<SYS>>…<</SYS>> question [/INST] answer </s><s>[INST] …`"""
    CHAT_TEMPLATE = auto()
    """The chat template that comes with the language model's tokenizer."""


@dataclass
class Conversation:
    """Messages and the template they are written in.

    Args:
        system: the instruction in front.
        roles: names of the user and of the assistant.
        messages: `[role, content]` lists, so that an answer can be put in: `conv.messages[-1][-1] = answer`.
            Text is always plain text; media positions are `Placeholder` items of a content list.
        offset: number of example messages in front; kept for users of the original, unused here.
        sep_style: how turns are separated.
        sep: what separates turns; in the LLaMA-2 style, what begins a later turn.
        sep2: what ends an answer in the LLaMA-2 style.

    Example:
        >>> conv = conv_templates["v1"].copy()
        >>> conv.append_message(conv.roles[0], "What is it?")
        >>> conv.up_to_answer().get_prompt()
        '###Human: What is it?###Assistant:'
    """

    system: str
    roles: Sequence[str]
    messages: list[list[Any]] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None

    def copy(self) -> Conversation:
        """Return an independent conversation with the same messages."""
        return replace(self, messages=deepcopy(self.messages))

    def append_message(self, role: str, content: Content) -> None:
        """Add a message; content None stands for an answer to come.

        Raises:
            ValueError: the conversation has no such role.
        """
        self._role_index(role)
        self.messages.append([role, content])

    def ask(self, text: str) -> None:
        """Add a question; after media in an open user message it joins that message with a space."""
        # Media that were added before any question are a user message. The question completes it, so both are one turn.
        if self.messages and self.messages[-1][0] == self.roles[0] and _has_placeholder(self.messages[-1][1]):
            self.messages[-1][1] = [*self.messages[-1][1], " ", text]
        else:
            self.append_message(self.roles[0], text)

    def introduce(self, introduction: Sequence[str | Placeholder]) -> None:
        """Put media in front of the first question.

        Args:
            introduction: what `media_prefix` returns. Without a question it becomes a user message, which the
                next `ask` completes.
        """
        for message in self.messages:
            if message[0] == self.roles[0]:
                message[1] = [*introduction, *_items(message[1])]
                return
        # There is no question yet. Drop the space after the media, since `ask` adds one.
        content = list(introduction)
        if content and content[-1] == " ":
            content.pop()
        self.messages.insert(0, [self.roles[0], content])

    def drop_oldest_turn(self) -> bool:
        """Remove the oldest question and its answer; its media move to the next question.

        Returns:
            whether a turn was removed: the last question always stays.
        """
        questions = [index for index, (role, _) in enumerate(self.messages) if role == self.roles[0]]
        if len(questions) < 2:
            return False
        oldest, following = questions[:2]
        media = _items(self.messages[oldest][1])
        # The question behind the media goes, the media stay.
        if _has_placeholder(media):
            if isinstance(media[-1], str):
                media.pop()
            self.messages[following][1] = [*media, *_items(self.messages[following][1])]
        del self.messages[oldest:following]
        return True

    def has_media(self) -> bool:
        """Return whether any message holds a placeholder."""
        return any(_has_placeholder(content) for _, content in self.messages)

    def up_to_answer(self) -> Conversation:
        """Return a copy that ends where the next answer begins, without the text of a last assistant message."""
        conversation = self.copy()
        if conversation.messages and conversation.messages[-1][0] == self.roles[1]:
            conversation.messages.pop()
        conversation.append_message(self.roles[1], None)
        return conversation

    def is_written_as(self, template: Conversation) -> bool:
        """Return whether the messages are written as in a template.

        A system text of the caller's own makes no other template; the one of another named template does.
        """
        return self._form == template._form and (self.system == template.system or not self._has_named_system())

    def in_template(self, template: Conversation) -> Conversation:
        """Return a copy in another template; it keeps a system text of the caller's own.

        Consecutive messages of one role become one, joined by a space.

        Raises:
            ValueError: a message has a role that the conversation does not have.
        """
        conversation = replace(template, messages=[])
        if not self._has_named_system():
            conversation.system = self.system
        messages = conversation.messages
        for role, content in self.messages:
            index = self._role_index(role)
            role = template.roles[index]
            # Not every template can write two messages of one role in a row.
            if messages and messages[-1][0] == role:
                messages[-1][1] = [*_items(messages[-1][1]), " ", *_items(content)]
                continue
            if index == 1 and not messages and template.sep_style is SeparatorStyle.LLAMA_2:
                # That style takes the first message for a question.
                messages.append([template.roles[0], ""])
            messages.append([role, content])
        return conversation

    @property
    def _form(self) -> tuple[Any, ...]:
        """Return all of a template but its system text; the LLaMA-2 style and a tokenizer's own write no roles."""
        form = (self.sep_style, self.sep, self.sep2)
        if self.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.LINES):
            return (*form, *self.roles)
        return form

    def _has_named_system(self) -> bool:
        """Return whether the system text is that of a named template of this form."""
        return any(self._form == named._form and self.system == named.system for named in conv_templates.values())

    def _role_index(self, role: str) -> int:
        """Return 0 for the user and 1 for the assistant."""
        user, assistant = self.roles
        if role not in (user, assistant):
            raise ValueError(
                f"no role {role!r} in this conversation: the user is {user!r} (conv.roles[0]), the assistant is "
                f"{assistant!r} (conv.roles[1])"
            )
        return int(role == assistant)

    @property
    def stop_strings(self) -> list[str]:
        """Return the texts that end an answer, besides the tokenizer's end-of-sequence token."""
        if self.sep_style is SeparatorStyle.CHAT_TEMPLATE:
            return []
        if self.sep_style is SeparatorStyle.LLAMA_2 and self.sep2:
            return [self.sep2]
        return [self.sep]

    def get_prompt(self, tokenizer: Any = None) -> str:
        """Return the conversation as one string, for people; `get_parts` says more, and when a tokenizer is needed."""
        return render_parts(self.get_parts(tokenizer))

    def get_parts(self, tokenizer: Any = None) -> list[PromptPart]:
        """Return the conversation as parts that keep template text, typed text, answers and media apart.

        Args:
            tokenizer: needed by the style CHAT_TEMPLATE: a transformers tokenizer with a chat template.

        Raises:
            ConfigError: style CHAT_TEMPLATE, and the tokenizer is missing or its template cannot be used.
            ValueError: a message has a role that the conversation does not have.
        """
        for role, _ in self.messages:
            self._role_index(role)
        if self.sep_style is SeparatorStyle.LLAMA_2:
            parts = _write_llama_2(self)
        elif self.sep_style is SeparatorStyle.CHAT_TEMPLATE:
            parts = _write_chat_template(self, tokenizer)
        else:
            parts = _write_separated(self)
        return [part for part in parts if isinstance(part, Placeholder) or part.text]


def _items(content: Content) -> list[str | Placeholder]:
    if isinstance(content, str):
        return [content]
    return list(content or ())


def _has_placeholder(content: Content) -> bool:
    return any(isinstance(item, Placeholder) for item in _items(content))


def _body(content: Content, answer: bool) -> list[PromptPart]:
    """Return the content as prompt parts; nothing for an answer to come, and nothing for empty text."""
    items = [item for item in _items(content) if item]
    return [item if isinstance(item, Placeholder) else Text(item, answer=answer) for item in items]


def _write_separated(conv: Conversation) -> list[PromptPart]:
    """Write `role: text` with a separator behind each message; in the style LINES on a line of its own."""
    lines = conv.sep_style is SeparatorStyle.LINES
    start = end = conv.sep
    if lines:
        start, end = "\n\n" + conv.sep, "\n" + conv.sep
    parts: list[PromptPart] = [Text(conv.system), Text(start, trusted=True)]
    for role, content in conv.messages:
        answer = role == conv.roles[1]
        body = _body(content, answer)
        parts.append(Text(f"{role}:", trusted=True))
        # An answer to come ends the prompt after its role. The separator behind an answer belongs to the answer, so
        # that the model learns to write it.
        if body or (lines and content is not None):
            parts += [Text(" ", True, answer), *body, Text(end, True, answer)]
    return parts


def _write_llama_2(conv: Conversation) -> list[PromptPart]:
    """Write questions at even places and answers at odd ones, as in the original; empty later messages vanish."""
    parts: list[PromptPart] = []
    for index, (role, content) in enumerate(conv.messages):
        answer = role == conv.roles[1]
        body = _body(content, answer)
        if index == 0:
            # The system text is inside the first question, so the first message is written even if it is empty.
            system = [Text("[INST] <<SYS>>\n", True), Text(conv.system), Text("\n<</SYS>>\n\n", True)]
            parts += [*system, *body, Text(" [/INST]", True)]
        elif body and index % 2 == 0:
            parts += [Text(f"{conv.sep}[INST] ", True), *body, Text(" [/INST]", True)]
        elif body:
            parts += [Text(" ", True, answer), *body, Text(f" {conv.sep2}", True, answer)]
    return parts


def _write_chat_template(conv: Conversation, tokenizer: Any) -> list[PromptPart]:
    """Write the tokenizer's template around the contents; what follows an answer up to a special token ends it."""
    messages = list(conv.messages)
    if conv.system:
        messages.insert(0, ["system", conv.system])
    # An open answer is not a message of the template, but its generation prompt.
    answer_follows = bool(messages) and messages[-1][0] == conv.roles[1] and messages[-1][1] is None
    if answer_follows:
        messages.pop()
    names = {conv.roles[0]: "user", conv.roles[1]: "assistant", "system": "system"}
    around = _template_text(tokenizer, [names[role] for role, _ in messages], answer_follows)
    end_of_answer = _end_pattern(tokenizer)
    parts: list[PromptPart] = [Text(around[0], trusted=True)]
    for (role, content), after in zip(messages, around[1:], strict=True):
        answer = role == conv.roles[1]
        cut = 0
        if answer and (ending := end_of_answer.match(after)):
            cut = ending.end()
        parts += [*_body(content, answer), Text(after[:cut], True, answer), Text(after[cut:], True)]
    return parts


def _end_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return the pattern of what ends an answer, which the model has to learn.

    It is the first special token behind the answer, or special tokens up to EOS: Phi-3 ends a turn by `<|end|>`, and a
    conversation by EOS behind it.
    """
    specials = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    first = "|".join(rf"\s*{token}" for token in specials)
    if not specials or not tokenizer.eos_token:
        return re.compile(first)
    return re.compile(rf"(?:{first})*?\s*{re.escape(tokenizer.eos_token)}|{first}")


def _template_text(tokenizer: Any, roles: Sequence[str], add_generation_prompt: bool) -> list[str]:
    """Return what the tokenizer's chat template writes before, between and after the contents of messages."""
    if tokenizer is None or not tokenizer.chat_template:
        problem = "no tokenizer was given" if tokenizer is None else "the tokenizer has no chat template"
        raise ConfigError(
            f"the conversation needs the tokenizer's chat template, but {problem}; "
            f"pass such a tokenizer or choose one of the templates {', '.join(sorted(conv_templates))}"
        )
    # Characters of the private-use area stand in for the contents: no template uses them.
    turns = [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]
    # What is asked must be written as what is learnt, and no answer that is learnt begins with its reasoning.
    options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": False}
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:
        # A template is a program of the model's: it may raise anything, and does for messages that it does not take.
        raise ConfigError(
            f"the tokenizer's chat template cannot write messages of {', '.join(roles)} ({error}); use another "
            "conversation template or, if it takes no system text, an empty one"
        ) from error
    # The pieces alternate: template text, message number, template text. Each number must be there once and in order.
    split = re.split("\ue000(\\d+)\ue001", text)
    if [int(index) for index in split[1::2]] != list(range(len(roles))):
        raise ConfigError(
            "the tokenizer's chat template leaves out or repeats a message (some take no system text); "
            "use another conversation template or an empty system text"
        )
    return split[::2]


_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_VISION_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it "
    "to you. Please answer my questions."
)


def _vicuna(system: str = "", sep_style: SeparatorStyle = SeparatorStyle.SINGLE) -> Conversation:
    return Conversation(system, ("Human", "Assistant"), sep_style=sep_style)


def _llama_2(system: str) -> Conversation:
    roles = ("USER", "ASSISTANT")
    return Conversation(system, roles, sep_style=SeparatorStyle.LLAMA_2, sep="<s>", sep2="</s>")


class _Templates(dict[str, Conversation]):
    def __missing__(self, name: object) -> Conversation:
        raise KeyError(f"no conversation template {name!r}; there are {', '.join(self)}")


conv_templates: dict[str, Conversation] = _Templates(
    default=_vicuna(),
    v1=_vicuna(),
    vision=_vicuna(_VISION_SYSTEM),
    video_vicuna=_vicuna(),
    instruct_vicuna=_vicuna(sep_style=SeparatorStyle.LINES),
    llama_2=_llama_2(_LLAMA_2_SYSTEM),
    video_llama_2=_llama_2(" "),
    tokenizer=Conversation("", ("user", "assistant"), sep_style=SeparatorStyle.CHAT_TEMPLATE, sep=""),
)
"""Templates by name; take a `copy()` before adding messages.

`v1`, `default` and `video_vicuna` are the original's for Vicuna models, `vision` the same with a system text.
`llama_2` is its chat template for LLaMA-2 models, `video_llama_2` the one those were instruction-tuned with.
`instruct_vicuna` is how Vicuna models are instruction-tuned. `tokenizer` is the tokenizer's own template.

Example:
    >>> conv_templates["llama_2"].stop_strings
    ['</s>']
"""
