"""Chat templates: messages and tools → rendered text, in which control tokens from the data are replaced by plain words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rlhf_core.contracts.records import Message
from rlhf_core.data.control_tokens import ALLOWED, ControlTokens
from rlhf_core.data.messages import NoContent
from rlhf_core.data.named_templates import ANYWHERE, LAYOUTS, named_template
from rlhf_core.infra.errors import ConfigError, DataError, ModelError, did_you_mean, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTION = "dataset.chat_template"

_TAGS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_WORD = "zqWord"
_FORMATS = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_TIME: ContextVar[datetime | None] = ContextVar("the time that templates get", default=None)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in the form that a chat template gets, control tokens from the data replaced by plain words."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    mark: str | None
    """Beginning of the words that replace control tokens; None where there are none."""
    place: str
    """Where its row is, for messages."""

    def word(self, letter: str) -> str:
        """Return a word that doesn't occur in the conversation; `letter` tells several apart."""
        word = _WORD
        while any(word in text for text in texts_in([self.messages, self.tools])):
            word += "q"
        return f"{word}{letter}z"

    def with_text(self, number: int, text: str) -> Chat:
        """Return the conversation with the content, reasoning and tool calls of message `number` replaced by `text`."""
        messages = list(self.messages)
        kept = {"role", "name", "tool_call_id"}
        messages[number] = {key: value for key, value in messages[number].items() if key in kept} | {"content": text}
        return Chat(messages, self.tools, self.mark, self.place)

    def until(self, number: int) -> Chat:
        """Return the conversation's first `number` messages."""
        return Chat(self.messages[:number], self.tools, self.mark, self.place)


