"""The server as the official `openai` client sees it."""

import concurrent.futures
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

try:
    import openai
except ImportError:
    pytest.skip("left out: the `openai` client is not installed (extra `dev`)", allow_module_level=True)

QUESTION = [{"role": "user", "content": "What is the price of 12 brooms?"}]
DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    *QUESTION,
    {"role": "assistant", "content": "An answer."},
    {"role": "user", "content": [{"type": "text", "text": "And another one?"}]},
]


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def theirs(model_folders):
    """transformers' own model and tokenizer of the folder."""
    return AutoModelForCausalLM.from_pretrained(model_folders / "policy"), AutoTokenizer.from_pretrained(
        model_folders / "policy"
    )


def turns(messages):
    texts = [one["content"] if isinstance(one["content"], str) else one["content"][0]["text"] for one in messages]
    return [{"role": one["role"], "content": text} for one, text in zip(messages, texts, strict=True)]


def ids_of(tokenizer, messages):
    return tokenizer.apply_chat_template(turns(messages), add_generation_prompt=True, return_dict=False)


def greedy(model, tokenizer, ids, tokens):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
        max_new_tokens=tokens, eos_token_id=[end, tokenizer.eos_token_id], pad_token_id=0,
    )  # fmt: skip
    return found[0, len(ids) :].tolist()


def test_the_models_are_listed_and_looked_up(client):
    assert [model.id for model in client.models.list()] == ["policy", "plain", "reward"]
    assert client.models.retrieve("policy").max_model_len == 400
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("messages", [QUESTION, DIALOGUE], ids=["question", "dialogue"])
def test_a_chat_at_temperature_0_is_what_transformers_writes(client, theirs, messages):
    model, tokenizer = theirs
    answer = client.chat.completions.create(model="policy", messages=messages, temperature=0, max_tokens=24)
    ids = ids_of(tokenizer, messages)
    wanted = greedy(model, tokenizer, ids, 24)
    assert answer.choices[0].message.content == tokenizer.decode(wanted, skip_special_tokens=True).strip()
    assert answer.choices[0].message.role == "assistant"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(ids),
        len(wanted),
        len(ids) + len(wanted),
    )
    assert answer.choices[0].finish_reason == ("length" if len(wanted) == 24 else "stop")
    assert answer.model == "policy"
    assert answer.object == "chat.completion"


def test_a_stream_says_the_same_as_the_whole_answer_and_how_much_it_was(client):
    asked = {"model": "policy", "messages": QUESTION, "seed": 7, "max_completion_tokens": 60, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts, reasons = ["", ""], ["", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert chunk.usage is None
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert texts[0] != texts[1]
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 10
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert not list(client.chat.completions.create(**asked, stream=True))[-1].usage


def test_with_a_seed_the_same_text_whoever_else_is_there_and_without_one_another(client):
    def ask(seed, **more):
        answer = client.chat.completions.create(
            model="policy", messages=QUESTION, seed=seed, max_tokens=40, temperature=0.9, **more
        )
        return answer.choices[0].message.content

    alone = [ask(seed) for seed in range(6)]
    assert len(set(alone)) == 6
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, [*range(6), *range(6)]))
    assert together == alone * 2
    assert ask(None) != ask(None)
    narrow = {"top_p": 1e-6, "extra_body": {"top_k": 5}}
    assert ask(3, **narrow) == ask(4, **narrow)


def test_stop_texts_end_a_response_before_them(client):
    asked = {"model": "policy", "messages": QUESTION, "seed": 7, "max_tokens": 60}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stop = whole[12:15]
    cut = client.chat.completions.create(**asked, stop=[stop, "never said"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)].rstrip()
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 60
    pieces = client.chat.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == cut.choices[0].message.content


