"""`rlhf serve`: a model behind an OpenAI-compatible address."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_core.cli import METHOD_OPTIONS
from rlhf_core.cli.model_options import ModelArgument, PrecisionOption, TrustRemoteCodeOption
from rlhf_core.cli.printing import print_json_line, print_text
from rlhf_core.cli.quick_imports import no_bars_in_logs, quick_imports
from rlhf_core.infra.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_core.config.training import ModelConfig
    from rlhf_core.generation.sampling_job import SamplingJob
    from rlhf_core.serving.server import PolicyServer, ServerOptions

TOKEN_VARIABLE = "RLHF_SERVE_TOKEN"

_Name = Annotated[
    str | None, typer.Option("--name", help="The model's name in requests; by default the last part of its path.")
]
_Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
_Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any that is free.")]
_TokenFile = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="File with the token that requests bear.")
]
_AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        metavar="NAME",
        help="A name by which others reach this computer; may be repeated. Needed with --host.",
    ),
]
_MaxWaiting = Annotated[
    int,
    typer.Option(
        "--max-waiting",
        min=1,
        help="Most completions that are being drawn or wait for it; further requests get status 429. Larger lets more wait.",
    ),
]
_MaxRows = Annotated[
    int | None,
    typer.Option(
        "--max-rows",
        min=1,
        help="Most completions that are drawn at once; larger is faster in all, slower for each, and needs more memory.",
    ),
]
_Grace = Annotated[
    float, typer.Option("--grace", min=0, help="Seconds that running requests have to end after a signal.")
]
_Sampler = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        metavar="NAME",
        help="Sampler that answers, whole answers alone; then its options and the models of its roles.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print address, name and token as one line of JSON.")]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings=METHOD_OPTIONS)(serve)


def serve(
    context: typer.Context,
    model: ModelArgument,
    name: _Name = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    token_file: _TokenFile = None,
    allowed_host: _AllowedHost = None,
    max_waiting: _MaxWaiting = 256,
    max_rows: _MaxRows = None,
    grace: _Grace = 30.0,
    precision: PrecisionOption = "auto",
    sampler: _Sampler = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    as_json: _Json = False,
) -> None:
    """Serve a model to OpenAI's clients: `rlhf serve runs/sft`, then `OpenAI(base_url=ADDRESS, api_key=TOKEN)`.

    /v1/chat/completions, /v1/completions and /v1/models, with streaming, logprobs, n, stop and seed. All requests are drawn in
    one running batch, which they join and leave at any time. An option that isn't followed is refused by name.

    Every request bears the token that is printed at the start, or that of --token-file or the environment variable
    RLHF_SERVE_TOKEN. Only this computer is listened to unless --host says otherwise.

    With --sampler NAME every request is answered by that sampler, one after the other: `rlhf serve runs/sft --sampler best_of_n
    --reward runs/rm --candidates 8`. `rlhf show sampler:NAME` lists its options and roles; a request's temperature,
    top_p, max_tokens and stop come before them. Streams, logprobs and echo are refused then.

    Ctrl-C or SIGTERM ends it: running requests have --grace seconds to end.
    """
    no_bars_in_logs()
    with quick_imports():
        from rlhf_core.config.training import ModelConfig
        from rlhf_core.registry.plugin_logs import setup_logging
        from rlhf_core.serving.server import ServerOptions, require_serving

        setup_logging()
    require_serving()
    source = ModelConfig(path=model, trust_remote_code=trust_remote_code)
    job = _sampling_job(sampler, source, precision, context.args)
    if job is not None and max_rows is not None:
        raise ConfigError("isn't for a sampler, which makes its own engines", place="--max-rows", fix="leave it out")
    options = ServerOptions(
        name=name or Path(model).name,
        host=host,
        port=port,
        token=_token(token_file),
        allowed_hosts=allowed_host or [],
        most_waiting=max_waiting,
        grace=grace,
    )
    if job is None:
        server = _policy_server(source, options, precision=precision, max_rows=max_rows)
    else:
        server = _sampler_server(job, options)
    _print_address(server, as_json=as_json)
    server.run()


def _sampling_job(name: str | None, model: ModelConfig, precision: str, flags: list[str]) -> SamplingJob | None:
    """Return the sampler with its options and roles as a job; None where none is asked for.

    Raises:
        ConfigError: there is no such sampler or option, a role's model is missing, or a flag has no meaning for a server.
    """
    from rlhf_core.config.flags import lex
    from rlhf_core.config.sampling_run import POLICY, SamplingRunConfig
    from rlhf_core.generation.sampling_job import load_sampling_job
    from rlhf_core.registry.method_or_file import COMMAND_LINE, GivenValues

    if name is None:
        if flags:
            fix = "see `rlhf serve --help`; a sampler's options follow `--sampler NAME`"
            raise ConfigError("unknown option", place=COMMAND_LINE, got=f"`{flags[0]}`", fix=fix)
        return None
    for flag in lex(flags):
        if flag.key.partition(".")[0] in SamplingRunConfig.model_fields:
            fix = "leave it out: prompts, `n` and seeds are those of each request"
            raise ConfigError("isn't for a server", place=flag.typed, fix=fix)
    values = {"method": name, "model": model.model_dump(), "prompts": ["those of requests"], "precision": precision}
    job = load_sampling_job(GivenValues(values, {"": COMMAND_LINE, "method": "--sampler"}), flags=flags)
    if POLICY not in job.roles:
        problem = "the sampler has no policy that could be served"
        raise ConfigError(problem, place="--sampler", got=f"`{name}`", fix="take another sampler")
    return job


def _policy_server(model: ModelConfig, options: ServerOptions, *, precision: str, max_rows: int | None) -> PolicyServer:
    """Return a server that draws all requests with the model in one running batch."""
    from rlhf_core.cli.model_argument import check_model, open_policy
    from rlhf_core.generation.engine import Engine
    from rlhf_core.serving.server import PolicyServer

    check_model(model.path)
    policy = open_policy(model, precision=precision)
    return PolicyServer(policy, options, engine=Engine(policy, most_rows=max_rows))


def _sampler_server(job: SamplingJob, options: ServerOptions) -> PolicyServer:
    """Return a server whose requests a sampler answers, with its models loaded."""
    from rlhf_core.cli.model_argument import check_model, open_policy
    from rlhf_core.serving.server import PolicyServer

    rewards = job.rewards()
    for model in (model for models in job.policies().values() for model in models):
        check_model(model.path)
    models = job.loaded_with(lambda model: open_policy(model, precision=job.run.precision))
    sampler = job.sampler(job.options, **models, **rewards)
    return PolicyServer(sampler.policy, options, sampler=sampler)


def _print_address(server: PolicyServer, *, as_json: bool) -> None:
    """Print where a server is reached, under which name, and with which token."""
    if as_json:
        return print_json_line({"url": server.url, "model": server.name, "token": server.token})
    print_text(f"model: {server.name}")
    print_text(f"address: {server.url}")
    print_text(f"token: {server.token}")
    return None


def _token(file: Path | None) -> str | None:
    """Return the token that was given, in a file or the environment; None where none was.

    It is no argument: others see a program's arguments.

    Raises:
        ConfigError: both are given, or the file can't be read or is empty.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if file is None:
        return given or None
    if given:
        raise ConfigError(f"{TOKEN_VARIABLE} is set, too", place="--token-file", fix="give one of them")
    try:
        text = file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the file can't be read", place=f"--token-file {file}", got=str(error)) from None
    if not text:
        raise ConfigError("the file is empty", place=f"--token-file {file}", fix="write the token into it")
    return text
