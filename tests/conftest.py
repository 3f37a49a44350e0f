"""Test-wide settings, engines shared by the tests of a file, and which files take long."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import pathlib
import sys
from typing import Any


os.environ.setdefault("JAX_PLATFORMS", "cpu")

# JAX is imported late, by workers alone: it takes two seconds.
import hypothesis
import pytest
from sweep import left_out, mark_others

from diffulex_jax.cli.surroundings import compile_sooner


# The same examples in every run: a failure is there for whoever looks.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("tests")

gc.set_threshold(10_000)  # at 700 a twentieth of the time goes into looking for garbage among what JAX traces

pytest.register_assert_rewrite("recorded")  # asserts of tests that several files import say what they compared

TESTS = pathlib.Path(__file__).parent
GOLDEN = TESTS / "golden"

# Files and folders that take more than some ten seconds of a processor, longest first: they begin first, so that all workers end
# together, and `make test-fast` leaves them out.
SLOW = (
    "test_notebooks.py",
    "test_same_answer.py",
    "test_llada.py",
    "test_dream.py",
    "kernels/test_prediction.py",
    "test_quantised_experts.py",
    "test_stopping.py",
    "test_output_contract.py",
    "test_sharding.py",
    "test_golden_llada2.py",
    "test_golden_sdar.py",
    "test_bench_step.py",
    "test_golden_dream.py",
    "aot/test_plan.py",
    "kernels/test_quantised.py",
    "serving",
    "test_generate.py",
    "test_cli_process.py",
    "test_golden_llada.py",
    "aot",
    "test_requests.py",
    "test_several_hosts.py",
    "kernels/test_block_attention.py",
    "test_bench_e2e.py",
    "test_properties.py",
    "kernels/test_grouped_matmul.py",
    "test_d2f.py",
    "test_background.py",
    "test_block_routing.py",
    "test_warm_up.py",
    "test_named_strategies.py",
    "test_scoring.py",
    "test_adapter_rows.py",
    "test_step.py",
    "test_cli.py",
    "test_sampling.py",
    "test_engine.py",
    "test_golden_fast_dllm.py",
    "test_decode.py",
    "test_few_rows.py",
    "test_policies.py",
    "test_bench_quality.py",
    "test_compile_cache.py",
    "test_training.py",
    "test_blocks_and_pages.py",
    "kernels/test_expert_choice.py",
    "test_threads.py",
    "test_kv.py",
    "kernels/test_kv_forms.py",
    "test_rollout.py",
    "test_quantised_layers.py",
    "test_adapters.py",
    "test_replay.py",
    "test_readme.py",
    "test_update_params.py",
    "kernels/test_token_merge.py",
    "test_recipes.py",
    "test_quantised_files.py",
    "test_models.py",
    "test_fingerprint.py",
    "test_next_token_models.py",
    "test_evaluation.py",
    "test_grpo.py",
    "test_prefill.py",
    "test_decide.py",
    "test_watch.py",
    "test_viz.py",
    "test_lm_eval.py",
    "test_trace.py",
    "test_executables.py",
    "test_weight_folders.py",
)

# Files whose tests share nothing and take long: any worker takes the next.
ONE_BY_ONE = ("test_notebooks.py",)

# Files whose tests ask one server: one worker takes them all, so that it starts once.
ONE_SERVER = (
    "serving/test_bench_serve.py",
    "serving/test_http.py",
    "serving/test_load.py",
    "serving/test_openai.py",
    "serving/test_seeds.py",
)

# How XLA compiles for the files and folders named, and for the processes that they start; for all others, as it does for users. Each way is
# a run of its own, because a process has the flags that it began with. A build of an engine and a step of it take:
#   users: 1, and 1. What users run is held by these: the kernels, the same answer in every way of running, what LLaDA2's authors recorded,
#     whole canvases, prompts in parts, quantised weights.
#   quick: half, and two. For what compiles more than it runs.
#   least: a third, and ten. For what compiles much and runs little.
COMPILED: dict[str, tuple[str, ...]] = {
    "quick": (
        "test_bench_quality.py",
        "test_cli.py",
        "test_engine.py",
        "test_evaluation.py",
        "test_generate.py",
        "test_grpo.py",
        "test_lm_eval.py",
        "test_quantised_experts.py",
        "test_readme.py",
        "test_replay.py",
        "test_requests.py",
        "test_trace.py",
        "test_update_params.py",
    ),
    "least": (
        "serving/test_adapter_models.py",
        "test_adapter_rows.py",
        "test_adapters.py",
        "test_background.py",
        "test_bench_step.py",
        "test_blocks_and_pages.py",
        "test_compile_cache.py",
        "test_decide.py",
        "test_golden_fast_dllm.py",
        "test_golden_sdar.py",
        "test_mixed_steps.py",
        "test_models.py",
        "test_next_token_models.py",
        "test_output_contract.py",
        "test_policies.py",
        "test_properties.py",
        "test_quantised_layers.py",
        "test_recipes.py",
        "test_rollout.py",
        "test_scoring.py",
        "test_sharding.py",
        "test_training.py",
        "test_viz.py",
        "test_warm_up.py",
        "test_watch.py",
    ),
}

# With `--one-of-each` of the files that are compiled as for users only these are so: whole models, with the kernels in them. Some are
# least, and all others quick; of the kernels those whose rows would depend on their company.
USERS = ("test_same_answer.py", "test_golden_llada2.py")
QUICK = ("kernels/test_grouped_matmul.py", "kernels/test_quantised.py")
LEAST = (
    "kernels",
    "test_bfloat16_memory.py",
    "test_block_routing.py",
    "test_decode.py",
    "test_few_rows.py",
    "test_golden_dream.py",
    "test_golden_llada.py",
    "test_kv.py",
    "test_levenshtein.py",
    "test_objectives.py",
    "test_prefill.py",
    "test_qwen2.py",
    "test_rules.py",
    "test_sampling.py",
    "test_sdar_rules.py",
    "test_step.py",
    "test_sub_blocks.py",
)
_OLD_EMITTERS = (
    "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)
FLAGS = {
    "quick": f"{_OLD_EMITTERS} --xla_backend_optimization_level=1",
    "least": f"{_OLD_EMITTERS} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}

# Each program that JAX compiles for a CPU takes tens of the 65530 mappings of memory that Linux gives to a process, which dies without
# a word when there are no more.
MOST_MAPPINGS = 32_000

MISSING = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    ways = ("users", *COMPILED)
    parser.addoption("--compiled", choices=ways, help="run the files that tests/conftest.py says are compiled so")
    parser.addoption("--one-of-each", action="store_true", help="leave out cases that are marked sweep; with --compiled, compile sooner")


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """Leaves out what is compiled in another way than ``--compiled`` asks for."""
    wanted = config.getoption("compiled")
    if not wanted or collection_path.suffix != ".py":
        return None
    return True if _way_of(collection_path, sooner=config.getoption("one_of_each")) != wanted else None


def _way_of(file: pathlib.Path, *, sooner: bool) -> str:
    way = next((way for way, names in COMPILED.items() if _is_among(file, names)), "users")
    if way != "users" or not sooner or _is_among(file, USERS):
        return way
    return "least" if _is_among(file, LEAST) and not _is_among(file, QUICK) else "quick"


def _is_among(file: pathlib.Path, names: tuple[str, ...]) -> bool:
    return any(file.is_relative_to(TESTS / name) for name in names)


def pytest_configure(config: pytest.Config) -> None:
    """What one worker compiled the others read from disk, and so do processes that tests start, and the next run. The key holds program,
    flags and versions."""
    named = {*SLOW, *ONE_BY_ONE, *ONE_SERVER, *USERS, *QUICK, *LEAST, *(name for names in COMPILED.values() for name in names)}
    if missing := sorted(name for name in named if not (TESTS / name).exists()):
        raise pytest.UsageError(f"tests/conftest.py lists {', '.join(missing)}, which are not there")
    if config.getoption("one_of_each"):
        config.option.markexpr = f"({config.option.markexpr}) and not sweep"
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a processor: of its own threads all but one wait, busily, for work
        os.environ.setdefault("NPROC", "1")  # XLA's
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's
    if flags := FLAGS.get(config.getoption("compiled") or "users"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    compile_sooner()
    cache = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in cache.items():
        os.environ[name.upper()] = str(value)
        if "jax" in sys.modules:  # a folder's conftest.py has imported it, so that it has read another environment
            sys.modules["jax"].config.update(name, value)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile`` as it is, but for the files of ``ONE_BY_ONE``, and for those of ``ONE_SERVER``, which count as one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            path = config.rootpath / file
            return nodeid if _is_among(path, ONE_BY_ONE) else "one server" if _is_among(path, ONE_SERVER) else file

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks slow tests, and puts them first; marks what is one of many."""
    for item in items:
        if _place(item) < len(SLOW):
            item.add_marker("slow")
    unknown = mark_others(items)
    config.stash[MISSING] = [*unknown, *left_out(items)] if config.getoption("one_of_each") else []
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    path = item.path.relative_to(TESTS)
    return next((i for i, name in enumerate(SLOW) if path.is_relative_to(name)), len(SLOW))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Fails the last test of a file whose engines come near to what a process can hold."""
    maps = pathlib.Path("/proc/self/maps")
    if (nextitem is None or nextitem.path != item.path) and maps.exists():
        taken = maps.read_bytes().count(b"\n")
        assert taken < MOST_MAPPINGS, (
            f"{item.path.name} holds {taken} mappings, of {MOST_MAPPINGS} at the most; let go of its engines sooner"
        )


@pytest.fixture(scope="session", autouse=True)
def _no_file_vanishes(pytestconfig):
    """Fails every test of a run ``--one-of-each`` where these are all that a file has, or where ``sweep_but`` names what is no case."""
    missing = pytestconfig.stash[MISSING]
    assert not missing, f"`make test` would run nothing of {', '.join(missing)}"


@pytest.fixture(scope="module", autouse=True)
def _a_file_leaves_nothing_behind():
    """Compiled programs live as long as JAX remembers them, hundreds of megabytes a file. The next file reads what it needs from disk."""
    gc.freeze()  # garbage is looked for hundreds of times while JAX traces: not among the modules, which stay
    yield
    import jax

    jax.clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # glibc keeps what the compiler has freed, which is more than the programs take


@pytest.fixture(scope="module")
def engine_of():
    """``engine_of(model, strategy=..., ...)``: the engine of a golden checkpoint or "embedded"; one each for the tests of a file.

    Each of its programs is compiled when a test first needs it.
    """
    from diffulex_jax import Engine

    @functools.cache
    def build(model: str, **settings) -> Engine:
        folder = "embedded" if model == "embedded" else str(GOLDEN / model)
        return Engine.from_pretrained(folder, **{"warm_up": False} | settings)

    return build


@pytest.fixture(scope="session")
def golden_model() -> str:
    """A small trained model without a tokenizer: 1024 tokens, EOS 1020, mask 1021."""
    return str(GOLDEN / "tiny-llada2-trained")
