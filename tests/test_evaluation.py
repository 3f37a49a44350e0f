"""Suites and their marks: what counts as right, of generated items and of files in known formats, and what is counted."""

from __future__ import annotations

import json
import math
import time

import pytest
from typer.testing import CliRunner

from diffulex_jax import SamplingParams, cli
from diffulex_jax.cli import options
from diffulex_jax.evaluation import files, run, sandbox, suites
from diffulex_jax.evaluation.suites import Item, Suite


GSM8K = {"question": "How many?", "answer": "It is 1 + 1 = 2 thousand.\n#### 2,000"}
MATH = {"problem": "Halve 3/2.", "solution": "...", "answer": "\\frac{3}{4}", "level": 1}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """Their sum."""\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(numbers)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
MBPP = {"task_id": 1, "text": "Write a function twice(x).", "code": "def twice(x):\n  return 2 * x", "test_list": ["assert twice(2) == 4"]}
SANITISED = {"prompt": MBPP["text"], "code": MBPP["code"], "test_imports": ["import math"], "test_list": ["assert twice(math.pi) > 6"]}


def written(path, entries, *, lines: bool = True) -> str:
    path.write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(entries))
    return str(path)


# generated suites


@pytest.mark.parametrize("name", suites.GENERATED)
def test_items_are_different_and_follow_from_the_seed(name):
    one, again, other = (suites.generated(name, 20, seed=seed) for seed in (1, 1, 2))
    prompts = [item.prompt for item in one.items]
    assert len(set(prompts)) == 20
    assert prompts == [item.prompt for item in again.items] != [item.prompt for item in other.items]
    assert not one.runs_code


@pytest.mark.parametrize(
    ("name", "told", "right"),
    [
        ("copy", "Copy it.", "Ann, Ben, Cleo"),
        ("insert", "Insert Dan before position 2.", "Ann, Dan, Ben, Cleo"),
        ("remove", "Remove Ben.", "Ann, Cleo"),
        ("replace", "Replace Ben by Dan.", "Ann, Dan, Cleo"),
        ("reverse", "Reverse it.", "Cleo, Ben, Ann"),
    ],
)
def test_what_is_right_of_a_list(name, told, right, monkeypatch):
    """With draws that are known: three names, the second, and Dan."""

    class Rng:
        def permutation(self, names):
            return __import__("numpy").array(["Ann", "Ben", "Cleo", "Dan"])

        def integers(self, *_):
            return 3 if len(_) == 2 else 1

    monkeypatch.setattr(suites.np.random, "default_rng", lambda seed: Rng())
    (item,) = suites.generated(name, 1, seed=0).items
    assert item.prompt.startswith(f"Here is a waiting line: Ann, Ben, Cleo. {told} ")
    assert item.grade(right) and item.grade(f"Sure, Ann!\nHere it is:\n{right}.\n")
    assert not item.grade(f"{right}, Eve") and not item.grade("") and not item.grade("Cleo, Ann, Ben")


def test_sorted_and_shuffled_lists():
    assert suites._is_line("Ann, Ben, Cleo", names=["Cleo", "Ann", "Ben"], want=["Ann", "Ben", "Cleo"])
    shuffled = {"names": ["Ann", "Ben", "Cleo"], "want": None}
    assert suites._is_line("Ben, Ann, Cleo", **shuffled)
    for wrong in ("Ann, Ben, Cleo", "Ben, Ann", "Ben, Ben, Cleo", "Ben, Ann, Cleo, Cleo"):
        assert not suites._is_line(wrong, **shuffled)
    for item in suites.generated("sort", 5, seed=0).items:
        names = item.prompt.split(": ")[1].split(".")[0].split(", ")
        assert item.grade(", ".join(sorted(names))) and not item.grade(", ".join(sorted(names)[::-1]))


