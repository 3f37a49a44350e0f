"""Model directories that hold parameters as devices had them, for fast restarts: Orbax reads and writes each device's part by itself.

Such a directory has ``placed.json`` and ``placed/`` in place of safetensors; all else, ``config.json`` and the tokenizer, is as ever.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffulex_jax.errors import SettingError
from diffulex_jax.models.base import Model, Params
from diffulex_jax.parallel import hosts
from diffulex_jax.weights.folder import INDEX, SINGLE, read_json
from diffulex_jax.weights.quantise import form_of, placement, store
from pallas_kernels import Kernels
from pallas_kernels.quantised import FORMS, Form


FACTS, ARRAYS = "placed.json", "placed"
_MISSING = "keeping what devices hold needs Orbax: pip install 'diffulex-jax[orbax]'"


def is_placed(path: pathlib.Path) -> bool:
    """Whether a model directory is one of these."""
    return (path / FACTS).is_file()


def save(path: str | pathlib.Path, model: Model, params: Params, *, kernels: Kernels) -> None:
    """Writes ``params`` as they are, quantised or not, each host the parts of its own devices. Of several hosts all call it, and see
    the same disk.

    ``Engine.from_pretrained(path)`` reads them onto any mesh that the model can be split over.

    Args:
      path: of a directory that does not exist yet, or holds no parameters.
      model: the network.
      params: its parameters, as ``checkpoint.load`` or ``init`` made them.
      kernels: what they were made for, which says how quantised ones lie.

    Raises:
      ImportError: where Orbax is not installed.
      ValueError: where the directory holds parameters already.
    """
    tool, path = check(path), pathlib.Path(path).absolute()
    dtype = np.dtype(params["embed"].dtype).name
    facts = {"dtype": dtype, "weights": form_of(params), "kernels": kernels.grouped_matmul}
    with tool.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / ARRAYS, _flat(params))
    if hosts.leads():
        (path / "config.json").write_text(json.dumps(model.config.to_hf(dtype=dtype), indent=2) + "\n")
        (path / FACTS).write_text(json.dumps(facts, indent=2) + "\n")  # last: then all is there


def check(path: str | pathlib.Path) -> Any:
    """Orbax, if it is there and :func:`save` can write to ``path``; raises what that does."""
    path = pathlib.Path(path)
    names = (FACTS, ARRAYS, SINGLE, INDEX)
    taken = next((name for name in names if (path / name).exists()), None)
    if taken is not None:
        raise ValueError(f"{path} holds parameters already ({taken}); choose another directory")
    return orbax()


def restore(path: pathlib.Path, model: Model, mesh: Mesh, *, dtype: Any, weights: Form | None, kernels: Kernels) -> Params:
    """What :func:`save` wrote, on ``mesh``: a host reads the parts of its own devices.

    Args:
      path: the directory.
      model: its network.
      mesh: where the parameters go, whatever they lay on before.
      dtype: of all parameters but those whose :class:`Param` names another.
      weights: the form of quantised ones, or None: as they are.
      kernels: the machine's.

    Raises:
      ImportError: where Orbax is not installed.
      ValueError: where the directory is not whole, or holds them in another form than is asked for, naming it.
    """
    tool, facts = orbax(), read_json(path / FACTS)
    form, kind, made_for = (facts.get(name) for name in ("weights", "dtype", "kernels"))
    if form not in (None, *FORMS) or not isinstance(kind, str):
        raise ValueError(f"{path / FACTS} does not say what {ARRAYS} holds; make the directory anew")
    if weights not in (None, form):
        raise SettingError("weights", f"weights={weights!r}, but {path} holds {form or kind}; leave it out, or load the original")
    if form is not None and made_for != kernels.grouped_matmul:
        here = kernels.grouped_matmul
        raise ValueError(
            f"{path}: its {form} weights lie as the {made_for!r} kernels read them, not as the {here!r} ones of this machine do"
        )
    if form is not None and jnp.dtype(kind) != dtype:
        raise SettingError("dtype", f"dtype={jnp.dtype(dtype).name!r}, but {path} holds {form} weights for {kind}; set dtype={kind!r}")

    def wanted(param: Any) -> Any:
        leaf = jax.ShapeDtypeStruct(param.shape, param.dtype or dtype)
        keep = store(param, form, kernels=kernels, dtype=dtype, mesh=mesh)
        made = leaf if keep is None else jax.eval_shape(keep, leaf)
        return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), made, placement(mesh, param, made))

    shapes = jax.tree.map(wanted, model.schema, is_leaf=lambda node: not isinstance(node, dict))
    try:
        with tool.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(path.absolute() / ARRAYS, _flat(shapes))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / ARRAYS} does not hold the parameters of this model whole: {error}") from error
    return jax.tree.unflatten(jax.tree.structure(shapes), [found[name] for name in _flat(shapes)])


def copy_beside(source: pathlib.Path, path: pathlib.Path) -> None:
    """Copies what stands beside the parameters of a model directory: its tokenizer, chat template and the like."""
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(".index.json"):
            if not (path / file.name).exists():
                shutil.copyfile(file, path / file.name)


def _flat(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their path: ``"moe.experts_down.0"``."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def orbax() -> Any:
    """``orbax.checkpoint``.

    Raises:
      ImportError: where it is not installed, saying how it is.
    """
    try:
        import orbax.checkpoint as found
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return found