class ChatTemplate:
    """A chat template: the tokenizer's, or the one that `dataset.chat_template` gives instead.

    Args:
        option: the template's text, its file's path, or a name (`named_templates`); None for the tokenizer's own.
        allowed: control tokens that data may use.

    Raises:
        ConfigError: there is no such template, or the tokenizer lacks a token that the template of that name is made of.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, option: str | None = None, *, allowed: Sequence[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.control = ControlTokens(tokenizer, allowed)
        own: Any = tokenizer.chat_template
        if option in LAYOUTS:
            _check_tokens(option, self.control, tokenizer)
        self.option = read_template(option) if option is not None else None
        named = own if isinstance(own, dict) else {"default": own}
        self.source: str | None = self.option if option is not None else named.get("default")
        # Some tokenizers have a second template, for conversations with tools.
        self.with_tools = self.source if option is not None else named.get("tool_use", self.source)
        self._markers: dict[str, str | None] = {}
        self._tagged = {text: _TAGS.search(text) is not None for text in (self.source, self.with_tools) if text}

    @property
    def sha256(self) -> str | None:
        """Hash of the template's text; None where there is no template."""
        return hashlib.sha256(self.source.encode()).hexdigest() if self.source is not None else None

    def times(self) -> dict[str, str] | None:
        """Return the times that the template writes, by format; empty where it writes none.

        None where it writes the time and nothing fixes that (see `rendered_at`), so that two renderings may differ.
        """
        times: dict[str, str] = {}
        for source in {self.source or "", self.with_tools or ""}:
            if "strftime_now" in source:
                found = _at_time(source, _TIME.get())[1]
                if not found:
                    return None
                times |= found
        return times

    def chat(
        self, messages: Sequence[Message], place: str, *, tools: list[Any] | None = None, also: Sequence[Any] = ()
    ) -> Chat:
        """Return a conversation for `render`, in which control tokens that data may not use are replaced by plain words.

        Args:
            also: other texts of the row (the other response of a pair), so that the prompt is treated alike for both.
        """
        if not any(map(self.control.within, texts_in([messages, tools, also]))):
            return Chat([dict(message) for message in messages], tools, None, place)
        mark = "zqControl"
        while any(mark in text for text in texts_in([messages, tools, also])):
            mark += "q"

        def hide(text: str) -> str:
            return self.control.hidden(text, mark)

        hidden = [
            {key: value if key == "role" else _mapped(value, hide) for key, value in message.items()}
            for message in messages
        ]
        return Chat(hidden, _mapped(tools, hide), mark, place)

    def render(self, chat: Chat, *, answer: bool = False) -> str:
        """Return the rendered text; with `answer`, including the generation prompt after which the assistant's answer begins.

        Raises:
            ModelError: there is no template, or it is not valid.
            DataError: the template refuses this conversation.
        """
        return self._rendered(chat, answer=answer)[0]

    def generation_spans(self, chat: Chat) -> list[tuple[int, int]] | None:
        """Return the (begin, end) offsets in the rendered text that `{% generation %}` tags enclose; None without such tags."""
        return self._rendered(chat, tagged=True)[1] if self.tagged(chat) else None

    def tagged(self, chat: Chat) -> bool:
        """Return whether the template for this conversation has `{% generation %}` tags."""
        return self._tagged[self._source(chat)]

    def next_marker(self, role: str) -> str | None:
        """Return the control token that begins a turn of `role` after an assistant's turn, with white space before it.

        Some models (GLM-4) stop at it. None where the template writes none there.
        """
        if role not in self._markers:
            said, after = f"{_WORD}Az", f"{_WORD}Bz"
            messages: list[Message] = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": said},
                {"role": role, "content": after},  # type: ignore[typeddict-item]
            ]
            try:
                rendered = self.render(Chat([dict(message) for message in messages], None, None, "a probe"))
            except (DataError, ModelError):
                rendered = ""
            gap = rendered.partition(said)[2].partition(after)[0]
            blank = len(gap) - len(gap.lstrip())
            found = self.control.at(gap, blank)
            self._markers[role] = gap[: found.end()] if found else None
        return self._markers[role]

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Ids of the control tokens that end an assistant's turn of text, and one of tool calls.

        Where the template writes none, they are those that begin the next turn (of the user, of a tool).
        """
        said = f"{_WORD}Az"
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
        if self.source is None:
            return ()
        spoken = self.control.matches(self._probe({"content": said}).rpartition(said)[2])
        called = self._probe({"content": "", "tool_calls": [call]})
        if spoken:
            names = [spoken[0].group()]
            if self.control.closed_end(called) is not None:
                names.append(self.control.matches(called)[-1].group())
        else:
            markers = (self.next_marker(role) for role in ("user", "tool"))
            names = [marker.strip() for marker in markers if marker is not None]
        return tuple(dict.fromkeys(self.control.tokens[name][0] for name in names))

    def _probe(self, turn: dict[str, Any]) -> str:
        """Render a question with this assistant's turn; return empty text where the template refuses it."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", **turn}]
        try:
            return self.render(Chat(messages, None, None, "a probe"))
        except (DataError, ModelError):
            return ""

    @cached_property
    def opening(self) -> str | None:
        """The control token that begins every turn (`<|im_start|>`), or the assistant's turns; None where there is none."""
        asked = f"{_WORD}Az"
        chat = Chat([{"role": "user", "content": asked}], None, None, "a probe")
        try:
            plain, answer = (self.render(chat, answer=flag).partition(asked)[2] for flag in (False, True))
        except (DataError, ModelError):
            return None
        shared = self.control.whole_until(answer, common_prefix(plain, answer))
        found = self.control.matches(answer[shared:])
        return found[0].group() if found else None

    @cached_property
    def takes_parts(self) -> bool:
        """Whether contents must be lists of parts (`[{"type": "text", …}]`), as templates of vision models want them."""
        word = f"{_WORD}Az"
        try:
            texts = [
                self._apply(self.source or "", [{"role": "user", "content": content}])[0]
                for content in (word, [{"type": "text", "text": word}])
            ]
        except Exception:  # a template that refuses both is reported when it is given data
            return False
        return word not in texts[0] and word in texts[1]

    def _in_form(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with contents in the form that the template takes: text, or lists of parts."""
        if not self.takes_parts:
            return [dict(message) for message in messages]
        return [{**message, "content": _parts(message["content"])} for message in messages]

    def _source(self, chat: Chat) -> str:
        """Return the text of the template for this conversation, which may be the one for tools."""
        source = self.with_tools if chat.tools else self.source
        if source is None:
            raise ModelError(
                "the data hold chat messages, and the tokenizer has no chat template",
                place=chat.place,
                fix=f"give one by `{OPTION}`, or use a model that has one",
            )
        return source

    def _rendered(self, chat: Chat, *, answer: bool = False, tagged: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text and, with `tagged`, the offsets that tags enclose.

        Missing content is given as None where the template accepts that, else as empty text.
        """
        if not any(isinstance(message["content"], NoContent) for message in chat.messages):
            return self._with_calls(chat, answer=answer, tagged=tagged)
        try:
            bare = self._with_calls(_with_content(chat, None), answer=answer, tagged=tagged)
        except DataError:
            return self._with_calls(_with_content(chat, ""), answer=answer, tagged=tagged)
        try:
            empty = self._with_calls(_with_content(chat, ""), answer=answer, tagged=tagged)
        except DataError:
            return bare
        # Jinja prints None as a word where a template doesn't check contents.
        return empty if bare[0].count("None") > empty[0].count("None") else bare

    def _with_calls(self, chat: Chat, *, answer: bool, tagged: bool) -> tuple[str, list[tuple[int, int]]]:
        """Render with the arguments of tool calls as mappings, or as JSON where the template wants them so."""
        try:
            return self._render(chat, answer=answer, tagged=tagged)
        except TypeError:
            # Most templates write a tool call's arguments as JSON themselves; some expect them to be JSON already.
            written = _with_written_arguments(chat)
            if written is None:
                raise
            return self._render(written, answer=answer, tagged=tagged)

    def _render(self, chat: Chat, *, answer: bool, tagged: bool) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation, and raise what the template or Jinja raises as a `DataError` or `ModelError`."""
        import jinja2

        source = self._source(chat)
        try:
            return self._apply(source, self._in_form(chat.messages), tools=chat.tools, answer=answer, tagged=tagged)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError("the chat template is not valid Jinja", place=OPTION, got=str(error)) from None
        except (jinja2.TemplateError, TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
            if isinstance(error, TypeError) and _with_written_arguments(chat) is not None:
                raise
            raise DataError("the chat template refuses the messages", place=chat.place, got=str(error)) from None

    def _apply(
        self,
        source: str,
        messages: list[dict[str, Any]],
        *,
        tools: list[Any] | None = None,
        answer: bool = False,
        tagged: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Apply a template to messages in the form that it takes; return the text and, with `tagged`, the tags' offsets."""
        # `apply_chat_template` itself drops keys that are None, and templates test for them.
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise ValueError("no message to render")
        source, times = _at_time(source, _TIME.get())
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=source,
                return_assistant_tokens_mask=tagged,
                add_generation_prompt=answer,
                **self.tokenizer.special_tokens_map,
                **({"rlhf_times": times} if times else {}),
            )
        except Exception as error:
            _clear_frames(error)
            raise
        return texts[0], [(begin, end) for begin, end in spans[0]] if tagged else []


