"""Conversation templates as Jinja, for programs that know a model's chat by its `chat_template.jinja` only.

The package itself never renders it: a rendered string no longer tells typed text from template text. Here typed text is
kept from being a placeholder by a space, and nothing keeps it from being a special token.
"""

from __future__ import annotations

import json

from video_llama.constants import AUDIO_PLACEHOLDER, IMAGE_PLACEHOLDER
from video_llama.conversation import Conversation, SeparatorStyle
from video_llama.prompt_parts import Placeholder, audio_prefix, image_prefix, video_prefix, video_with_audio_prefix

__all__ = ["write_jinja"]

# What an item says; items are joined by a space. Audio of the same file right behind a video is introduced with it.
_MACROS = """\
{%- macro typed(text) -%}
{{ text | string | replace(IMAGE, IMAGE_TYPED) | replace(AUDIO, AUDIO_TYPED) }}
{%- endmacro -%}
{%- macro source(item) -%}
{{ item.get(item.type) or item.get('path') or item.get('url') or '' }}
{%- endmacro -%}
{%- macro say(content) -%}
{%- if content is string -%}{{ typed(content) }}
{%- else -%}
{%- set state = namespace(began=false, video='') -%}
{%- for item in content or [] -%}
{%- set joined = item.type == 'audio' and state.video and source(item) == state.video -%}
{%- set state.video = '' -%}
{%- if not joined -%}
{%- if state.began %} {% endif -%}
{%- set state.began = true -%}
{%- if item.type == 'text' -%}{{ typed(item.text) }}
{%- elif item.type == 'image' -%}{{ IMAGE_ITEM }}
{%- elif item.type == 'audio' -%}{{ AUDIO_ITEM }}
{%- elif item.type == 'video' -%}
{%- set next = loop.nextitem -%}
{%- if not loop.last and next.type == 'audio' and source(item) and source(next) == source(item) -%}
{%- set state.video = source(item) -%}
{{ BOTH_ITEM }}
{%- else -%}{{ VIDEO_ITEM }}
{%- endif -%}
{%- else -%}{{ raise_exception('the type of a content item must be text, image, video or audio, not ' + item.type) }}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
# Names in quotation marks are put in below. A user's messages in a row are one turn, joined by a space.
_LLAMA_2 = """\
{%- set turn = namespace(system=SYSTEM, first=true) -%}
{{ BOS }}
{%- for message in messages -%}
{%- set text = say(message.content) -%}
{%- if message.role == 'system' -%}{%- set turn.system = text -%}
{%- elif message.role == 'user' -%}
{%- if turn.first -%}{{ '[INST] <<SYS>>\\n' + turn.system + '\\n<</SYS>>\\n\\n' }}
{%- elif loop.previtem.role == 'user' %} {% else -%}{{ SEP + '[INST] ' }}
{%- endif -%}
{{ text }}
{%- set turn.first = false -%}
{%- if loop.last or loop.nextitem.role != 'user' -%}{{ ' [/INST]' }}{%- endif -%}
{%- elif text -%}
{%- generation -%}{{ ' ' + text + ' ' + END }}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""
_SEPARATED = """\
{%- set turn = namespace(system=SYSTEM) -%}
{%- for message in messages if message.role == 'system' -%}{%- set turn.system = say(message.content) -%}{%- endfor -%}
{{ BOS + turn.system + START }}
{%- for message in messages if message.role != 'system' -%}
{%- set text = say(message.content) -%}
{%- if message.role == 'user' -%}
{%- if not loop.first and loop.previtem.role == 'user' %} {% else -%}{{ USER + ': ' }}{%- endif -%}
{{ text }}
{%- if loop.last or loop.nextitem.role != 'user' -%}{{ END }}{%- endif -%}
{%- else -%}
{{ ASSISTANT + ':' }}
{%- if text or WRITES_EMPTY -%}{%- generation -%}{{ ' ' + text + END }}{%- endgeneration -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ASSISTANT + ':' }}{%- endif -%}
"""


def write_jinja(template: Conversation, bos: str = "") -> str | None:
    """Return a conversation template as the Jinja template of a tokenizer or processor.

    Args:
        template: one of `conv_templates`.
        bos: what the tokenizer puts in front of a prompt.

    Returns:
        the template, whose answers are between `{% generation %}` marks; None in the style CHAT_TEMPLATE, where the
        tokenizer has its own.
    """
    style, sep = template.sep_style, template.sep
    if style is SeparatorStyle.CHAT_TEMPLATE:
        return None
    values: dict[str, str | bool] = {
        "IMAGE_TYPED": IMAGE_PLACEHOLDER.replace("<", "< "),
        "AUDIO_TYPED": AUDIO_PLACEHOLDER.replace("<", "< "),
        "IMAGE_ITEM": _written(image_prefix()),
        "AUDIO_ITEM": _written(audio_prefix()),
        "VIDEO_ITEM": _written(video_prefix()),
        "BOTH_ITEM": _written(video_with_audio_prefix()),
        "IMAGE": IMAGE_PLACEHOLDER,
        "AUDIO": AUDIO_PLACEHOLDER,
        "SYSTEM": template.system,
        "BOS": bos,
    }
    if style is SeparatorStyle.LLAMA_2:
        values |= {"SEP": sep, "END": str(template.sep2)}
        return _definitions(values) + _MACROS + _LLAMA_2
    is_on_lines = style is SeparatorStyle.LINES
    start = end = sep
    if is_on_lines:
        start, end = "\n\n" + sep, "\n" + sep
    user, assistant = template.roles
    values |= {"START": start, "END": end, "USER": user, "ASSISTANT": assistant, "WRITES_EMPTY": is_on_lines}
    return _definitions(values) + _MACROS + _SEPARATED


def _definitions(values: dict[str, str | bool]) -> str:
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in values.items())


def _written(prefix: list[str | Placeholder]) -> str:
    return "".join(item.token if isinstance(item, Placeholder) else item for item in prefix)