def test_problems_with_a_story_and_without():
    words, bare = (suites.generated(name, 30, seed=1).items for name in ("words", "arithmetic"))
    assert not {item.prompt for item in words} & {item.prompt for item in bare}
    assert all(len(item.prompt.split()) > 10 for item in words)
    assert bare[0].grade("So the answer is 1000000.") is False


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="suite 'poems' is none of words, arithmetic, copy"):
        suites.generated("poems", 1, seed=0)


def test_the_command_line_knows_their_names():
    assert tuple(suites.GENERATED) == options.SUITE_NAMES


# files


@pytest.mark.parametrize("lines", [True, False])
def test_formats_are_told_by_their_keys(tmp_path, lines):
    suite = files.read(written(tmp_path / "mixed.jsonl", [GSM8K, MATH, HUMANEVAL, MBPP, SANITISED], lines=lines))
    assert suite.name == "mixed.jsonl" and suite.runs_code
    gsm8k, math_, humaneval, mbpp, sanitised = suite.items
    assert gsm8k.prompt == "How many?" and gsm8k.grade("So #### 2000") and not gsm8k.grade("So #### 20000")
    assert math_.grade("It is $\\boxed{\\dfrac{3}{4}}$.") and math_.grade("\\boxed{0.75}") and not math_.grade("3/4")
    for item, fenced in ((mbpp, MBPP["code"]), (sanitised, MBPP["code"])):
        assert sandbox.passes(item.program(f"Here:\n```python\n{fenced}\n```\nDone."))
        assert not sandbox.passes(item.program("```python\ndef twice(x):\n  return x\n```"))
    whole = HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]
    for answer in (whole, f"```python\n{whole}```", HUMANEVAL["canonical_solution"], whole.replace("from typing import List\n", "")):
        assert sandbox.passes(humaneval.program(answer)), answer
    assert not sandbox.passes(humaneval.program("    return 3\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "1"}\n{"question', "mine.jsonl: line 2 is not JSON"),
        ('[{"question": "a",]', "mine.jsonl: line 1 is not JSON"),
        ('{"input": "a", "target": "b"}', "mine.jsonl: item 0 has keys input, target, of no known format; one of these is needed: prompt,"),
        ('{"question": ["a"], "answer": "1"}', r"mine.jsonl: item 0: question=\['a'\] has the wrong type"),
        ("[1]", "mine.jsonl: item 0 is not a JSON object"),
        ("\n", "mine.jsonl: holds no items"),
    ],
)
def test_a_file_that_will_not_do_is_named(tmp_path, content, message):
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        files.read(tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("the answer is $1,234.50 in all, of 7", 1234.5),
        ("12 + 30 = 42", 42),
        ("#### -3", -3),
        ("So \\boxed{\\text{about } 8} of 9", 8),
        ("none", None),
    ],
)
def test_the_number_that_a_text_states(text, number):
    assert files.stated_number(text) == number


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\dfrac{\\pi}{2})", True),
        ("10,000", "10000", True),
        ("x=5", "5.0", True),
        ("-\\frac12", "-0.5", True),
        ("50\\%", "50", True),
        ("\\text{Evelyn}", "Evelyn", True),
        ("90^\\circ", "90", True),
        ("\\frac{1}{3}", "0.333", False),
        ("(1,2)", "(1,3)", False),
    ],
)
def test_answers_in_tex(one, other, same):
    assert (files.plain_math(one) == files.plain_math(other)) == same


def test_a_program_has_little_time_and_is_killed_with_all_it_started(tmp_path):
    began, mark = time.perf_counter(), tmp_path / "mark"
    forks = f"import os, time\nif os.fork() == 0:\n    time.sleep(2)\n    open({str(mark)!r}, 'w')\n"
    assert not sandbox.passes(forks + "time.sleep(60)", seconds=1)
    assert time.perf_counter() - began < 10
    assert not sandbox.passes("x = bytearray(1 << 32)")
    assert not sandbox.passes("import sys; sys.exit(1)") and sandbox.passes("import os; assert 'HOME' in os.environ")
    time.sleep(1.5)
    assert not mark.exists()


# what is counted


def test_intervals_by_wilson():
    """From the literature: 0 of 10, and 81 of 263 (Newcombe 1998)."""
    assert run.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    assert run.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-3)
    assert run.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