def _clear_frames(error: Exception) -> None:
    """Clear the frames that an error of Jinja came through.

    Jinja makes frames that refer to each other: with them the callers' variables, engines and models among them, would live until
    garbage is collected.
    """
    place = error.__traceback__
    while place is not None:
        frame: FrameType | None = place.tb_frame
        while frame is not None:
            try:
                frame.clear()
            except RuntimeError:  # it is running, and so are its callers
                break
            frame = frame.f_back
        place = place.tb_next
    error.__traceback__ = None


@contextlib.contextmanager
def rendered_at(time: str) -> Iterator[None]:
    """Within this context, give this time to templates that write one, so a run resumed on another day renders as before.

    Args:
        time: in ISO 8601; any other text is ignored.
    """
    try:
        given = datetime.fromisoformat(time).astimezone()
    except (TypeError, ValueError):
        given = None
    token = _TIME.set(given)
    try:
        yield
    finally:
        _TIME.reset(token)


@lru_cache(maxsize=16)
def _at_time(source: str, time: datetime | None) -> tuple[str, dict[str, str]]:
    """Return a template that writes a fixed time, and the variables that it needs: format → time.

    The template is returned unchanged, with no variables, where it writes no time or computes the formats itself.
    """
    formats = {found[1] for found in _FORMATS.findall(source)}
    asks = len(re.findall(r"strftime_now\s*\(", source))
    if time is None or not asks or len(_FORMATS.findall(source)) != asks or source[0].isspace():
        return source, {}
    # A macro of this name hides transformers' function.
    macro = "{% macro strftime_now(format) %}{{ rlhf_times[format] }}{% endmacro %}{{ '' }}"
    return macro + source, {format: time.strftime(format) for format in formats}


