"""The chat template of a merged model, where one is asked for: by name, as text, or the one that most input models have."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlhf_core.infra.errors import ConfigError, did_you_mean, shortened
from rlhf_core.infra.files import read_json, replace_file, to_json
from rlhf_core.merging.input_model import InputModel

AUTO = "auto"
FILE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' ~ message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
# A system prompt comes before the first user's text, inside its brackets.
_MISTRAL = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] ~ '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ '[INST] ' ~ ns.system ~ message['content'] ~ ' [/INST]' }}
{%- set ns.system = '' -%}
{%- else -%}
{{ ' ' ~ message['content'] ~ eos_token }}
{%- endif -%}
{%- endfor -%}
"""
_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] ~ '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ '### Instruction:\\n' ~ message['content'] ~ '\\n\\n' }}
{%- else -%}
{{ '### Response:\\n' ~ message['content'] ~ eos_token ~ '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""
_EXAONE = """\
{%- for message in messages -%}
{{ '[|' ~ message['role'] ~ '|]' ~ message['content'] ~ ('\\n' if message['role'] == 'user' else '[|endofturn|]\\n') }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}
"""
NAMED = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
"""Templates by the names that mergekit has for them."""


def check(given: str) -> None:
    """Raise ConfigError where a template is neither a known name nor a Jinja text."""
    import jinja2

    if given == AUTO or given in NAMED:
        return
    if "{" not in given:
        raise ConfigError(
            "unknown chat template",
            place="chat_template",
            got=shortened(given),
            fix=did_you_mean(given, [AUTO, *NAMED]) + ", or write the Jinja template itself",
        )
    # transformers adds a tag, around the text whose tokens are in the loss.
    plain = given.replace("endgeneration", "endif").replace("generation", "if true")
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            given if "generation %}" not in given else plain
        )
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            "is not a Jinja template", place="chat_template", got=f"line {error.lineno}: {error}"
        ) from None


def chosen(given: str, models: Sequence[InputModel]) -> str | None:
    """Return the text of a template.

    Args:
        given: a name, `auto` or the text itself.
        models: for `auto` the models to choose from: the template that most have, the first one's where several are as common.

    Returns:
        None for `auto` where no model has a template.
    """
    if given != AUTO:
        return NAMED.get(given, given)
    found = [text for one in models if (text := _template_of(one)) is not None]
    return Counter(found).most_common(1)[0][0] if found else None


def write(path: Path, text: str) -> None:
    """Write a template into a model directory, in place of the one in any of its files."""
    replace_file(path / FILE, text.encode())
    (path / "chat_template.json").unlink(missing_ok=True)
    settings = path / _SETTINGS
    if settings.is_file():
        described = read_json(settings)
        if isinstance(described, dict) and described.pop("chat_template", None) is not None:
            replace_file(settings, to_json(described))


def _template_of(one: InputModel) -> str | None:
    """Return a model's template, from a file for it or from the tokenizer's configuration; None where it has none."""
    for place in one.directories:
        if (place / FILE).is_file():
            return (place / FILE).read_text(encoding="utf-8")
        if (place / _SETTINGS).is_file():
            try:
                text = json.loads((place / _SETTINGS).read_bytes()).get("chat_template")
            except (ValueError, AttributeError):
                text = None
            if isinstance(text, list):  # several by name
                text = next((entry.get("template") for entry in text if entry.get("name") == "default"), None)
            if isinstance(text, str):
                return text
    return None
