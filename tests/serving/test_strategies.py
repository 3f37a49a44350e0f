"""Several strategies from one server: an engine each, over the same parameters."""

from __future__ import annotations

import asyncio

import pytest
import running

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.async_serving import AsyncEngine, RequestError
from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.service import Places
from diffulex_jax.strategies import llada2


SETTINGS = {"block_size": 8, "max_model_len": 128, "max_slots": 4}  # those of the servers, which read what these engines compile
NAMES = ["llada2_edit", "dmax"]
PARAMS = {"max_tokens": 20, "accept_threshold": 0.3, "ignore_eos": True}


@pytest.fixture(scope="module")
def engines(model):
    return Engine.for_strategies(str(model), NAMES, **SETTINGS)


@pytest.fixture(scope="module")
def alone(engines):
    """What each strategy makes of a prompt."""
    return {name: engine.generate(["ABC"], SamplingParams(**PARAMS))[0] for name, engine in engines.items()}


@pytest.mark.sweep
def test_engines_of_several_strategies_share_the_parameters(engines):
    first, second = engines.values()
    assert list(engines) == NAMES and [first.strategy, second.strategy] == NAMES
    assert first._device._params is second._device._params and first._scheduler is not second._scheduler


def test_strategies_need_names_of_their_own(model):
    for strategies in ([], ["dmax", "dmax"], [llada2(), llada2()]):
        with pytest.raises(ValueError, match="each with a name of its own"):
            Engine.for_strategies(str(model), strategies)
    with pytest.raises(ValueError, match="unknown strategy 'ar'"):
        Engine.for_strategies("no/such/model", ["dmax", "ar"])


def test_requests_of_two_strategies_side_by_side_get_the_answers_they_get_alone(engines, alone):
    async def main():
        async with asyncio.timeout(60), AsyncEngine(lambda: engines) as served:
            asked = [*NAMES, None] * 3
            replies = await asyncio.gather(*(served.generate("ABC", SamplingParams(**PARAMS), strategy=name) for name in asked))
            with pytest.raises(RequestError, match="strategy 'd2f' is not served here; choose one of llada2_edit, dmax") as caught:
                await served.generate("ABC", strategy="d2f")
            return [(name or NAMES[0], reply) for name, (reply,) in zip(asked, replies, strict=True)], caught.value.code

    answered, code = asyncio.run(main())
    assert code == 400 and alone["dmax"].token_ids != alone["llada2_edit"].token_ids
    for name, reply in answered:
        assert (list(reply.token_ids), reply.nfe) == (alone[name].token_ids, alone[name].nfe)


def test_aborting_in_one_strategy_leaves_the_other_alone(engines, alone):
    async def main():
        async with asyncio.timeout(60), AsyncEngine(lambda: engines) as served:
            ids = {"llada2_edit": "left", "dmax": "right"}
            tasks = {
                name: asyncio.create_task(served.generate("ABC", SamplingParams(**PARAMS), id=ids[name], strategy=name)) for name in ids
            }
            await asyncio.sleep(0)
            served.abort("left")
            with pytest.raises(RequestError, match="aborted"):
                await tasks["llada2_edit"]
            (reply,) = await tasks["dmax"]
            return list(reply.token_ids)

    assert asyncio.run(main()) == alone["dmax"].token_ids
    assert all(engine.stats["pages_held"] == 0 for engine in engines.values())


@pytest.mark.sweep
def test_an_async_engine_takes_one_strategy_or_several(model):
    async def strategies(strategy):
        async with asyncio.timeout(60), AsyncEngine.from_pretrained(str(model), strategy=strategy, **SETTINGS) as served:
            return list(served.facts["strategies"])

    assert asyncio.run(strategies(NAMES)) == NAMES
    assert asyncio.run(strategies(llada2())) == ["custom"]


@pytest.fixture(scope="module")
def server(server_of):
    return server_of("--strategy", "llada2_edit", "--strategy", "dmax")