def common_prefix(one: str, other: str) -> int:
    """Return the length in characters of the common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def read_template(option: str) -> str:
    """Return the template of `dataset.chat_template`: the option's own text, or that of the name or the file."""
    if "{{" in option or "{%" in option:
        return option
    if option in LAYOUTS:
        return named_template(option)
    path = Path(option).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "neither a Jinja template, nor a template's name, nor a file that can be read",
            place=OPTION,
            got=f"{shortened(option)} ({why})",
            fix=did_you_mean(option, LAYOUTS),
        ) from None


def _check_tokens(name: str, control: ControlTokens, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template by name whose control tokens the tokenizer doesn't have: they would be mere text."""
    tokens = LAYOUTS[name].tokens
    if not tokens and tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no end token, with which the template ends turns", place=OPTION, got=name)
    missing = [token for token in tokens if token not in control.tokens]
    if not missing:
        return
    others = f"take a template that ends turns with the end token: {', '.join(ANYWHERE)}"
    vocabulary = tokenizer.get_vocab()
    if ordinary := [token for token in missing if token in vocabulary]:
        allowed = all(token in map(str, tokenizer.added_tokens_decoder.values()) for token in ordinary)
        named = f"`{ALLOWED}: {json.dumps(ordinary)}` lets every text write them, too; or "
        raise ConfigError(
            f"{_listed(ordinary)} of the template `{name}` are ordinary tokens of the tokenizer, not control tokens",
            place=OPTION,
            got=name,
            fix=(named if allowed else "") + others,
        )
    raise ConfigError(
        f"the tokenizer lacks {_listed(missing)}, which the template `{name}` is made of",
        place=OPTION,
        got=name,
        fix=f"a training adds them by `new_tokens: {json.dumps(missing)}`; or {others}",
    )


def _listed(tokens: Sequence[str]) -> str:
    """Return tokens as messages write them."""
    return ", ".join(f"`{token}`" for token in tokens)


def _parts(content: str | None) -> list[dict[str, str]] | None:
    """Return content as a list of parts, the form that templates of vision models take."""
    if content is None:
        return None
    return [{"type": "text", "text": content}] if content else []


def _with_content(chat: Chat, content: str | None) -> Chat:
    """Return the conversation with each missing content replaced by `content`."""
    messages = [
        {**message, "content": content} if isinstance(message["content"], NoContent) else message
        for message in chat.messages
    ]
    return Chat(messages, chat.tools, chat.mark, chat.place)


def _with_written_arguments(chat: Chat) -> Chat | None:
    """Return the conversation with the arguments of its tool calls written as JSON; None where no arguments are mappings."""
    found = False

    def written(value: Any) -> Any:
        nonlocal found
        if isinstance(value, list):
            return [written(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        out = {key: written(item) if key == "function" else item for key, item in value.items()}
        if isinstance(out.get("arguments"), Mapping):
            found, out["arguments"] = True, json.dumps(out["arguments"], ensure_ascii=False)
        return out

    messages = [
        {**message, "tool_calls": written(message["tool_calls"])} if "tool_calls" in message else message
        for message in chat.messages
    ]
    return Chat(messages, chat.tools, chat.mark, chat.place) if found else None


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with `change` applied to every text in it, keys of mappings included."""
    if isinstance(value, str):
        return change(value) if value else value  # a missing content stays one
    if isinstance(value, Mapping):
        return {change(key) if isinstance(key, str) else key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def texts_in(value: Any) -> list[str]:
    """Return every text in a value, at any depth; keys of mappings are left out."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.items() for text in texts_in(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts_in(item)]
    return []
