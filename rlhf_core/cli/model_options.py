"""Arguments and options of the commands that open one policy: `rlhf chat` and `rlhf serve`."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, an adapter's directory, a run's directory, a GGUF file or a hub name.",
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|float32|bf16|fp16",
        help="Precision of matrix products; auto takes on a GPU the 16 bits that the model was saved in, else float32.",
    ),
]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model's repository ships.")
]
