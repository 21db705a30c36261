"""Language models that are asked questions: one behind an OpenAI-compatible address, or one that runs here."""

from __future__ import annotations

import json
import os
import re
import statistics
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from midiscover.config import ModelConfig
from midiscover.errors import ModelError, StageError, UserError

if TYPE_CHECKING:
    from midiscover.lm import LanguageModel

KEY, ADDRESS = "OPENAI_API_KEY", "OPENAI_BASE_URL"
"""From the environment alone, as the client of `openai` reads them."""
ATTEMPTS = 6
TIMEOUT_SECONDS = 120.0
ANSWER_TOKENS = 256
"""That a model which runs here says at most; an endpoint has limits of its own."""
LISTED = 10
"""Passages that an endpoint is asked about at once."""
_LIST = re.compile(r"\[([^\[\]]*)\]")
_THOUGHT = re.compile(r"^.*</think>|<think>.*$", re.DOTALL)
_TRUTHS = {"1": True, "true": True, "0": False, "false": False}

_WHICH = """\
{about}

Of which of the following passages is it true that {claim}?

{passages}

End with one line that holds nothing but a JSON list of {count} numbers, 1 for each passage of which it is true and 0 \
for each other, in order, such as {example}."""

_WHETHER = """\
{about}

Here is a passage: {passage}

Is it true that {claim}? Answer with Yes or No."""


class RefusedError(UserError):
    """The model answers others, and not this question: it is too long, or against its rules."""


class Chat(Protocol):
    """A language model that is asked one question at a time, without memory of the last."""

    name: str
    at_once: int
    """Questions that it is asked side by side."""
    identity: dict[str, str]
    """What tells it from others of its name, as far as that is known."""

    def answer(self, question: str) -> str:
        """What it says. RefusedError where it refuses this question, UserError where it refuses any, StageError where
        it stayed away."""
        ...

    def which(self, about: str, claim: str, passages: Sequence[str]) -> list[bool | None]:
        """Of each passage whether the claim is true; None where the answer can't be read. Errors as of `answer`."""
        ...

    @property
    def used(self) -> dict[str, int]:
        """`questions` so far, and the tokens that they took, `asked` and `answered`."""
        ...


class _Counted:
    """Counts of several threads."""

    def __init__(self) -> None:
        self._used = {"questions": 0, "asked": 0, "answered": 0}
        self._lock = threading.Lock()

    @property
    def used(self) -> dict[str, int]:
        return dict(self._used)

    def count(self, asked: int, answered: int) -> None:
        """One question more."""
        with self._lock:
            for name, more in (("questions", 1), ("asked", asked), ("answered", answered)):
                self._used[name] += more


class EndpointChat(_Counted):
    """A model of a service, or of a server of one's own (vLLM, Ollama, llama.cpp), by OpenAI's chat completions."""

    def __init__(self, model: str, at_once: int = 8) -> None:
        """UserError where the client is not installed or no key is set; asks nothing yet."""
        super().__init__()
        try:
            import openai
        except ImportError:
            raise UserError(
                "--llm needs the client of OpenAI-compatible servers; `pip install 'midiscover[explain]'` brings it."
            ) from None
        if not os.environ.get(KEY):
            raise UserError(
                f"{KEY} is not set; --llm takes the key from there, and the address from {ADDRESS}. "
                "A server that asks for no key takes any word."
            )
        if not os.environ[KEY].isascii():
            raise UserError(f"{KEY} holds letters that no key has; give the key of the server, or any word.")
        self.name, self.at_once, self.identity = model, at_once, {}
        try:
            self._client = openai.OpenAI(max_retries=ATTEMPTS - 1, timeout=TIMEOUT_SECONDS)
        except Exception as error:  # of its settings: an address that is none
            raise UserError(f"{ADDRESS} is no address of a server: {error}") from None
        place = urlsplit(str(self._client.base_url))
        if not place.hostname:
            raise UserError(f"{ADDRESS} names no server; give its address, such as http://127.0.0.1:11434/v1.")
        self._at = f"{place.hostname}{f':{place.port}' if place.port else ''}"

    def answer(self, question: str) -> str:
        import openai

        try:
            reply = self._client.chat.completions.create(
                model=self.name, messages=[{"role": "user", "content": question}]
            )
        except (openai.RateLimitError, openai.InternalServerError) as error:
            raise StageError(f"{self._at} did not answer {ATTEMPTS} times: {_told(error)}") from error
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise RefusedError(f"{self._at} refused a question to '{self.name}': {_told(error)}") from error
        except openai.APIStatusError as error:
            raise UserError(f"{self._at} refused a question to '{self.name}': {_told(error)}") from error
        except openai.APIConnectionError as error:
            raise StageError(f"{self._at} did not answer {ATTEMPTS} times: {error}") from error
        except (openai.OpenAIError, ValueError) as error:  # also what is no JSON
            raise StageError(f"{self._at} gave an answer that is none: {error}") from error
        usage = getattr(reply, "usage", None)
        self.count(*(int(getattr(usage, name, 0) or 0) for name in ("prompt_tokens", "completion_tokens")))
        try:
            return _text(reply.choices[0].message.content)
        except (AttributeError, LookupError, TypeError):
            raise StageError(f"{self._at} gave an answer without a text; is it an OpenAI-compatible server?") from None

    def which(self, about: str, claim: str, passages: Sequence[str]) -> list[bool | None]:
        answers: list[bool | None] = []
        for start in range(0, len(passages), LISTED):
            part = passages[start : start + LISTED]
            listed = "\n".join(f"{number}. {text}" for number, text in enumerate(part, start=1))
            example = json.dumps([int(i % 3 == 0) for i in range(len(part))])
            asked = _WHICH.format(about=about, claim=claim, passages=listed, count=len(part), example=example)
            answers += listed_verdicts(self.answer(asked), len(part))
        return answers


