"""Settings as options, and help that is whole: every option by its full name, in groups, in plain text."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any

import typer
import typer.core

from diffulex_jax.engine.messages import check_text
from diffulex_jax.sampling_params import SamplingParams


Command = Callable[..., None]

STRATEGY_NAMES = (
    *("llada2", "multi_bd", "d2f", "llada2_edit", "llada2_levenshtein", "dmax"),
    *("sdar", "sdar_leftmost", "sdar_sequential", "sdar_entropy", "fast_dllm_v2"),
    *("llada", "llada_random", "llada_threshold", "llada_factor"),
    *("dream", "dream_maskgit_plus", "dream_topk_margin", "dream_origin", "dream_threshold"),
)
"""The names in ``strategies.STRATEGIES``, whose module takes JAX to import."""

SHAPE_NAMES = (
    *("tiny", "cpu-131m", "llada2-mini", "llada2-flash", "sdar-1.7b", "sdar-4b", "sdar-8b", "sdar-30b-a3b"),
    *("fast-dllm-v2-1.5b", "fast-dllm-v2-7b", "llada-8b", "llada-moe-7b-a1b", "dream-7b"),
)
"""The names in ``bench.shapes.SHAPES``, likewise."""

SUITE_NAMES = ("words", "arithmetic", "copy", "insert", "remove", "replace", "reverse", "sort", "shuffle")
"""The names in ``evaluation.suites.GENERATED``, likewise."""

# What several commands say in the same words.
Model = Annotated[str, typer.Option(help="A Hugging Face directory, a hub id, or 'embedded'.")]
Mesh = Annotated[
    str | None,
    typer.Option(help="How devices share the work: data=2,expert=2,tensor=2. Default: one device.", rich_help_panel="The engine"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
STRATEGIES = f"{', '.join(STRATEGY_NAMES)}, or the import path of one of your own, my_module:my_rule"
USUAL = "Default: the one that the model's authors decode it with."

# Settings that every language model has. All others of SamplingParams say how the canvas is denoised.
_REQUEST = {
    *("max_tokens", "temperature", "top_p", "top_k", "seed", "n", "stop", "stop_token_ids", "ignore_eos", "min_tokens"),
    *("logprobs", "return_step_map", "cache_salt", "adapter_name"),
}
_PANELS = {"EngineConfig": "The engine", "ServerSettings": "The server", "Load": "The load", "Watch": "The engine's process"}
_ORDER = (
    "Arguments",
    "Options",
    "Changes to the recipe",
    "Adapters",
    "The request",
    "Decoding",
    "The engine",
    "The engine's process",
    "Several hosts",
    "The server",
    "The load",
)


def tokens_by_offset(text: str) -> dict[int, int]:
    """``0:262,5:451`` as ``{0: 262, 5: 451}``."""
    try:
        return {int(offset): int(token) for offset, token in (pair.split(":") for pair in text.split(","))}
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not OFFSET:TOKEN_ID,...") from None


def folders_by_name(text: str) -> dict[str, str]:
    """``math=tuned/math,code=tuned/code`` as ``{"math": "tuned/math", "code": "tuned/code"}``."""
    folders: dict[str, str] = {}
    for pair in text.split(","):
        name, _, folder = pair.partition("=")
        if not name or not folder:
            raise typer.BadParameter(f"{text!r} is not NAME=DIR,...")
        if name in folders:
            raise typer.BadParameter(f"{text!r} says {name!r} twice")
        folders[name] = folder
    return folders


# The types that become options, each with the type and the details of its option.
_OPTION_TYPES: dict[Any, tuple[Any, dict[str, Any]]] = {
    str: (str, {}),
    int: (int, {}),
    float: (float, {}),
    bool: (bool, {}),
    int | None: (int | None, {}),
    float | None: (float | None, {}),
    str | None: (str | None, {}),
    tuple[int, ...]: (list[int], {}),
    tuple[str, ...]: (list[str], {}),
    Mapping[int, int] | None: (dict | None, {"parser": tokens_by_offset, "metavar": "OFFSET:TOKEN_ID,..."}),
    Mapping[str, str] | None: (dict | None, {"parser": folders_by_name, "metavar": "NAME=DIR,..."}),
}


def settings_as_options(*sources: type, leave_out: Collection[str] = (), **defaults: Any) -> Callable[[Command], Command]:
    """Replaces the ``**settings`` of a command by one option for each setting of ``sources``, so that none can be missing.

    Args:
      *sources: dataclasses; their fields of the types above become options. The help of an option is the field's entry in the
        docstring.
      leave_out: settings that do not become options.
      **defaults: defaults that differ from those of the source.
    """
    options = []
    for source in sources:
        hints, docs = typing.get_type_hints(source), _entries(inspect.getdoc(source) or "")
        for name, parameter in inspect.signature(source).parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY or hints[name] not in _OPTION_TYPES or name in leave_out:
                continue
            kind, details = _OPTION_TYPES[hints[name]]
            default, flag = defaults.get(name, parameter.default), f"--{name.replace('_', '-')}"
            if default is True:
                flag += f"/--no{flag[1:]}"
            option = typer.Option(flag, help=docs[name], rich_help_panel=_panel(source, name), **details)
            options.append(parameter.replace(annotation=Annotated[kind, option], default=default))

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [p for p in own if p.kind is not p.VAR_KEYWORD]
        vars(command)["__signature__"] = inspect.Signature([*kept, *options])
        return command

    return decorate


def split(settings: dict[str, Any]) -> tuple[SamplingParams, dict[str, Any]]:
    """A request's settings, and the rest."""
    mine = {field.name for field in dataclasses.fields(SamplingParams)}
    return SamplingParams(**{k: v for k, v in settings.items() if k in mine}), {k: v for k, v in settings.items() if k not in mine}


def numbers(option: str, text: str) -> list[int]:
    """``1,8,32`` as numbers.

    Raises:
      ValueError: naming the option.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be integers separated by commas, got {text!r}") from None


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line on stderr and exit code 2 where an input will not do."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _NO_BACKEND not in str(error):
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


_NO_BACKEND = "Unable to initialize backend"  # JAX_PLATFORMS names a device that is not here


class PlainCommand(typer.core.TyperCommand):
    """A command whose help lists options in groups, and whose arguments must be text."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with one_line_errors():
            for argument in args:
                check_text("an argument", argument)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                record = re.sub(r"<list\[(\w+)\]>", r"<\1>", record[0]), record[1]
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for title in sorted(groups, key=_ORDER.index):
            with formatter.section(title):
                formatter.write_dl(groups[title])


def _panel(source: type, name: str) -> str:
    if source is SamplingParams:
        return "The request" if name in _REQUEST else "Decoding"
    return _PANELS[source.__name__]


def _entries(doc: str) -> dict[str, str]:
    """The ``name: text`` entries of a docstring's sections."""
    found = re.findall(r"^  (\w+): (.+(?:\n    .+)*)", doc, re.MULTILINE)
    plain = {name: " ".join(text.replace("``", "").split()) for name, text in found}
    return {name: text[0].upper() + text[1:] for name, text in plain.items()}
