"""The embedded model: a small LLaDA2-MoE that does grade-school arithmetic.

    python -m diffulex_jax.training.recipes.embedded --out DIR --steps 10500 --seed 0

writes a Hugging Face directory with metrics and a model card.
"""

from __future__ import annotations

import argparse
import time

import jax

from diffulex_jax.models.registry import model_of
from diffulex_jax.training import objective, trainer
from diffulex_jax.training.arithmetic import data, evaluate, export, tokenizer


MODEL = model_of(
    {
        "model_type": "llada2_moe",
        "vocab_size": tokenizer.VOCAB_SIZE,
        "mask_token_id": tokenizer.VOCAB_SIZE - 1,
        "eos_token_id": tokenizer.VOCAB_SIZE - 2,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 9,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "n_group": 4,
        "topk_group": 2,
        "max_position_embeddings": 4096,
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="directory of the trained model")
    for name in ("steps", "rows", "examples", "seed", "warmup"):
        parser.add_argument(f"--{name}", type=int, default=trainer.Recipe._field_defaults[name])
    parser.add_argument("--learning-rate", type=float, default=trainer.Recipe._field_defaults["learning_rate"])
    parser.add_argument("--workers", type=int, default=8, help="processes that generate examples")
    parser.add_argument("--problems", type=int, default=evaluate.PROBLEMS, help="held-out problems of the evaluation at the end")
    args = vars(parser.parse_args())
    recipe = trainer.Recipe(**{name: args[name] for name in trainer.Recipe._fields if name in args})
    began = time.perf_counter()
    examples = objective.Batch(*jax.device_put(data.training_set(recipe.examples, seed=recipe.seed, workers=args["workers"])))
    print(f"{len(examples.start)} examples in {time.perf_counter() - began:.0f} s", flush=True)
    params, history = trainer.train(MODEL, recipe, examples)
    training = {
        "recipe": recipe._asdict(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.perf_counter() - began),
        "history": history[:: max(1, len(history) // 100)],
    }
    export.export(args["out"], MODEL, params, training=training, problems=args["problems"])


if __name__ == "__main__":
    main()