class LocalChat(_Counted):
    """A causal language model with a chat template, in this process; it answers with the likeliest words.

    Small models write no lists. So it is asked of one passage at a time, and true are those, the half of all, of which
    Yes is likeliest beside No: a model that says Yes to everything is told nothing by that.
    """

    at_once = 1

    def __init__(self, model: str, store: str | None, device: str) -> None:
        """model: as `model.id` in a config. ModelError where it is not there or has no chat template."""
        super().__init__()
        from midiscover.lm import LanguageModel
        from midiscover.models import resolve_model

        identity = resolve_model(ModelConfig(id=model), store)
        self.lm: LanguageModel = LanguageModel.load(identity, dtype="auto", device=device)
        self.name, self.identity = identity.name, {"digest": identity.digest}
        if not self.lm.tokenizer.chat_template:
            raise ModelError(f"{identity.name} has no chat template, so it answers nothing; give an instructed model.")

    def answer(self, question: str) -> str:
        from midiscover.steer import Sampling, generate

        lm, ids = self.lm, self._asked(question, ANSWER_TOKENS)
        *_, last = generate(lm, ids, {}, (), Sampling(new_tokens=ANSWER_TOKENS), sides=("default",))
        made = last.token_ids["default"]
        self.count(len(ids), len(made))
        return str(lm.tokenizer.decode(made, skip_special_tokens=True))

    def which(self, about: str, claim: str, passages: Sequence[str]) -> list[bool | None]:
        odds = [self._odds(_WHETHER.format(about=about, claim=claim, passage=passage)) for passage in passages]
        middle = statistics.median(odds)
        return [None if one == middle else one > middle for one in odds]

    def _odds(self, question: str) -> float:
        """Logarithm of how much likelier Yes is than No as the answer's first word."""
        import torch

        ids = self._asked(question, 1)
        logits = self.lm.logits(torch.tensor([ids]))[0, -1].double()
        self.count(len(ids), 1)
        yes, no = (
            logits[[self.lm.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]].logsumexp(0)
            for words in (("Yes", "yes", " Yes"), ("No", "no", " No"))
        )
        return float(yes - no)

    def _asked(self, question: str, answer: int) -> list[int]:
        """A question as the model reads it. UserError where it is too long, with `answer` tokens after it."""
        from midiscover.attach import context_length
        from midiscover.steer import chat_text

        lm = self.lm
        text = chat_text(lm, [{"role": "user", "content": question}])
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        most = context_length(lm.model.config)
        if most is not None and len(ids) + answer > most:
            raise UserError(
                f"A question has {len(ids):,} tokens, and {self.name} reads {most:,}, an answer of {answer} among "
                "them; give a model with a longer context, or a smaller --shown."
            )
        return ids


def thought_out(answer: str) -> str:
    """An answer without what a model thought before it."""
    return _THOUGHT.sub("", answer).strip()


def listed_verdicts(answer: str, count: int) -> list[bool | None]:
    """The last list of `count` zeros and ones in an answer; as many None where it holds none of them."""
    for text in reversed(_LIST.findall(thought_out(answer).replace("\\", ""))):
        words = [word.strip().lower() for word in text.strip().rstrip(",").split(",")]
        if len(words) == count and all(word in _TRUTHS for word in words):
            return [_TRUTHS[word] for word in words]
    return [None] * count


def _text(content: Any) -> str:
    """The text of a message: itself, or that of its parts; none of one that says nothing."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return "" if content is None else content.strip()


def _told(error: Exception) -> str:
    """What the server says, in one line, without the key that some of them repeat."""
    body = getattr(error, "body", None)
    told = " ".join(str((body.get("message") if isinstance(body, dict) else None) or error).split())
    return told.replace(os.environ.get(KEY) or KEY, "***")[:300].rstrip(".") + "."
