"""What people read on the page, in English and in Chinese, and which of the two they get."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs

from starlette.types import Scope

Language = Literal["en", "zh"]

# Where the page of each language is; the first that begins a path has it.
PATHS: dict[Language, str] = {"zh": "/zh", "en": "/"}


@dataclass(frozen=True)
class Texts:
    """The words of one language."""

    tag: str
    """BCP 47, for browsers and screen readers."""
    other: str
    """What the link to the other language says, in that language."""
    loading: str
    ask_picture: str
    ask: str
    picture_first: str
    labels_hint: str
    picture: str
    drop: str
    examples: str
    conversation: str
    system_prompt: str
    settings: str
    send: str
    stop: str
    restart: str
    labels: str
    labels_example: str
    result: str
    compare: str
    one_label: str
    no_words: str
    weights: str
    revision: str
    controls: dict[str, tuple[str, str]]
    """Field of Sampling: its name, and what it does."""


TEXTS: dict[Language, Texts] = {
    "en": Texts(
        tag="en",
        other="中文",
        loading="loading the model…",
        ask_picture="Ask about the picture",
        ask="Ask a question",
        picture_first="Upload a picture, then ask about it",
        labels_hint="Upload a picture and write what it may show, one label a line",
        picture="Picture",
        drop="Drop a picture here, or click",
        examples="Examples",
        conversation="Conversation",
        system_prompt="System prompt",
        settings="Settings",
        send="Send",
        stop="Stop",
        restart="Restart",
        labels="Labels, one a line",
        labels_example="a cat\na dog\na city at night",
        result="Result",
        compare="Compare",
        one_label="One label has nothing to be compared with; write several for percentages.",
        no_words="(no words)",
        weights="weights",
        revision="revision",
        controls={
            "temperature": ("Temperature", "0 always takes the likeliest word"),
            "top_p": ("Top-p", "the likeliest words that make up this share"),
            "top_k": ("Top-k", "so many of the likeliest words; 0: all"),
            "num_beams": ("Beams", "answers followed side by side; more are slower"),
            "max_new_tokens": ("Tokens at most", "of one answer"),
            "repetition_penalty": ("Repetition penalty", "1: none"),
            "seed": ("Seed", "the same seed gives the same answer; empty: by chance"),
        },
    ),
    "zh": Texts(
        tag="zh-CN",
        other="English",
        loading="正在加载模型…",
        ask_picture="请就图片提问",
        ask="请提问",
        picture_first="先上传图片，再就图片提问",
        labels_hint="上传图片，写下图中可能有的内容，每行一个标签",
        picture="图片",
        drop="拖放图片到此处，或点击上传",
        examples="示例",
        conversation="对话",
        system_prompt="系统提示词",
        settings="设置",
        send="发送",
        stop="停止",
        restart="重新开始",
        labels="标签，每行一个",
        labels_example="a cat\na dog\na city at night",
        result="结果",
        compare="比较",
        one_label="只有一个标签时无从比较；写几个标签，才有百分比。",
        no_words="（没有文字）",
        weights="权重",
        revision="版本",
        controls={
            "temperature": ("温度", "0 表示总取最可能的词"),
            "top_p": ("Top-p", "只取累计概率达到此值的最可能的词"),
            "top_k": ("Top-k", "只取最可能的若干个词；0 表示不限"),
            "num_beams": ("束宽", "同时保留的候选答案数；越多越慢"),
            "max_new_tokens": ("最多 token 数", "每个回答"),
            "repetition_penalty": ("重复惩罚", "1 表示不惩罚"),
            "seed": ("随机种子", "种子相同则回答相同；留空表示随机"),
        },
    ),
}


def chosen(scope: Scope) -> Language:
    """The language of a request: `?lang=`, else its path's, else what the browser prefers."""
    asked = parse_qs(scope["query_string"].decode("latin-1")).get("lang", [""])[0]
    if asked in PATHS:
        return "zh" if asked == "zh" else "en"
    if scope["path"].startswith(PATHS["zh"]):
        return "zh"
    accepted = dict(scope["headers"]).get(b"accept-language", b"").decode("latin-1")
    best: tuple[float, Language] = (0, "en")
    for choice in accepted.split(","):
        tag, _, quality = choice.strip().partition(";q=")
        language: Language = "zh" if tag.lower().startswith("zh") else "en"
        try:
            weight = float(quality or 1)
        except ValueError:
            continue
        if tag.lower()[:2] == language and weight > best[0]:
            best = weight, language
    return best[1]


_WANTED = "请上传 JPEG、PNG、WebP、GIF、BMP、TIFF 或 AVIF 图片"

# What a person may meet on the page: how the English line begins and goes on, and the Chinese.
_CHINESE = (
    (r"(\d+) questions are waiting already;.*", r"已有 \1 个问题在排队，请稍后再问"),
    (r"the model is loading;.*", r"模型正在加载，请稍候"),
    (r"the service is stopping;.*", r"服务正在停止，恢复后请再问"),
    (r"the answer took longer than (\S+) seconds.*", r"回答（含排队）超过 \1 秒，请稍后再问"),
    (r"the picture is empty.*", rf"图片是空文件；{_WANTED}"),
    (r"the picture has (\S+) MiB, the limit is (\S+) MiB.*", r"图片有 \1 MiB，上限是 \2 MiB"),
    (r"the picture.* is over the limit of (\d+) million pixels.*", r"图片超过 \1 百万像素的上限"),
    (r"the (\S+) file is damaged or cut off.*", r"\1 文件已损坏或不完整，请重新保存并完整上传"),
    (r"HEIC pictures cannot be read here;.*", rf"这里不能读取 HEIC 图片；{_WANTED}"),
    (r"the upload is markup.*", rf"上传的是 SVG 或 HTML，不是图片；{_WANTED}"),
    (r"the upload is not a picture;.*", rf"上传的不是图片；{_WANTED}"),
    (r"the picture is no longer here;.*", r"图片已被清理，请重新上传"),
    (r"a conversation has (\d+) pictures at most;.*", r"一次对话最多 \1 张图片，请重新开始"),
)


def translated(error: str, texts: Texts) -> str:
    """An error's line in the page's language; what only the model knows stays as it is."""
    if texts.tag == "en":
        return error
    for pattern, chinese in _CHINESE:
        if found := re.fullmatch(pattern, error, re.DOTALL):
            return found.expand(chinese)
    return f"出错了：{error}"
