"""Conversations: who said what, and the templates they are written out in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from video_llama.errors import ConfigError
from video_llama.prompt_parts import (
    Content,
    Placeholder,
    PromptPart,
    Text,
    render_parts,
)

__all__ = ["Conversation", "SeparatorStyle", "conv_templates"]


class SeparatorStyle(Enum):
    """How turns are written out and told apart."""

    SINGLE = auto()
    """`system###Human: question###Assistant: answer###`"""
    LINES = auto()
    """As SINGLE with every message on a line of its own; what Vicuna models are instruction-tuned on."""
    LLAMA_2 = auto()
    """`[INST] <<SYS>>…<</SYS>> question [/INST] answer </s><s>[INST] …`"""
    CHAT_TEMPLATE = auto()
    """The chat template that comes with the language model's tokenizer."""


@dataclass
class Conversation:
    """Messages and the template they are written out in.

    Args:
        system: the instruction in front.
        roles: names of the user and of the assistant.
        messages: `[role, content]` lists, so that an answer can be put in: `conv.messages[-1][-1] = answer`.
            In text nothing is special; media positions are `Placeholder` items of a content list.
        offset: messages in front that are examples; kept for users of the original, unused here.
        sep_style: how turns are told apart.
        sep: what separates turns; in the LLaMA-2 style, what begins a later turn.
        sep2: what ends an answer in the LLaMA-2 style.
    """

    system: str
    roles: Sequence[str]
    messages: list[list[Any]] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None

    def copy(self) -> Conversation:
        """An independent conversation with the same messages."""
        messages = [
            [role, content if content is None or isinstance(content, str) else list(content)]
            for role, content in self.messages
        ]
        return replace(self, messages=messages)

    def append_message(self, role: str, content: Content) -> None:
        """Add a message; content None stands for an answer to come.

        Raises:
            ValueError: a role that is none of the conversation's.
        """
        self._place_of(role)
        self.messages.append([role, content])

    def ask(self, text: str) -> None:
        """Add a question; one that follows media in an open user message joins that message with a space."""
        if self.messages and self.messages[-1][0] == self.roles[0] and _has_placeholder(self.messages[-1][1]):
            self.messages[-1][1] = [*self.messages[-1][1], " ", text]
        else:
            self.append_message(self.roles[0], text)

    def introduce(self, introduction: Sequence[str | Placeholder]) -> None:
        """Put media in front of the first question.

        Args:
            introduction: what `media_prefix` returns. Without a question yet it becomes a user message,
                which the next `ask` completes.
        """
        for message in self.messages:
            if message[0] == self.roles[0]:
                message[1] = [*introduction, *_items(message[1])]
                return
        bare = introduction[:-1] if introduction and introduction[-1] == " " else introduction
        self.messages.insert(0, [self.roles[0], list(bare)])

    def drop_oldest_turn(self) -> bool:
        """Take out the oldest question and its answer; its media go to the next question.

        Returns:
            whether there was a turn to take out: the last question always stays.
        """
        questions = [index for index, (role, _) in enumerate(self.messages) if role == self.roles[0]]
        if len(questions) < 2:
            return False
        oldest, following = questions[:2]
        items = _items(self.messages[oldest][1])
        media = items[:-1] if _has_placeholder(items) and isinstance(items[-1], str) else items
        if _has_placeholder(media):
            self.messages[following][1] = [*media, *_items(self.messages[following][1])]
        del self.messages[oldest:following]
        return True

    def has_media(self) -> bool:
        """Whether any message holds a placeholder."""
        return any(_has_placeholder(content) for _, content in self.messages)

    def up_to_answer(self) -> Conversation:
        """A copy that ends where the next answer begins; a last assistant message stands for that answer."""
        conversation = self.copy()
        if conversation.messages and conversation.messages[-1][0] == self.roles[1]:
            conversation.messages[-1][1] = None
        else:
            conversation.append_message(self.roles[1], None)
        return conversation

    def is_written_as(self, template: Conversation) -> bool:
        """Whether the messages are written out as in a template.

        A system text of the caller's own makes no other template; the one of another named template does.
        """
        return self._form == template._form and (self.system == template.system or not self._has_named_system())

    def in_template(self, template: Conversation) -> Conversation:
        """A copy in another template; it keeps a system text of the caller's own.

        Messages of one role in a row become one, joined by a space: not every template can write them.

        Raises:
            ValueError: a message has a role that is none of the conversation's.
        """
        conversation = template.copy()
        conversation.messages = []
        if not self._has_named_system():
            conversation.system = self.system
        for role, content in self.messages:
            place = self._place_of(role)
            role = template.roles[place]
            if conversation.messages and conversation.messages[-1][0] == role:
                conversation.messages[-1][1] = [*_items(conversation.messages[-1][1]), " ", *_items(content)]
            elif place == 1 and not conversation.messages and template.sep_style is SeparatorStyle.LLAMA_2:
                # That style takes the first message for a question.
                conversation.messages = [[template.roles[0], ""], [role, content]]
            else:
                conversation.messages.append([role, content])
        return conversation

    @property
    def _form(self) -> tuple[Any, ...]:
        """All of a template but its system text; the LLaMA-2 style and a tokenizer's own write no roles."""
        writes_roles = self.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.LINES)
        return self.sep_style, self.sep, self.sep2, tuple(self.roles) if writes_roles else None

    def _has_named_system(self) -> bool:
        """Whether the system text is the one that a named template of this form comes with."""
        return any(self._form == one._form and self.system == one.system for one in conv_templates.values())

    def _place_of(self, role: str) -> int:
        """0 for who asks, 1 for who answers."""
        asks, answers = self.roles
        if role not in (asks, answers):
            raise ValueError(
                f"no role {role!r} in this conversation: who asks is {asks!r} (conv.roles[0]), who answers is "
                f"{answers!r} (conv.roles[1])"
            )
        return int(role == answers)

    @property
    def stop_strings(self) -> list[str]:
        """Texts that end an answer, besides the tokenizer's end-of-sequence token."""
        if self.sep_style is SeparatorStyle.CHAT_TEMPLATE:
            return []
        return [self.sep2] if self.sep_style is SeparatorStyle.LLAMA_2 and self.sep2 else [self.sep]

    def get_prompt(self, tokenizer: Any = None) -> str:
        """The conversation as one string. For people and comparison: `get_parts` keeps what was typed apart.

        Args:
            tokenizer: needed by the style CHAT_TEMPLATE.
        """
        return render_parts(self.get_parts(tokenizer))

    def get_parts(self, tokenizer: Any = None) -> list[PromptPart]:
        """The conversation as pieces that tell template, typed text, answers and media apart.

        Args:
            tokenizer: needed by the style CHAT_TEMPLATE: a transformers tokenizer with a chat template.

        Raises:
            ConfigError: style CHAT_TEMPLATE, and the tokenizer is missing or its template cannot be used.
            ValueError: a message has a role that is none of the conversation's.
        """
        for role, _ in self.messages:
            self._place_of(role)
        if self.sep_style is SeparatorStyle.LLAMA_2:
            pieces = _llama_2_pieces(self)
        elif self.sep_style is SeparatorStyle.CHAT_TEMPLATE:
            pieces = _chat_template_pieces(self, tokenizer)
        else:
            pieces = _separated_pieces(self)
        return [piece for piece in pieces if isinstance(piece, Placeholder) or piece.text]


