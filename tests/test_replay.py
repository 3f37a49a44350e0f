"""The replay of recorded outputs says what differs, what is left out, and what it does not know."""

from __future__ import annotations

import json
import pathlib

import pytest
import replay


GOLDEN = pathlib.Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "tiny-llada2-trained"


@pytest.fixture(scope="module")
def two_cases() -> list[dict]:
    cases = json.loads((GOLDEN / "tiny-llada2-trained.sglang_joint.json").read_text())
    return [case for case in cases if case["id"] in ("sglang-4", "sglang-8")]


@pytest.fixture
def run(tmp_path, capsys):
    """``run(cases, name=..., header=...)``: exit status and lines of a replay."""

    def call(cases: list[dict], *options: str, name: str = "here.sglang_joint.json", **header) -> tuple[int, list[str]]:
        (tmp_path / name).write_text(json.dumps({"cases": cases} | header if header else cases))
        status = replay.main([str(tmp_path / name), str(CHECKPOINT), *options])
        captured = capsys.readouterr()
        return status, (captured.out + captured.err).splitlines()

    return call


@pytest.mark.sweep
def test_what_is_equal(run, two_cases):
    assert run(two_cases) == (0, ["2/2 with equal forwards", "2/2 with equal edits", "0 left out", "2/2 token-identical"])


def test_what_differs_and_what_is_left_out(run, two_cases):
    """A file without its peer's name says it in its header."""
    same, other = two_cases
    tampered = other | {"output": [*other["output"][:5], 1, *other["output"][6:]]}
    slower = same | {"id": "slower", "nfe": same["nfe"] + 1}
    odd = same | {"id": "odd", "quirk": "it draws a token of its own"}
    asks = same | {"id": "asks", "settings": same["settings"] | {"beams": 4}}
    status, lines = run([tampered, slower, odd, asks], name="recorded.json", peer="SGLang 0.5.23 and so on", eos_id=1020, mask_id=1021)
    got = other["output"]
    assert status == 1
    assert lines == [
        f"sglang-8: differs: token 5 on: {got[5:13]} (64 tokens), wanted {[1, *got[6:13]]} (64 tokens)",
        f"slower: differs: the same tokens, with {same['nfe']} forwards, wanted {same['nfe'] + 1}",
        "asks: not compared: setting 'beams' of sglang_joint is unknown; known are algo, block_length, edit_threshold, gen_length, "
        "max_post_edit_steps, penalty_lambda, threshold",
        "odd: left out: it draws a token of its own",
        "0/1 with equal forwards",
        "1/1 with equal edits",
        "2 left out",
        "1/2 token-identical",
    ]


def test_json_is_one_object(run, two_cases):
    same, other = two_cases
    status, (line,) = run([same, other | {"fp64_same": False, "fp64_agree_steps": [3, 9]}], "--json")
    result = json.loads(line)
    assert status == 0 and result.pop("file").endswith("here.sglang_joint.json")
    assert result == {
        "checkpoint": "tiny-llada2-trained",
        "peer": "sglang_joint",
        "identical": 1,
        "compared": 1,
        "left_out": [{"id": "sglang-8", "reason": "unstable: float64 gives other tokens after 3 steps"}],
        "unknown": [],
        "differing": [],
        "forwards": {"equal": 1, "compared": 1},
        "edits": {"equal": 1, "compared": 1},
        "nfe": {"sglang-4": same["nfe"]},
    }


@pytest.mark.sweep
def test_first_steps_of_an_unstable_case_count(run):
    cases = json.loads((GOLDEN / "tiny-llada2.dmax_soft_parallel.json").read_text())[:1]
    status, lines = run(cases, name="x.dmax_soft_parallel.json")
    assert status == 1 and "one of its first 5 steps" in lines[0]  # it was recorded on the other checkpoint


def test_an_unknown_peer_is_named(run, two_cases):
    status, (line,) = run(two_cases, name="recorded.json", peer="somebody")
    assert status == 2
    assert line == f"recorded.json: peer 'somebody' is unknown; known are {', '.join(replay.PEERS)}"


def test_a_missing_file_is_named(capsys):
    assert replay.main(["nowhere.json", str(CHECKPOINT)]) == 2
    assert capsys.readouterr().err == "[Errno 2] No such file or directory: 'nowhere.json'\n"
