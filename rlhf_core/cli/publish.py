"""`rlhf export` and `rlhf push`: a trained model as a directory of its own, as GGUF, or on the hub."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rlhf_core.cli.printing import print_json, print_text
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.files import readable_size


class _Dtype(StrEnum):
    float32 = "float32"
    bf16 = "bf16"
    fp16 = "fp16"


_Source = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's directory, a checkpoint in it, an adapter, or a model's directory."),
]
_Finished = Annotated[
    str, typer.Argument(metavar="RUN", help="A finished run's directory, an adapter, or a model's directory.")
]
_Output = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A new directory; without it exports/NAME in the current one.")
]
_Merged = Annotated[bool, typer.Option("--merged", help="Fold an adapter into its base, for a whole model.")]
_OutDtype = Annotated[_Dtype | None, typer.Option(help="Dtype of the written weights; without it the model's.")]
_Gguf = Annotated[
    bool,
    typer.Option("--gguf", help="Write a GGUF file too, by llama.cpp's converter; a type may follow: `--gguf q8_0`."),
]
_Converter = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py; without it that of RLHF_GGUF_CONVERTER, or of PATH."
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Name on the hub of an adapter's base, in place of a local path."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings={"allow_extra_args": True, "help_option_names": ["--help", "-h"]})(export)
    app.command()(push)


def export(
    context: typer.Context,
    source: _Source,
    output: _Output = None,
    merged: _Merged = False,
    dtype: _OutDtype = None,
    gguf: _Gguf = False,
    converter: _Converter = None,
    base: _Base = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export in --output.")] = False,
    as_json: _Json = False,
) -> None:
    """Export a trained model: `rlhf export runs/dpo --merged --dtype bf16 --output DIR`, or `rlhf export runs/dpo --gguf q8_0`.

    DIR is then a plain Hugging Face directory with a model card. --merged folds an adapter as `rlhf merge` does, with a few
    tensors in memory; --gguf folds it too. Without llama.cpp's converter --gguf exports the model, prints the command to run,
    and exits with 2. The types of --gguf are f16 (the default), bf16, f32, q8_0, tq1_0, tq2_0 and auto.
    """
    kind = _gguf_type(context.args, gguf)
    if converter is not None and not gguf:
        raise ConfigError("there is nothing to convert without `--gguf`", place="--converter", fix="add `--gguf`")
    no_bars_in_logs()
    with quick_imports():
        from rlhf_core.infra.progress import ByteBar
        from rlhf_core.publishing.export_model import export_model
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
    with ByteBar("folding") as bar:
        result = export_model(
            source, output, merged=merged, dtype=None if dtype is None else dtype.value, gguf=kind,
            converter=converter, base=base, overwrite=overwrite, progress=bar,
        )  # fmt: skip
    if as_json:
        return print_json({**vars(result)})
    what = "adapter" if result.adapter else "model"
    print_text(f"{what}: {result.output}  {readable_size(result.bytes)}, {result.seconds:.1f} s")
    if result.gguf is not None:
        print_text(f"gguf: {result.gguf}  {readable_size(result.gguf.stat().st_size)}")
    return None


def _gguf_type(words: list[str], wanted: bool) -> str | None:
    """Return the type that `--gguf` asks for. Raises ConfigError for words that belong to nothing."""
    if words and not (wanted and len(words) == 1):
        raise ConfigError(
            "unexpected argument",
            place="command line",
            got=f"`{words[1 if wanted else 0]}`",
            fix="see `rlhf export --help`",
        )
    return (words[0] if words else "f16") if wanted else None


def push(
    source: _Finished,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub, made where need be.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make it private; one that is public already is refused.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to upload to, made where need be.")
    ] = None,
    base: _Base = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Message of the commit.")] = None,
    as_json: _Json = False,
) -> None:
    """Upload a model with its card to the Hugging Face hub: `rlhf push runs/dpo me/my-model --private`.

    The token is that of `hf auth login` or HF_TOKEN; HF_ENDPOINT names another hub. A README.md there that isn't one of our
    cards is kept. To push a folded or converted model, push what `rlhf export` wrote.
    """
    no_bars_in_logs()
    with quick_imports():
        from rlhf_core.publishing.export_model import push_to_hub
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
    address = push_to_hub(source, repo, private=private, revision=revision, base=base, message=message)
    if as_json:
        return print_json({"pushed": address})
    return print_text(f"pushed: {address}")
