"""What is asked over plain HTTP: scores, who may ask, how much, and what becomes of requests when the server ends."""

import json
import socket
import threading
import time

import httpx
import pytest
import torch
from support.served import load, serving

from flows.serving.limits import MOST_CALLERS, Limits, RateLimiter
from rlhf_core.engine.batches import collate
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import encode_prompts, encode_responses, load_tokenizer

KEY = "a-key-of-more-than-16-letters"
QUESTION = [{"role": "user", "content": "What is the price?"}]
CHAT = {"model": "policy", "messages": QUESTION, "max_tokens": 5}


def slowed(model, seconds=0.01):
    """Each token of a model takes a while longer, so that a test can do something meanwhile."""
    slots = model.thread._sampler.slots
    step = slots.step

    def slow(tokens_B):
        time.sleep(seconds)
        return step(tokens_B)

    slots.step = slow


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def post(address, path="/v1/chat/completions", body=CHAT, **more):
    return httpx.post(address + path, json=body, timeout=60, trust_env=False, **more)


@pytest.fixture(scope="module")
def long(address):
    """A request whose response has a hundred tokens."""
    bodies = ({**CHAT, "max_tokens": 100, "seed": seed} for seed in range(200))
    return next(body for body in bodies if post(address, body=body).json()["usage"]["completion_tokens"] == 100)


def error_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["code"], error["param"]


def test_scores_are_those_of_the_reward_model_standardised(address, model_folders):
    model, tokenizer = RewardModel.load(model_folders / "reward"), load_tokenizer(model_folders / "reward")
    prompt, responses = "What is the price?", ["An answer.", "And another one. " * 5, ""]
    prompts = encode_prompts(tokenizer, [prompt] * 3, 1000)
    with torch.inference_mode():
        wanted = model(collate(prompts, encode_responses(tokenizer, responses, 1000), tokenizer.pad_token_id)).tolist()
    for path in ("/score", "/v1/score"):
        answer = post(address, path, {"model": "reward", "prompt": prompt, "response": responses}).json()
        assert [row["score"] for row in answer["data"]] == pytest.approx(wanted, abs=1e-5)
        assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    one = post(address, "/score", {"model": "reward", "messages": QUESTION, "response": responses[0]}).json()
    assert [row["score"] for row in one["data"]] == pytest.approx(wanted[:1], abs=1e-5)
    assert one["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"model": "policy", "prompt": "a", "response": "b"}, "wrong_kind", "model"),
        ({"model": "reward", "response": "b"}, "invalid_value", "prompt"),
        ({"model": "reward", "prompt": "a", "messages": QUESTION, "response": "b"}, "invalid_value", "prompt"),
        ({"model": "reward", "prompt": "a"}, "missing_required_parameter", "response"),
        ({"model": "reward", "prompt": "a", "response": ["b"] * 17}, "invalid_value", "response"),
        ({"model": "reward", "prompt": "a", "response": "word " * 500}, "context_length_exceeded", "response"),
    ],
)
def test_what_is_wrong_with_a_request_for_scores_is_said_by_field(address, body, code, param):
    answer = post(address, "/score", body)
    assert answer.status_code == 400
    assert error_of(answer) == (code, param)


def test_a_stream_is_server_sent_events_with_an_end(address):
    lines = post(address, body={**CHAT, "stream": True}).text.strip().split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert {json.loads(line[6:])["object"] for line in lines[:-1]} == {"chat.completion.chunk"}


def test_paths_methods_and_bodies_that_are_none_are_errors_of_the_same_form(address):
    assert error_of(httpx.get(f"{address}/v1/nothing"))[0] == "unknown_url"
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405
    text = httpx.post(f"{address}/v1/completions", content="{", headers={"content-type": "application/json"})
    assert (text.status_code, error_of(text)) == (400, ("invalid_value", None))
    listed = post(address, body=[1])
    assert (listed.status_code, error_of(listed)) == (400, ("invalid_value", None))
    form = httpx.post(
        f"{address}/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": "text/plain"}
    )
    assert (form.status_code, error_of(form)[0]) == (415, "not_json")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_page_from_elsewhere_cannot_ask_through_a_name_of_its_own(address):
    assert post(address, headers={"host": "evil.example:80"}).status_code == 403
    port = address.rpartition(":")[2]
    assert post(address, headers={"host": f"localhost:{port}"}).status_code == 200
    assert "access-control-allow-origin" not in post(address, headers={"origin": "http://evil.example"}).headers


def test_with_keys_only_who_has_one_may_ask(models):
    with serving(models_like(models), keys=[KEY, "another-key-of-16-letters"]) as address:
        for headers, words in (
            ({}, "You didn't provide an API key"),
            ({"authorization": f"Bearer {KEY}x"}, "Incorrect API key provided"),
            ({"authorization": f"Basic {KEY}"}, "Incorrect API key provided"),
        ):
            answer = post(address, headers=headers)
            assert (answer.status_code, error_of(answer)[0]) == (401, "invalid_api_key")
            assert words in answer.text
            assert KEY not in answer.text
            assert answer.headers["www-authenticate"] == "Bearer"
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        for key in (KEY, "another-key-of-16-letters"):
            found = httpx.get(
                f"{address}/v1/models", headers={"authorization": f"Bearer {key}", "host": "name.example"}
            )
            assert found.status_code == 200


