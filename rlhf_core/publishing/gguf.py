"""GGUF files by llama.cpp's converter, `convert_hf_to_gguf.py`, where it is installed.

It is looked for at the path that is given, then at the environment's `RLHF_GGUF_CONVERTER`, then on the PATH under the names that
llama.cpp's packages give it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rlhf_core.infra.errors import ConfigError, ModelError, StorageError, did_you_mean, printable

VARIABLE = "RLHF_GGUF_CONVERTER"
SCRIPT = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")
"""What the converter writes; smaller types are made from its files by `llama-quantize`."""
_ON_PATH = (SCRIPT, "convert_hf_to_gguf", "convert-hf-to-gguf", "convert-hf-to-gguf.py")
_SHOWN = 4
"""Last lines of the converter's output that a message quotes."""


def check_type(name: str) -> str:
    """Return a type of GGUF weights as the converter spells it.

    Raises:
        ConfigError: it doesn't write that type.
    """
    kind = {"fp16": "f16", "float16": "f16", "fp32": "f32", "float32": "f32", "bfloat16": "bf16"}.get(
        name.casefold(), name.casefold()
    )
    if kind in TYPES:
        return kind
    if kind.startswith(("q2", "q3", "q4", "q5", "q6", "iq")):
        fix = f"`--gguf f16`, then llama.cpp's `llama-quantize FILE-f16.gguf FILE-{kind}.gguf {kind.upper()}`"
        raise ConfigError("the converter doesn't write this type", place="--gguf", got=f"`{name}`", fix=fix)
    raise ConfigError("unknown type of GGUF weights", place="--gguf", got=f"`{name}`", fix=did_you_mean(kind, TYPES))


def find_converter(given: str | Path | None = None) -> Path | None:
    """Return llama.cpp's converter, or None where it isn't installed.

    Args:
        given: the script, or llama.cpp's directory; None looks where the environment says, and on the PATH.

    Raises:
        ConfigError: what is given, or what the environment names, isn't there.
    """
    for place, name in (("--converter", given), (VARIABLE, os.environ.get(VARIABLE))):
        if not name:
            continue
        path = Path(name).expanduser()
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            fix = f"give the path of llama.cpp's {SCRIPT}, or of the directory that holds it"
            raise ConfigError("there is no converter", place=place, got=str(path), fix=fix)
        return path.resolve()
    found = next((where for name in _ON_PATH if (where := shutil.which(name))), None)
    return Path(found) if found is not None else None


def command(converter: Path | None, model: Path, target: Path, kind: str) -> list[str]:
    """Return the command that converts a model's directory; without a converter, as a user would type it in llama.cpp's."""
    if converter is None:
        start = ["python", SCRIPT]
    else:
        start = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    return [*start, str(model), "--outfile", str(target), "--outtype", kind]


def not_installed(model: Path, target: Path, kind: str) -> ConfigError:
    """Return the error where there is no converter, with the command to run; the model itself has been exported."""
    wanted = shlex.join(command(None, model.resolve(), target.resolve(), kind))
    return ConfigError(
        f"the model is exported, and not converted: llama.cpp's {SCRIPT} isn't installed",
        place="--gguf",
        fix=f"in llama.cpp's directory run `{wanted}`, or name its script by --converter or {VARIABLE}",
    )


def convert(converter: Path, model: Path, target: Path, kind: str) -> Path:
    """Convert a model's directory to a GGUF file, which appears whole.

    Raises:
        ModelError: the converter failed; its last lines are quoted.
        StorageError: it can't be started, or wrote nothing.
    """
    partial = target.with_name(f".{target.name}.tmp")
    try:
        done = subprocess.run(
            command(converter, model, partial, kind),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        if done.returncode:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()][-_SHOWN:]
            raise ModelError(
                "llama.cpp's converter failed; the model itself is exported",
                place=str(model),
                got=printable(" | ".join(lines))[-400:] or f"exit code {done.returncode}",
                fix=f"see what it says: `{shlex.join(command(converter, model, target, kind))}`",
            )
        if not partial.is_file():
            raise StorageError("llama.cpp's converter ended well, and wrote no file", place=str(target))
        partial.replace(target)
    except OSError as error:
        raise StorageError("the converter can't be started", place=str(converter), got=error.strerror) from error
    finally:
        partial.unlink(missing_ok=True)
    return target