def test_logprobs_are_those_that_transformers_computes(client, theirs):
    model, tokenizer = theirs
    asked = {"model": "policy", "messages": QUESTION, "temperature": 0.5, "seed": 1, "max_tokens": 8}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    named = answer.choices[0].logprobs.content
    ids = ids_of(tokenizer, QUESTION)
    assert len(named) == answer.usage.completion_tokens
    with torch.no_grad():
        for one in named:
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1] / 0.5, -1)
            best = logprobs.topk(3)
            assert [other.logprob for other in one.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [other.token for other in one.top_logprobs] == [tokenizer.decode([i]) for i in best.indices]
            candidates = [
                i for i, value in enumerate(logprobs.tolist())
                if abs(value - one.logprob) < 1e-4 and tokenizer.decode([i]) == one.token
            ]  # fmt: skip
            assert candidates
            ids = [*ids, candidates[0]]
    streamed = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
    chunks = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [one for chunk in chunks for one in chunk.content] == named


def test_completions_go_on_with_text_and_with_tokens_as_they_stand(client, theirs):
    model, tokenizer = theirs
    text = "A question about aisle F"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = tokenizer.decode(greedy(model, tokenizer, ids, 16), skip_special_tokens=True)
    asked = {"model": "policy", "temperature": 0}
    answer = client.completions.create(**asked, prompt=text)  # 16 tokens, as of old
    assert answer.choices[0].text == wanted
    assert answer.usage.completion_tokens <= 16
    both = client.completions.create(**asked, prompt=[ids, ids[:4]], logprobs=2, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == wanted
    assert both.usage.prompt_tokens == len(ids) + 4
    logprobs = both.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert all(len(one) <= 2 for one in logprobs.top_logprobs)
    pieces = list(client.completions.create(**asked, prompt=text, stream=True))
    assert "".join(chunk.choices[0].text for chunk in pieces) == wanted
    assert pieces[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_a_model_without_a_template_reads_a_question_as_its_training_data_has_it(client, model_folders):
    tokenizer = AutoTokenizer.from_pretrained(model_folders / "plain")
    model = AutoModelForCausalLM.from_pretrained(model_folders / "plain")
    ids = tokenizer(QUESTION[0]["content"], add_special_tokens=False)["input_ids"]
    answer = client.chat.completions.create(model="plain", messages=QUESTION, temperature=0, max_tokens=12)
    assert answer.usage.prompt_tokens == len(ids)
    found = tokenizer.decode(greedy(model, tokenizer, ids, 12), skip_special_tokens=True).strip()
    assert answer.choices[0].message.content == found


def test_a_short_request_joins_a_long_one_under_way_and_is_done_first(client):
    began, done = threading.Event(), []

    def long():
        stream = client.chat.completions.create(
            model="policy", messages=QUESTION, max_tokens=340, stream=True, seed=1, extra_body={"top_k": 1}
        )
        for _ in stream:
            began.set()
        done.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    assert began.wait(30)
    client.chat.completions.create(model="policy", messages=QUESTION, max_tokens=3)
    done.append("short")
    thread.join()
    assert done == ["short", "long"]


def test_who_hangs_up_frees_the_row(client, models):
    stream = client.chat.completions.create(model="policy", messages=QUESTION, max_tokens=340, stream=True, n=3)
    next(stream)
    next(stream)
    assert sum(models["policy"].thread.load) == 3
    stream.close()
    deadline = time.monotonic() + 10
    while sum(models["policy"].thread.load):
        assert time.monotonic() < deadline, "rows go on for nobody"
        time.sleep(0.02)
    with pytest.raises(openai.APITimeoutError):  # one that waits for a whole answer hangs up too
        client.with_options(timeout=0.15).chat.completions.create(
            model="policy", messages=QUESTION, max_tokens=340, n=4
        )
    while sum(models["policy"].thread.load):
        assert time.monotonic() < deadline + 10, "rows go on for nobody"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 4000}, "max_tokens", "at most 1024"),
        ({"max_completion_tokens": 500}, "max_completion_tokens", "leaves room for"),
        ({"n": 40}, "n", "at most 16"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "empty"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"extra_body": {"temprature": 1}}, "temprature", "Unrecognized request argument"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": "word " * 500}]}, "messages", "maximum context length is 400"),
        ({"messages": DIALOGUE[:3]}, "messages", "last message must be the user's"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_said_by_field(client, more, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "policy", "messages": QUESTION, **more})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert words in str(caught.value)


def test_a_model_that_is_not_there_or_scores_writes_nothing(client):
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="POST /score"):
        client.chat.completions.create(model="reward", messages=QUESTION)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_client_of_asyncio_works_too(address, path):
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            if path.startswith("/v1/chat"):
                answers = [client.chat.completions.create(model="policy", messages=QUESTION, seed=1) for _ in range(8)]
            else:
                answers = [client.completions.create(model="policy", prompt="A", seed=1) for _ in range(8)]
            return await asyncio.gather(*answers)

    texts = [str(answer.choices[0]) for answer in asyncio.run(ask())]
    assert len(set(texts)) == 1
