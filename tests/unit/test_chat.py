"""Language models that are asked: one over HTTP by the real client, and one that runs here against its own logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from midiscover import chat
from midiscover.chat import EndpointChat, LocalChat, RefusedError, listed_verdicts
from midiscover.errors import ModelError, StageError, UserError
from tests.llm import KEY, Llm, llm
from tests.tiny import make_tiny_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a> {% endif %}"
)
PASSAGES = ["The river ran.", "It would rain before the evening.", "An empty list.", "She opened the window."]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Llm]:
    with llm() as state:
        for name, value in state.environment().items():
            monkeypatch.setenv(name, value)
        yield state


def test_a_server_is_asked_ten_passages_at_once(server: Llm) -> None:
    asked = EndpointChat("some-model")
    passages = [f"{'rain' if i % 3 else 'sun'} number {i}" for i in range(23)]
    found = asked.which('It fires on the word "rain"', "it fires", passages)
    assert found == [bool(i % 3) for i in range(23)]
    assert len(server.questions) == 3
    assert asked.used["questions"] == 3
    assert asked.used["asked"] == sum(len(question.split()) for question in server.questions)


def test_a_failure_that_passes_is_waited_for(server: Llm) -> None:
    server.failures = [(503, "busy")]
    assert "Explanation" in EndpointChat("some-model").answer("1. a <<b>> c")
    assert not server.failures


@pytest.mark.parametrize(
    ("failure", "error", "told"),
    [
        ((401, "no"), UserError, "refused a question to 'some-model': no."),
        ((404, "The model does not exist"), UserError, "refused a question to 'some-model': The model does not exist."),
        ((400, "too\nlong"), RefusedError, "refused a question to 'some-model': too long."),
        ((429, "slow down"), StageError, "did not answer 1 times: slow down."),
        ((500, "broken"), StageError, "did not answer 1 times: broken."),
    ],
)
def test_what_a_server_refuses_is_told(
    server: Llm, monkeypatch: pytest.MonkeyPatch, failure: tuple[int, str], error: type[Exception], told: str
) -> None:
    monkeypatch.setattr(chat, "ATTEMPTS", 1)
    server.failures = [failure]
    with pytest.raises(error, match=f"^127.0.0.1:\\d+ {told}$"):
        EndpointChat("some-model").answer("?")


def test_a_server_that_is_not_there_is_told(server: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "ATTEMPTS", 1)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(StageError, match="^127.0.0.1:9 did not answer"):
        EndpointChat("some-model").answer("?")


def test_no_key_is_asked_for_and_a_wrong_one_not_told(server: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(UserError, match=r"Incorrect API key provided: Bearer \*\*\*\.$"):
        EndpointChat("some-model").answer("?")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        EndpointChat("some-model")
    assert KEY not in "".join(server.questions)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"choices": [{"message": {"content": [{"type": "text", "text": "So "}, {"text": "it is"}]}}]}, "So it is"),
        ({"choices": [{"message": {"content": None, "refusal": "no"}}]}, ""),
        ({"choices": [{"message": {"content": "  so  "}}], "usage": None}, "so"),
        ({"choices": [{"message": None}]}, None),
        ({"choices": [None]}, None),
        ({"choices": []}, None),
        ({"choices": None}, None),
        ({}, None),
        (b"<html>welcome</html>", None),
        (b'{"choices": [', None),
    ],
)
def test_answers_of_other_servers_are_read_or_told(server: Llm, body: Any, told: str | None) -> None:
    server.bodies = [body if isinstance(body, bytes) else json.dumps(body).encode()]
    if told is not None:
        assert EndpointChat("some-model").answer("?") == told
        return
    with pytest.raises(StageError, match="gave an answer (that is none|without a text)"):
        EndpointChat("some-model").answer("?")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OPENAI_BASE_URL", "localhost:11434/v1", "OPENAI_BASE_URL names no server"),
        ("OPENAI_API_KEY", "sk-\u00e9", "OPENAI_API_KEY holds letters that no key has"),
    ],
)
def test_settings_that_reach_no_server_are_refused(
    server: Llm, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        EndpointChat("some-model")


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("The first [1] fits.\n```json\n[0,0,1]\n```", [False, False, True]),
        ("[true, false, True]", [True, False, True]),
        ("[1, 0, 1] or rather [0, 0, 0]", [False, False, False]),
        ("<think>[1, 1, 1]</think>\n[0, 1, 0]", [False, True, False]),
        ("\\[1, 0, 1,\\]", [True, False, True]),
        ("<think>hm [1, 1, 1]", [None] * 3),
        ("[1, 0]", [None] * 3),
        ("[1, 0, 2]", [None] * 3),
        ("[1, 0, [1]]", [None] * 3),
        ("yes, no, yes", [None] * 3),
        ("", [None] * 3),
    ],
)
def test_a_list_is_read_out_of_what_is_said(text: str, verdicts: list[bool | None]) -> None:
    assert listed_verdicts(text, 3) == verdicts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_tiny_model("llama", tmp_path_factory.mktemp("chat") / "model")
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def test_a_model_here_says_yes_to_the_half_that_it_finds_likelier(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "ANSWER_TOKENS", 32)
    local = LocalChat(str(folder), None, "cpu")
    lm, odds = local.lm, []
    for passage in PASSAGES:
        text = chat._WHETHER.format(about="About.", claim="it rains", passage=passage)
        ids: Any = lm.tokenizer(f"<user> {text}\n<a> ", add_special_tokens=False).input_ids
        with torch.no_grad():
            share = lm.model(torch.tensor([ids])).logits[0, -1].double().softmax(0)
        first = {word: lm.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "yes", " Yes")}
        other = {word: lm.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("No", "no", " No")}
        odds.append(float(sum(share[i] for i in first.values()) / sum(share[i] for i in other.values())))
    found = local.which("About.", "it rains", PASSAGES)
    best = sorted(range(4), key=lambda i: odds[i])[2:]
    assert found == [i in best for i in range(4)]
    assert local.used["questions"] == 4
    answer = local.answer("What?")
    assert answer == LocalChat(str(folder), None, "cpu").answer("What?")
    assert local.used["answered"] > 4


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    made = make_tiny_model("llama", tmp_path / "model")
    with pytest.raises(ModelError, match="has no chat template, so it answers nothing"):
        LocalChat(str(made), None, "cpu")


def test_a_question_that_is_too_long_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match="A question has .* tokens, and .* reads .*; give a model with a longer context"
    ):
        LocalChat(str(folder), None, "cpu").answer("rain " * 3000)