@pytest.fixture(scope="module")
def engine(engine_of):
    return engine_of("embedded", strategy="dmax", max_slots=4, max_model_len=128)


def test_a_suite_is_asked_and_counted(engine):
    suite = suites.generated("arithmetic", 6, seed=1)
    params = SamplingParams(max_tokens=200, accept_threshold=0.5)
    result, marked = run.evaluate(engine, suite, params)
    assert (result.items, result.right) == (6, sum(right for _, right in marked)) and result.right >= 5
    prompts = [engine.tokenizer.encode(item.prompt) for item in suite.items]
    again = engine.generate(prompts, [SamplingParams(max_tokens=128 - len(prompt), accept_threshold=0.5) for prompt in prompts])
    assert [answer for answer, _ in marked] == [output.text for output in again]
    plain = result.plain()
    assert plain["tokens"] == sum(len(output.token_ids) for output in again)
    assert plain["forwards"] == sum(output.nfe for output in again)
    assert plain["tokens_per_forward"] == plain["tokens"] / plain["forwards"] > 2
    assert math.isclose(plain["tokens_per_second"], plain["tokens"] / plain["seconds"])
    assert plain["low"] < plain["accuracy"] <= plain["high"] and plain["finish_reasons"] == {"stop": 6}
    assert "arithmetic" in run.table([result]) and run.COUNTING in run.table([result])


def test_items_have_seeds_of_their_own_that_follow_from_one(engine):
    suite = Suite("same", [Item("What is 12 + 30?", lambda text: "42" in text)] * 4)
    hot = SamplingParams(max_tokens=40, temperature=1.5, seed=3)
    one, again = (run.evaluate(engine, suite, hot)[1] for _ in range(2))
    assert one == again and len({answer for answer, _ in one}) > 1


def test_what_cannot_be_asked_is_named(engine):
    with pytest.raises(ValueError, match="long: item 1 has 160 tokens, and max_model_len=128"):
        run.evaluate(engine, Suite("long", [Item("1"), Item("1" * 160)]), SamplingParams())
    with pytest.raises(ValueError, match="code is graded by running what the model writes.*--run-code"):
        run.evaluate(engine, Suite("code", [Item("1", None, str)]), SamplingParams())


def test_the_command_prints_one_object_and_writes_answers(tmp_path, monkeypatch, engine):
    monkeypatch.setattr("diffulex_jax.engine.engine.Engine.from_pretrained", lambda model, **settings: engine)
    file = written(tmp_path / "gsm8k.jsonl", [{"question": "What is 12 + 30?", "answer": "#### 42"}] * 3)
    command = ["eval", "words", file, "--items", "2", "--accept-threshold", "0.5", "--chat", "--answers", str(tmp_path / "answers.jsonl")]
    done = CliRunner().invoke(cli.app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [(suite["suite"], suite["items"]) for suite in report["suites"]] == [("words", 2), ("gsm8k.jsonl", 2)]
    assert report["suites"][1]["right"] == 2
    assert report["sampling"] == {"max_tokens": 256, "accept_threshold": 0.5}
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["suite"] for line in lines] == ["words"] * 2 + ["gsm8k.jsonl"] * 2
    assert all(line["right"] for line in lines[2:])
    shown = CliRunner().invoke(cli.app, command)
    assert "gsm8k.jsonl" in shown.stdout and "95 %" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poems"], "suite 'poems' is no file, and none of words"),
        (["words", "--items", "0"], "--items"),
        ([], "Missing argument"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, message):
    done = CliRunner().invoke(cli.app, ["eval", *arguments])
    assert done.exit_code == 2 and message in done.output


def test_code_is_run_only_where_that_is_said(tmp_path):
    done = CliRunner().invoke(cli.app, ["eval", written(tmp_path / "humaneval.jsonl", [HUMANEVAL])])
    assert done.exit_code == 2
    assert "humaneval.jsonl is graded by running what the model writes" in done.output
