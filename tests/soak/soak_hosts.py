"""A host is killed, or hangs, in the middle of answers, ten times each: every client is answered, and every process ends."""

from __future__ import annotations

import concurrent.futures
import json
import sys
import time

import pytest
from running import still_alive
from test_hosts import ask, engine_of, pair, processes


HARM = {
    "a follower is killed": lambda first, second: engine_of(second).kill(),
    "a follower hangs": lambda first, second: engine_of(second).suspend(),
    "a follower's server is killed": lambda first, second: second.process.kill(),
    "the leader is killed": lambda first, second: engine_of(first).kill(),
}
TIMES = 10


@pytest.mark.parametrize("time_of_day", range(TIMES))
@pytest.mark.parametrize("harm", HARM)
def test_a_lost_host_ends_the_job(model, compiled, monkeypatch, harm, time_of_day):
    with pair(model, compiled, monkeypatch) as (first, second), concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert len(ask(first, "before")["token_ids"]) == 40
        both = processes(first) + processes(second)
        answers = [pool.submit(ask, first, f"question {i}", n=3) for i in range(16)]
        time.sleep(0.05 * time_of_day)
        began = time.monotonic()
        HARM[harm](first, second)
        found = [answer.result(20) for answer in answers]
        answered = time.monotonic() - began
        codes = first.process.wait(30), second.process.wait(30)
        figures = {
            "harm": harm,
            "run": f"{time_of_day + 1} of {TIMES}",
            "after s": round(0.05 * time_of_day, 2),
            "answers": sum("error" not in answer for answer in found),
            "errors": sum("error" in answer for answer in found),
            "answered in s": round(answered, 1),
            "ended in s": round(time.monotonic() - began, 1),
            "codes": codes,
        }
        sys.__stdout__.write(f"\n{json.dumps(figures)}\n")
        assert all({"outputs", "token_ids", "error"} & answer.keys() for answer in found)
        assert answered < 15 and codes[0] == 1
        if "follower" in harm:
            assert any("host 1 of 2" in line["message"] for line in first.log)
        assert still_alive(both, 5) == []