def test_the_server_says_which_strategies_there_are(server):
    (card,) = server.client.get("/v1/models").json()["data"]
    facts = server.client.get("/server_info").json()["engine"]
    assert card["strategies"] == list(facts["strategies"]) == NAMES
    assert facts["strategies"]["dmax"] == {"buffer_size": 1, "attention": "block_causal", "num_pages": 64}
    assert server.metric("kv_pages_free") == 128


@pytest.mark.parametrize("name", [*NAMES, None])
def test_every_route_takes_the_strategy_of_a_request(server, alone, name):
    wanted = alone[name or NAMES[0]]
    chosen = PARAMS | ({"strategy": name} if name else {})
    assert server.post("/generate", prompt="ABC", **chosen).json()["token_ids"] == wanted.token_ids
    assert server.post("/v1/completions", prompt="ABC", **chosen).json()["choices"][0]["text"] == wanted.text
    chat = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "ABC"}], **chosen)
    assert chat.status_code == 200


def test_an_unknown_strategy_is_a_bad_request_that_names_it(server):
    for path, prompt in (("/generate", {"prompt": "A"}), ("/v1/completions", {"prompt": "A", "stream": True})):
        answer = server.post(path, **prompt, strategy="d2f")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "strategy")
        assert "'d2f' is not served here; choose one of llada2_edit, dmax" in answer.json()["error"]["message"]


def test_forwards_are_counted_by_strategy(server):
    def count(name):
        lines = server.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(f'diffulex:nfe_per_request_count{{strategy="{name}"}}'))

    before = [count(name) for name in NAMES]
    server.post("/generate", prompt="ABC", strategy="dmax", **PARAMS)
    assert [count(name) for name in NAMES] == [before[0], before[1] + 1]


MY_RULES = """
from diffulex_jax import rules
from diffulex_jax.strategies import Strategy, llada2


def from_the_left():  # fills nothing above a threshold: a token a forward
    return rules.chain(rules.threshold(), rules.remask())


def hasty():
    return Strategy("hasty", llada2(), defaults={"accept_threshold": 0.0})
"""


@pytest.mark.sweep_but("process")
@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_rules_of_ones_own_are_served_by_import_path_beside_built_in_ones(model, compiled, tmp_path, alone, isolation):
    (tmp_path / "my_rules.py").write_text(MY_RULES)
    names = ["llada2_edit", "my_rules:from_the_left", "my_rules:hasty"]
    options = [part for name in names for part in ("--strategy", name)]
    with running.serving(model, *running.SMALL, "--isolation", isolation, *options, cache=compiled, cwd=tmp_path) as server:
        (card,) = server.client.get("/v1/models").json()["data"]
        assert card["strategies"] == names
        asked = {"prompt": "ABC", "max_tokens": 20, "ignore_eos": True}
        by_name = {name: server.post("/generate", **asked, strategy=name).json() for name in names}
        assert server.post("/generate", **asked).json()["token_ids"] == by_name["llada2_edit"]["token_ids"]
        assert by_name["my_rules:hasty"]["nfe"] < by_name["my_rules:from_the_left"]["nfe"]
        edited = server.post("/generate", **asked | {"accept_threshold": 0.3}).json()
        assert edited["token_ids"] == alone["llada2_edit"].token_ids
        chat = {"messages": [{"role": "user", "content": "x"}], "strategy": names[1], "max_tokens": 4}
        assert server.post("/v1/chat/completions", **chat).status_code == 200
        assert server.metric("recompiles_total") == 0


def test_outputs_wait_in_one_queue_and_run_in_the_slots_of_their_strategy():
    places = Places(["a", "b"], slots=2, queue=1, tokens=100)
    with places.take("a", 2, 10), places.take("a", 1, 10):  # the third waits
        assert not places.full  # b has slots
        with pytest.raises(ApiError) as caught:
            places.take("a", 1, 10).__enter__()
        assert caught.value.status == 429
        with places.take("b", 2, 10):
            assert places.full
        with pytest.raises(ApiError, match="429|capacity"):
            places.take("b", 3, 10).__enter__()
    with pytest.raises(ApiError, match="4 outputs; the server has room for 3"):
        places.take("b", 4, 10).__enter__()
    with places.take("b", 3, 100), pytest.raises(ApiError, match="capacity"):
        places.take("a", 1, 1).__enter__()
