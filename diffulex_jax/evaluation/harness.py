"""A model for lm-evaluation-harness (lm-eval 0.4), under the name ``diffulex_jax``.

lm-eval finds models that are registered before its command line runs, and has no other way to find them by name:

    python -m diffulex_jax.evaluation.harness --model diffulex_jax --model_args model=embedded,strategy=dmax --tasks gsm8k

is ``lm_eval`` with this model registered; in Python call :func:`register` first. ``--model_args`` are settings of the engine and of
requests, and ``estimator`` and ``samples``.

**Log-likelihoods** are estimates; see ``engine.scoring``. ``estimator=block`` (the default) takes the tokens of a block to be independent
given the clean past: quick and without chance, and no bound. ``estimator=monte_carlo`` estimates a lower bound, LLaDA's likelihood, by
``samples`` forwards (32). Compare models by one of them only.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.engine import Engine
from diffulex_jax.engine.scoring import BlockConditional, Estimator, MonteCarlo
from diffulex_jax.sampling_params import SamplingParams


_logger = logging.getLogger(__name__)
_ESTIMATORS = ("block", "monte_carlo")
_OF_GENERATION = ("until", "max_gen_toks", "do_sample")  # lm-eval's names, beside those of SamplingParams
_USUAL_TOKENS = 256  # lm-eval's own default


class DiffusionModel:
    """What lm-eval asks of a model. Requests have ``args``: ``(context, continuation)``, ``(text,)``, ``(context, settings)``."""

    def __init__(
        self,
        *,
        model: str | None = None,
        pretrained: str | None = None,
        estimator: str = "block",
        samples: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        engine: Engine | None = None,
        **settings: Any,
    ):
        """Loads a model.

        Args:
          model, pretrained: a Hugging Face directory, a hub id, or ``"embedded"``; one of the two names.
          estimator: ``"block"`` or ``"monte_carlo"``.
          samples: of ``"monte_carlo"``.
          batch_size: lm-eval's; a number is the engine's ``max_slots`` where ``settings`` name none.
          max_batch_size, device: lm-eval passes them; the engine batches by itself, on JAX's default device.
          engine: one that is built, in the place of ``model`` and its settings.
          **settings: of ``EngineConfig``, ``strategy``, ``mesh``, and of ``SamplingParams`` for what is generated.

        Raises:
          ValueError: for a setting that will not do.
        """
        del max_batch_size, device
        super().__init__()
        if estimator not in _ESTIMATORS:
            raise ValueError(f"estimator={estimator!r} must be one of {', '.join(_ESTIMATORS)}")
        if samples is not None and estimator == "block":
            raise ValueError(f"samples={samples} is for estimator=monte_carlo")
        self.estimator: Estimator = BlockConditional() if estimator == "block" else MonteCarlo(samples=32 if samples is None else samples)
        mine = {field.name for field in dataclasses.fields(SamplingParams)}
        self.params = SamplingParams(**{name: value for name, value in settings.items() if name in mine})
        rest = {name: value for name, value in settings.items() if name not in mine}
        if engine is None:
            if (name := model or pretrained) is None:
                raise ValueError("say which model: --model_args model=DIRECTORY")
            known = {field.name for field in dataclasses.fields(EngineConfig)} | {"strategy", "mesh"}
            if unknown := set(rest) - known:
                raise ValueError(f"--model_args: {min(unknown)} is a setting of neither the engine nor requests")
            if str(batch_size).isdecimal():
                rest = {"max_slots": int(batch_size or 0)} | rest
            engine = Engine.from_pretrained(name, warm_up=False, **rest)
        elif rest:
            raise ValueError(f"{min(rest)}={rest[min(rest)]!r} is of no use beside engine=")
        if engine.tokenizer is None:
            raise ValueError("the model has no tokenizer; lm-eval asks with texts")
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.most = engine.settings.max_model_len

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, cut at the texts of ``until``.

        Raises:
          ValueError: for a setting of generation that is unknown here, naming it.
        """
        prompts, params, cut = [], [], 0
        for context, asked in (request.args for request in requests):
            one, prompt = self._params(asked), self.tokenizer.encode(context)
            if "max_gen_toks" not in asked and "max_tokens" not in asked:
                one = dataclasses.replace(one, max_tokens=max(1, min(one.max_tokens, self.most - len(prompt))))
            room = max(1, self.most - one.max_tokens)
            cut += len(prompt) > room
            prompts.append(prompt[-room:])  # lm-eval's way with long few-shot prompts: the end of it counts
            params.append(one)
        if cut:
            _logger.warning(
                "%d of %d contexts lost their beginning: max_model_len=%d, less what is generated", cut, len(prompts), self.most
            )
        return [output.text or "" for output in self.engine.generate(prompts, params, progress=not disable_tqdm)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log probability of each continuation behind its context, and whether greedy decoding of so many tokens gives it."""
        pairs = [self._pair(*request.args) for request in requests]
        scores = self._score(pairs, progress=not disable_tqdm)
        greedy = [(tuple(context), len(rest)) for context, rest in pairs if rest]
        wanted = list(dict.fromkeys(greedy))
        params = [dataclasses.replace(self.params, max_tokens=n, temperature=0.0, ignore_eos=True) for _, n in wanted]
        contexts = [list(context) for context, _ in wanted]
        outputs = self.engine.generate(contexts, params, progress=not disable_tqdm) if wanted else []
        best = {key: output.token_ids for key, output in zip(wanted, outputs, strict=True)}
        return [(score, not rest or best[tuple(context), len(rest)] == rest) for score, (context, rest) in zip(scores, pairs, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of whole texts: in pieces as long as the model takes, each behind the token before it, the first behind the
        end token."""
        pieces, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            ids = [self.prefix_token_id, *self.tokenizer.encode_more(text)]
            for at in range(1, len(ids), self.most - 1):
                pieces.append((ids[at - 1 : at], ids[at : at + self.most - 1]))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, score in zip(owners, self._score(pieces, progress=not disable_tqdm), strict=True):
            totals[i] += score
        return totals

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        return self.engine.model.spec.eos_ids[0]

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokenizer).__name__

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template as it is; lm-eval keeps it with the results."""
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text of a prompt."""
        return self.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _params(self, asked: dict[str, Any]) -> SamplingParams:
        given = dict(asked)
        until, sampled = given.pop("until", None), given.pop("do_sample", None)
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        usual = {} if self.params.max_tokens != SamplingParams().max_tokens else {"max_tokens": _USUAL_TOKENS}
        if "max_gen_toks" in given:
            usual["max_tokens"] = int(given.pop("max_gen_toks"))
        if unknown := set(given) - known:
            names = ", ".join(_OF_GENERATION)
            raise ValueError(f"generation_kwargs: {min(unknown)} is none of {names}, and no setting of SamplingParams")
        if sampled is False:
            given["temperature"] = 0.0
        stops = [until] if isinstance(until, str) else until or []
        return dataclasses.replace(self.params, **usual | given | {"stop": tuple(text for text in stops if text)})

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, as they are in the whole; spaces at the end of the context belong to the continuation."""
        if not context:
            return [self.prefix_token_id], self.tokenizer.encode_more(continuation)
        stripped = context.rstrip()
        whole, before = self.tokenizer.encode(context + continuation), self.tokenizer.encode(stripped or context)
        rest = whole[len(before) :]
        room = max(self.most - len(rest), 1)
        return before[-room:], rest

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], *, progress: bool) -> list[float]:
        contexts, rests = [context for context, _ in pairs], [rest for _, rest in pairs]
        found = self.engine.score(contexts, rests, self.estimator, adapter_name=self.params.adapter_name, progress=progress)
        return [float(scores.sum()) for scores in found]


def register() -> type:
    """Makes ``diffulex_jax`` a name of lm-eval's models; returns the class.

    Raises:
      ImportError: where lm-eval is not installed.
    """
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    made = type("DiffulexJax", (DiffusionModel, LM), {"__module__": __name__, "__doc__": DiffusionModel.__doc__})
    register_model("diffulex_jax")(made)
    return made


def main() -> None:
    import lm_eval.models  # noqa: F401 -- its own names are registered first: a registry that is not empty is taken for whole
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