def _items(content: Content) -> list[str | Placeholder]:
    if content is None:
        return []
    return [content] if isinstance(content, str) else list(content)


def _has_placeholder(content: Content) -> bool:
    return any(isinstance(item, Placeholder) for item in _items(content))


def _body(content: Content, answer: bool) -> list[PromptPart]:
    """The content as pieces; nothing for an answer to come, and nothing for empty text."""
    items = [item for item in _items(content) if item]
    return [item if isinstance(item, Placeholder) else Text(item, answer=answer) for item in items]


def _separated_pieces(conv: Conversation) -> list[PromptPart]:
    lines = conv.sep_style is SeparatorStyle.LINES
    pieces: list[PromptPart] = [Text(conv.system), Text(("\n\n" if lines else "") + conv.sep, trusted=True)]
    for role, content in conv.messages:
        answer, body = role == conv.roles[1], _body(content, role == conv.roles[1])
        pieces.append(Text(f"{role}:", trusted=True))
        if body or (lines and content is not None):
            end = "\n" + conv.sep if lines else conv.sep
            pieces += [Text(" ", True, answer), *body, Text(end, True, answer)]
    return pieces


def _llama_2_pieces(conv: Conversation) -> list[PromptPart]:
    """Questions at even places and answers at odd ones, as in the original; empty later messages vanish."""
    pieces: list[PromptPart] = []
    for index, (role, content) in enumerate(conv.messages):
        answer, body = role == conv.roles[1], _body(content, role == conv.roles[1])
        if index == 0:
            system = [Text("[INST] <<SYS>>\n", True), Text(conv.system), Text("\n<</SYS>>\n\n", True)]
            pieces += [*system, *body, Text(" [/INST]", True)]
        elif body and index % 2 == 0:
            pieces += [Text(f"{conv.sep}[INST] ", True), *body, Text(" [/INST]", True)]
        elif body:
            pieces += [Text(" ", True, answer), *body, Text(f" {conv.sep2}", True, answer)]
    return pieces


def _chat_template_pieces(conv: Conversation, tokenizer: Any) -> list[PromptPart]:
    """The tokenizer's template around the contents; what follows an answer up to a special token ends it."""
    messages = [*([("system", conv.system)] if conv.system else []), *conv.messages]
    to_come = bool(messages) and messages[-1][0] == conv.roles[1] and messages[-1][1] is None
    if to_come:
        messages.pop()
    names = {conv.roles[0]: "user", conv.roles[1]: "assistant", "system": "system"}
    around = _template_text(tokenizer, [names[role] for role, _ in messages], to_come)
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    end_of_answer = re.compile("|".join(rf"\s*{re.escape(token)}" for token in specials))
    pieces: list[PromptPart] = [Text(around[0], trusted=True)]
    for (role, content), after in zip(messages, around[1:], strict=True):
        answer = role == conv.roles[1]
        ending = end_of_answer.match(after) if answer else None
        cut = ending.end() if ending else 0
        pieces += [*_body(content, answer), Text(after[:cut], True, answer), Text(after[cut:], True)]
    return pieces


def _template_text(tokenizer: Any, roles: Sequence[str], add_generation_prompt: bool) -> list[str]:
    """What the tokenizer's chat template writes before, between and after the contents of messages."""
    if tokenizer is None or not tokenizer.chat_template:
        lacks = "no tokenizer was given" if tokenizer is None else "the tokenizer has no chat template"
        raise ConfigError(
            f"the conversation is to be written in the tokenizer's chat template, but {lacks}; "
            f"pass such a tokenizer or choose one of the templates {', '.join(sorted(conv_templates))}"
        )
    # Characters of the private-use area stand in for the contents: no template says anything with them.
    turns = [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
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
    """Tells which names there are when asked for another."""

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
"""