class Shared:
    """A model that outlives the server it is given to."""

    def __init__(self, model):
        self.__dict__.update(vars(model))

    def close(self):
        pass


def models_like(models):
    kinds = {type(model): type("Shared", (Shared, type(model)), {}) for model in models.values()}
    return {name: kinds[type(model)](model) for name, model in models.items()}


def test_bodies_beyond_the_limit_are_refused_however_they_come(models):
    with serving(models_like(models), Limits(body_bytes=500)) as address:
        assert post(address).status_code == 200
        long = {**CHAT, "user": "x" * 600}
        answer = post(address, body=long)
        assert (answer.status_code, error_of(answer)[0]) == (413, "request_too_large")
        pieces = (piece.encode() for piece in json.dumps(long))  # chunked: no length is said
        headers = {"content-type": "application/json"}
        assert httpx.post(f"{address}/v1/chat/completions", content=pieces, headers=headers).status_code == 413


def test_who_asks_too_often_is_told_when_to_come_again(models):
    with serving(models_like(models), Limits(per_minute=3)) as address:
        statuses = [httpx.get(f"{address}/v1/models").status_code for _ in range(3)]
        answer = httpx.get(f"{address}/v1/models")
        assert statuses == [200] * 3
        assert (answer.status_code, error_of(answer)[0]) == (429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 21


def test_a_bucket_fills_by_the_minute_and_each_caller_has_one():
    clock = [0.0]
    limiter = RateLimiter(6, now=lambda: clock[0])
    assert [limiter.wait_s("a") for _ in range(6)] == [0.0] * 6
    assert limiter.wait_s("a") == pytest.approx(10.0)
    assert limiter.wait_s("b") == 0.0
    clock[0] = 9.9
    assert limiter.wait_s("a") == pytest.approx(0.1)
    clock[0] = 10.1
    assert limiter.wait_s("a") == 0.0
    clock[0] = 1000.0
    assert [limiter.wait_s("a") > 0 for _ in range(7)] == [False] * 6 + [True]
    for number in range(2 * MOST_CALLERS):
        limiter.wait_s(f"caller {number}")
        clock[0] += 0.01
    assert len(limiter.buckets) <= MOST_CALLERS + 1
    assert all(RateLimiter(0).wait_s("a") == 0.0 for _ in range(1000))


def test_more_than_may_wait_are_told_to_come_again(model_folders, long):
    models = load(model_folders, "policy", rows=1)
    slowed(models["policy"])
    with serving(models, Limits(waiting=1)) as address:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={**long, "stream": True}) as under_way:
            lines = under_way.iter_lines()  # kept: without it the client hangs up
            next(lines)
            waits = threading.Thread(target=post, args=(address,))
            waits.start()
            until(lambda: models["policy"].thread.load == (1, 1))
            answer = post(address)
            assert (answer.status_code, error_of(answer)[0]) == (429, "server_busy")
            assert int(answer.headers["retry-after"]) >= 1
        waits.join(30)
        assert post(address).status_code == 200


@pytest.mark.parametrize("grace", [20.0, 0.2])
def test_going_down_requests_under_way_end_or_get_an_error(model_folders, long, grace):
    models = load(model_folders, "policy", rows=1)
    slowed(models["policy"])
    found: dict[str, object] = {}

    def whole():
        found["whole"] = post(address, body=long)

    def streamed():
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json={**long, "stream": True}, timeout=60
        ) as answer:
            found["lines"] = [line for line in answer.iter_lines() if line]

    with serving(models, Limits(grace_s=grace)) as address:
        threads = [threading.Thread(target=target) for target in (streamed, whole)]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            until(lambda number=number: sum(models["policy"].thread.load) == number)
    for thread in threads:
        thread.join(30)
    if grace > 1:
        assert found["lines"][-1] == "data: [DONE]"
        assert found["whole"].json()["usage"]["completion_tokens"] == 100
    else:
        assert json.loads(found["lines"][-1].removeprefix("data: "))["error"]["code"] == "unavailable"
        assert (found["whole"].status_code, error_of(found["whole"])[0]) == (503, "unavailable")
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", int(address.rpartition(":")[2])))


def test_what_breaks_inside_is_said_in_form_and_not_in_detail(model_folders, monkeypatch):
    models = load(model_folders, "policy")

    def broken(tokens_B):
        raise RuntimeError("out of memory at a secret place")

    with serving(models) as address:
        monkeypatch.setattr(models["policy"].thread._sampler.slots, "step", broken)
        answer = post(address)
        assert (answer.status_code, error_of(answer)[0]) == (500, "internal_error")
        assert "secret" not in answer.text
        assert post(address).status_code == 200, "the next one finds a new cache"
