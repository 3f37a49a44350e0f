"""Suites from files: JSON, or JSON lines, in the formats of GSM8K, MATH-500, HumanEval and MBPP, told apart by their keys."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from diffulex_jax.evaluation.suites import Item, Suite


def read(path: str | pathlib.Path) -> Suite:
    """The suite of a file, named after it.

    Raises:
      ValueError: naming the file, and the line or entry that is no JSON, or of no known format.
      OSError: for a file that cannot be read.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: byte {error.start}") from None
    entries = _entries(path, text)
    if not entries:
        raise ValueError(f"{path}: holds no items")
    return Suite(path.name, [_item(entry, f"{path}: item {i}") for i, entry in enumerate(entries)])


def _entries(path: pathlib.Path, text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from None
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error.msg}") from None
    return entries


def _item(entry: Any, name: str) -> Item:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is not a JSON object")
    for keys, make in FORMATS.items():
        if set(keys) <= set(entry):
            wrong = [key for key in keys if not isinstance(entry[key], list if key == "test_list" else (str, int, float))]
            if wrong:
                raise ValueError(f"{name}: {wrong[0]}={entry[wrong[0]]!r} has the wrong type")
            return make(entry)
    known = "; ".join(", ".join(keys) for keys in FORMATS)
    raise ValueError(f"{name} has keys {', '.join(map(str, entry))}, of no known format; one of these is needed: {known}")


def _humaneval(entry: Mapping[str, Any]) -> Item:
    prompt, name = entry["prompt"], entry["entry_point"]

    def program(text: str) -> str:
        code = code_in(text)
        whole = code if re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE) else prompt + (code if "```" in text else text)
        return f"{_imports(prompt)}\n{whole}\n\n{entry['test']}\n\ncheck({name})\n"

    return Item(f"Complete this Python function. Answer with the whole function.\n\n```python\n{prompt.rstrip()}\n```", None, program)


def _mbpp(entry: Mapping[str, Any]) -> Item:
    task = entry["text"] if "text" in entry else entry["prompt"]
    tests = "\n".join(entry["test_list"])
    setup = "\n".join([*entry.get("test_imports", ()), entry.get("test_setup_code") or ""])
    prompt = f"{task}\nAnswer with Python code that passes these tests:\n\n```python\n{tests}\n```"
    return Item(prompt, None, lambda text: f"{code_in(text)}\n\n{setup}\n{tests}\n")


def _gsm8k(entry: Mapping[str, Any]) -> Item:
    want = last_number(str(entry["answer"]).rsplit("####", 1)[-1])
    return Item(entry["question"], lambda text: want is not None and stated_number(text) == want)


def _math(entry: Mapping[str, Any]) -> Item:
    want = plain_math(str(entry["answer"]))
    return Item(f"{entry['problem']}\nPut the final answer into \\boxed{{}}.", lambda text: plain_math(boxed(text) or "") == want)


FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Item]] = {
    ("prompt", "entry_point", "test"): _humaneval,
    ("text", "test_list"): _mbpp,
    ("prompt", "test_list"): _mbpp,
    ("problem", "answer"): _math,
    ("question", "answer"): _gsm8k,
}
"""The keys that tell a format, most telling first: HumanEval, MBPP and its sanitised form, MATH-500, GSM8K."""


def code_in(text: str) -> str:
    """The code of the last fenced block that is closed, else of one that is not, else all of the text."""
    closed = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", text, re.DOTALL)
    if closed:
        return closed[-1]
    opened = re.search(r"```(?:python|py)?[ \t]*\n(.*)", text, re.DOTALL)
    return opened[1] if opened else text


def _imports(prompt: str) -> str:
    """What a prompt imports: an answer that repeats the function may leave it out."""
    return "\n".join(re.findall(r"^(?:import|from) .*$", prompt, re.MULTILINE))


_NUMBER = r"[-+]?\$?\d[\d,]*(?:\.\d+)?"


def last_number(text: str) -> Fraction | None:
    """The last number of a text, thousands separated by commas or not."""
    found = re.findall(_NUMBER, text)
    return Fraction(re.sub(r"[$,+]", "", found[-1])) if found else None


def stated_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer: in the last ``\\boxed{}``, after the last ``####`` or ``answer is``, else the last."""
    if (inside := boxed(text)) is not None and (number := last_number(inside)) is not None:
        return number
    after = re.split(r"####|answer is", text)
    found = re.search(_NUMBER, after[-1]) if len(after) > 1 else None
    return last_number(found[0]) if found else last_number(text)


def boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` of a text holds."""
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    depth, start = 0, at + len("\\boxed{")
    for i, character in enumerate(text[start:], start):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return text[start:i]
    return None


def plain_math(answer: str) -> str:
    """An answer in TeX without what does not change it: spaces, sizes, ``$``, units as text, thousands' commas; numbers as fractions.

    No algebra: what is equal and written otherwise counts as wrong.
    """
    answer = re.sub(r"\\(?:left|right|!|,|;|:|\s)|\$|\\%|%|\^\\circ|\^\{\\circ\}", "", answer)
    answer = re.sub(r"\\(?:text|mbox|mathrm)\{\s*([^}]*)\}", r"\1", answer.replace("dfrac", "frac").replace("tfrac", "frac"))
    answer = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\s+", "", answer).rstrip(".")
    answer = re.sub(r"^[a-zA-Z]=", "", answer)
    number = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer)
    fraction = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}", number)
    if fraction and int(fraction[3]):
        return str(Fraction(int(fraction[2]), int(fraction[3])) * (-1 if fraction[1] else 1))
    if re.fullmatch(r"-?\d*\.?\d+|-?\d+/[1-9]\d*", number):
        return str(Fraction(number))
    return answer
