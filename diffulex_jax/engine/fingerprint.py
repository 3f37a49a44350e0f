"""What must agree for a snapshot to be continued: the model, the geometry of the state, and the very rule that decodes it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffulex_jax.strategies import Strategy


def strategy_id(strategy: Strategy) -> str:
    """The strategy's name and a digest of how it decodes: of its rule, draws and confidence.

    The digest is the same in every process for the same code and parameters. It tells rules of one name apart by the functions they
    are made of, the values those close over, and for functions that are not this package's own by their bytecode as well.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in _parts((strategy.rule, strategy.draws, strategy.confidence), frozenset()):
        digest.update(part.encode() + b"\0")
    return f"{strategy.name}#{digest.hexdigest()}"


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Names what differs first between two fingerprints, and both values; empty where nothing does."""
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            return f"{name}={theirs.get(name)!r}; this engine has {name}={ours.get(name)!r}"
    return ""


def _parts(value: Any, above: frozenset[int]) -> Iterator[str]:
    """A text for everything that ``value`` is made of; ``above`` holds what it is a part of, for values that contain themselves."""
    if id(value) in above:
        return
    above = above | {id(value)}
    yield type(value).__qualname__
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            yield repr(value)
        case types.ModuleType() | types.BuiltinFunctionType() | type():
            yield getattr(value, "__qualname__", value.__name__)
        case types.FunctionType():
            yield from _function(value, above)
        case types.MethodType():
            yield from _all(above, value.__func__, value.__self__)
        case functools.partial():
            yield from _all(above, value.func, value.args, value.keywords)
        case types.CodeType():
            yield from _all(above, value.co_code, value.co_names, value.co_varnames, value.co_consts)
        case Mapping():
            for key in sorted(value, key=repr):
                yield from _all(above, key, value[key])
        case set() | frozenset():
            yield from _all(above, *sorted(value, key=repr))
        case tuple() | list():
            yield from _all(above, *value)
        case np.ndarray() | np.generic() | jax.Array():
            array = np.asarray(value)
            yield from _all(above, str(array.dtype), array.shape, array.tobytes())
        case _ if hasattr(value, "__wrapped__"):  # a jitted function
            yield from _parts(value.__wrapped__, above)
        case _:
            yield type(value).__module__
            call = inspect.getattr_static(type(value), "__call__", None)  # what it does when called is its class's
            yield from _all(above, getattr(value, "__dict__", None), call if isinstance(call, types.FunctionType) else None)


def _all(above: frozenset[int], *values: Any) -> Iterator[str]:
    for value in values:
        yield from _parts(value, above)


def _function(function: types.FunctionType, above: frozenset[int]) -> Iterator[str]:
    package = _package(function)
    yield from (str(function.__module__), function.__qualname__)
    closed_over = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    yield from _all(above, function.__defaults__, function.__kwdefaults__, closed_over)
    if package in _OURS:
        return
    yield from _parts(function.__code__, above)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        theirs = isinstance(value, types.FunctionType) and _package(value) == package
        if theirs or isinstance(value, (bool, int, float, str, tuple)):
            yield name
            yield from _parts(value, above)


def _package(function: types.FunctionType) -> str:
    return str(function.__module__).partition(".")[0]  # of code that was given to exec() the module is None


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that ``code``, or a function inside it, may look up in its module."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


_OURS = ("diffulex_jax", "pallas_kernels")
