"""Questions on frames and short answers, in Chinese."""

from __future__ import annotations

from numpy.random import Generator

from examples.tiny_world.world.facts import Facts

__all__ = ["WORDS", "ask_in_chinese"]

WORDS: dict[str, dict[str, str]] = {
    "shape": {
        "circle": "圆形",
        "square": "正方形",
        "triangle": "三角形",
        "star": "星形",
        "cross": "十字",
        "ring": "圆环",
    },
    "colour": {
        "red": "红色",
        "green": "绿色",
        "blue": "蓝色",
        "yellow": "黄色",
        "orange": "橙色",
        "purple": "紫色",
        "pink": "粉色",
        "cyan": "青色",
    },
    "size": {"small": "小", "large": "大"},
    "count": {"one": "一", "two": "两", "three": "三", "four": "四"},
    "motion": {"left": "向左移动", "right": "向右移动", "up": "向上移动", "down": "向下移动", "still": "静止不动"},
    "background": {"black": "黑色", "white": "白色", "grey": "灰色", "brown": "棕色"},
}

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": ("这是什么形状?", "你看到什么形状?"),
    "colour": ("是什么颜色?", "你看到什么颜色?"),
    "size": ("是大还是小?", "大小怎么样?"),
    "count": ("有几个?", "一共有多少个?"),
    "motion": ("往哪个方向移动?", "运动方向是什么?"),
    "background": ("背景是什么颜色?", "背景怎么样?"),
    "order": ("先是什么,然后是什么?", "视频中有什么变化?"),
}

_ANSWERS = {
    "shape": "是{}。",
    "colour": "是{}的。",
    "size": "是{}的。",
    "count": "有{}个。",
    "motion": "{}。",
    "background": "背景是{}的。",
}


def ask_in_chinese(attribute: str, facts: Facts, rng: Generator) -> tuple[str, str]:
    """Return a question on one visual attribute of a clip, and its answer.

    Raises:
        KeyError: the attribute is unknown, or these facts do not have it.
    """
    question = str(rng.choice(_QUESTIONS[attribute]))
    if attribute == "order":
        if facts.changes is None:
            return question, "没有变化。"
        words = WORDS[facts.changes]
        return question, f"先是{words[facts.first]},然后是{words[facts.then]}。"
    return question, _ANSWERS[attribute].format(WORDS[attribute][facts.values[attribute]])
