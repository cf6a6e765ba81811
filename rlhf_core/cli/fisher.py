"""`rlhf fisher`: what an earlier task needs of a model's weights, for runs that hold on to it (`ewc`)."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_core.cli import METHOD_OPTIONS
from rlhf_core.cli.printing import print_json, print_text
from rlhf_core.cli.quick_imports import quick_imports

_Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="The model that the task trained: a directory, an adapter, or a hub name."),
]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(fisher)


def fisher(
    context: typer.Context,
    model: _Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print how it was computed as JSON.")] = False,
) -> None:
    """Compute the diagonal Fisher information of a model on rows of a task: `rlhf fisher MODEL --data ROWS --output DIR`.

    A run with `--ewc.fisher DIR --ewc.weight W` then changes the weights that the task needs less. --data takes rows with prompts
    and responses, as `rlhf train sft` does. Further: --labels sampled|data (the true or the empirical Fisher information),
    --samples (draws per row), --limit (rows), --seed, --max-length, and --dataset.OPTION, as in training.
    """
    from rlhf_core.config.fisher_options import FisherConfig, FisherRunConfig
    from rlhf_core.config.flags import convert, lex
    from rlhf_core.config.yaml_file import nest

    values, places = convert(lex(context.args), FisherRunConfig, owner="fisher")
    run = FisherRunConfig.parse(nest(values), place=places | {"": "command line"})
    with quick_imports():
        from rlhf_core.improvement.elastic_weight_consolidation import ElasticWeightConsolidation
        from rlhf_core.registry.plugin_logs import setup_logging

        setup_logging()
    options = {name: getattr(run, name) for name in FisherConfig.model_fields if name in run.model_fields_set}
    found = ElasticWeightConsolidation.estimate(model, run.data, run.output, **options)
    about = {**found.information.about, "output": str(found.path)}
    if as_json:
        return print_json(about)
    draws = "drawn by the model" if about["labels"] == "sampled" else "of the rows"
    print_text(f"{about['rows']:,} rows, {about['tokens']:,} response tokens, labels {draws}: {found.path}")
    print_text(f"hold on to it: rlhf train METHOD … --ewc.fisher {found.path} --ewc.weight WEIGHT")
    return None
