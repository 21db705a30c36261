"""Texts through the language model and SAEs: which features fire on each token, and which on a text as a whole.

Training masks the first position of a window, where attention puts norms that mean nothing. So each text gets a token
in front, whose row is dropped: every token of the text itself counts. Reads no store; that is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midiscover.attach import context_length
from midiscover.config import Dtype
from midiscover.errors import UserError
from midiscover.lm import LanguageModel
from midiscover.origin import resolve_origin, run_config
from midiscover.saes import LoadedSae
from midiscover.shuffled import shuffle_weights_
from midiscover.tokens import TokenStrings

BATCH_TOKENS = 4096
"""Of a forward pass, padding included."""
ENCODED_TOKENS = 512
"""Rows that an SAE encodes at once: codes of 20,480 features take 80 KB a row."""
SHOWN_CHARACTERS = 40
"""Of a text that an error names."""


class EncodedText(NamedTuple):
    """One text as its tokens and what the SAEs make of them."""

    number: int
    """Place in the given texts."""
    token_ids: list[int]
    """Of the text alone, without the token put in front."""
    tokens: list[str]
    codes: dict[str, Tensor]
    """SAE name -> [t, d_sae] float32, on the CPU."""
    activations: dict[str, Tensor]
    """Hook -> [t, d_in] float32, on the CPU; only where asked for."""


class TokenFeature(NamedTuple):
    """A feature that fires on a token."""

    feature: int
    value: float


class TextFeature(NamedTuple):
    """A feature that fires in a text."""

    feature: int
    max: float
    position: int
    """Of the token where it is highest."""
    mean: float
    """Over all tokens of the text, those where it is 0 included."""
    values: list[float]
    """One for each token."""


class TextSummary(NamedTuple):
    """The strongest features of one SAE on one text; those that fire nowhere are left out."""

    tokens: list[str]
    per_token: list[list[TokenFeature]]
    """For each token, highest first."""
    by_max: list[TextFeature]
    by_mean: list[TextFeature]


def encode_texts(
    lm: LanguageModel,
    saes: Mapping[str, LoadedSae],
    texts: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    activations: bool = False,
) -> Iterator[EncodedText]:
    """Encode texts by several SAEs of one model, in the order given; one forward pass of a batch serves all of them.

    batch_tokens: of a forward pass, padding included. activations: keep those of the hooks as well. UserError, before
    any pass, for a text without a token, one longer than the model's context, or an SAE that does not fit the model.
    """
    hooks = {name: hook_of(name, sae) for name, sae in saes.items()}
    token_ids, start = tokenised(lm, texts), start_token(lm, saes.values())
    front = [] if start is None else [start]
    refuse_too_long(lm, texts, token_ids, len(front))
    strings = TokenStrings(lm.tokenizer)
    for batch in batches([len(front) + len(ids) for ids in token_ids], batch_tokens):
        rows = activations_of(lm, [front + token_ids[i] for i in batch], len(front), dict.fromkeys(hooks.values()))
        for name, hook in hooks.items():
            require_width(lm, name, saes[name], hook, rows[hook][0].shape[-1])
        for part in batches([len(token_ids[i]) for i in batch], ENCODED_TOKENS):
            codes = {name: _encoded(saes[name], [rows[hook][j] for j in part]) for name, hook in hooks.items()}
            for place, j in enumerate(part):
                yield EncodedText(
                    number=batch[j],
                    token_ids=token_ids[batch[j]],
                    tokens=strings(token_ids[batch[j]]),
                    codes={name: found[place] for name, found in codes.items()},
                    activations={hook: x[j].float().cpu() for hook, x in rows.items()} if activations else {},
                )


def summarise(text: EncodedText, sae: str, *, top: int = 10) -> TextSummary:
    """The `top` strongest features of an SAE (a key of `text.codes`) on each token, and on the text by max and mean."""
    codes = text.codes[sae]
    values, indices = codes.topk(min(top, codes.shape[1]), dim=1)
    per_token = [
        [TokenFeature(int(index), float(value)) for index, value in zip(*pair, strict=True) if value > 0]
        for pair in zip(indices, values, strict=True)
    ]
    highest, mean = codes.max(dim=0), codes.mean(dim=0)

    def strongest(score: Tensor) -> list[TextFeature]:
        best = score.topk(min(top, len(score)))
        return [
            TextFeature(i, float(highest.values[i]), int(highest.indices[i]), float(mean[i]), codes[:, i].tolist())
            for i, found in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if found > 0
        ]

    return TextSummary(text.tokens, per_token, strongest(highest.values), strongest(mean))


def load_language_model(
    saes: Sequence[LoadedSae], store: str | None, *, model: str | None = None, device: str = "cpu"
) -> LanguageModel:
    """The one language model whose activations all these SAEs read.

    store: where `store:NAME` is looked up. model: where it lies, in place of what the records say. UserError where the
    SAEs are of different models or one has no record; ModelError where the model is not there or is another one.
    """
    if not saes:
        raise UserError("No SAE is given; name at least one.")
    return load_model_of([sae.record for sae in saes], store, model=model, device=device)


def load_model_of(
    records: Sequence[Mapping[str, Any] | None],
    store: str | None,
    *,
    model: str | None = None,
    device: str = "cpu",
    dtype: Dtype | None = None,
) -> LanguageModel:
    """The same, by the records of the SAEs (one at least). dtype: in place of what their activations were read in."""
    first = records[0]
    identity = resolve_origin(first, store, model)
    for record in records[1:]:
        if record is None:
            resolve_origin(None, store)
        elif _made_on(record) != _made_on(first):
            names = " and ".join(_model_words(one) for one in (first, record) if one is not None)
            raise UserError(f"These SAEs read different language models: {names}; give those of one model at a time.")
    assert first is not None
    config = run_config(first).model
    lm = LanguageModel.load(identity, dtype=dtype or config.dtype, attention=config.attention, device=device)
    if config.weights == "shuffled":
        shuffle_weights_(lm.model)
    return lm


def start_token(lm: LanguageModel, saes: Iterable[LoadedSae]) -> int | None:
    """The token that is put in front of a text: BOS where a corpus of these SAEs had it, else what stands between two
    documents. None for a tokenizer with neither."""
    bos: Any = lm.tokenizer.bos_token_id
    eos: Any = lm.tokenizer.eos_token_id
    with_bos = any(sae.cfg.get("metadata", {}).get("prepend_bos") for sae in saes)
    order = (bos, eos) if with_bos else (eos, bos)
    return next((token for token in order if token is not None), None)


def hook_of(name: str, sae: LoadedSae) -> str:
    """The hook that an SAE reads. UserError where neither its record nor its cfg.json tells."""
    metadata = sae.cfg.get("metadata", {})
    hook = sae.record["hook"] if sae.record is not None else metadata.get("hf_hook_name") or metadata.get("hook_name")
    if not hook:
        raise UserError(f"The cfg.json of {name} names no hook, so it is unknown which activations the SAE reads.")
    return hook


def tokenised(lm: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """Ids as a corpus has them: without special tokens. UserError for a text without a token."""
    if not texts:
        return []
    found = lm.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    token_ids: Any = found
    for number, (text, ids) in enumerate(zip(texts, token_ids, strict=True), start=1):
        if not ids:
            raise UserError(f"Text {number} of {len(texts)}, {_shown(text)}, holds no token; give at least a word.")
    return token_ids


def refuse_too_long(
    lm: LanguageModel, texts: Sequence[str], token_ids: Sequence[Sequence[int]], front: int, most: int | None = None
) -> None:
    """UserError for a text that, with `front` tokens beside it, is longer than the model's context, or than `most`."""
    limit = context_length(lm.model.config)
    if most is not None:
        limit = most + front if limit is None else min(limit, most + front)
    if limit is not None and front >= limit:
        raise UserError(
            f"{lm.identity.name} reads at most {limit:,} tokens, and {front:,} are to stand beside the text, so that "
            "none of it fits; ask for fewer new tokens."
        )
    for number, (text, ids) in enumerate(zip(texts, token_ids, strict=True), start=1):
        if limit is not None and front + len(ids) > limit:
            raise UserError(
                f"Text {number} of {len(texts)}, {_shown(text)}, has {len(ids):,} tokens, and {lm.identity.name} reads "
                f"at most {limit - front:,} here; shorten it or cut it in pieces."
            )


def batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Places of consecutive items whose number times the longest of them is at most `limit`; at least one each."""
    batch: list[int] = []
    longest = 0
    for place, length in enumerate(lengths):
        if batch and max(longest, length) * (len(batch) + 1) > limit:
            yield batch
            batch, longest = [], 0
        batch.append(place)
        longest = max(longest, length)
    if batch:
        yield batch


def activations_of(
    lm: LanguageModel, token_ids: Sequence[list[int]], front: int, hooks: Iterable[str]
) -> dict[str, list[Tensor]]:
    """Hook -> for each text [t, d_in], without the `front` rows put before it. One forward pass."""
    lengths = [len(ids) for ids in token_ids]
    ids = torch.zeros(len(token_ids), max(lengths), dtype=torch.long)
    for row, text in zip(ids, token_ids, strict=True):
        row[: len(text)] = torch.tensor(text)
    attention = None
    if min(lengths) < max(lengths):
        attention = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    found = lm.activations(ids, hooks, attention_mask=attention)
    return {hook: [row[front:n] for row, n in zip(x, lengths, strict=True)] for hook, x in found.items()}


def _encoded(sae: LoadedSae, rows: Sequence[Tensor]) -> list[Tensor]:
    """For each text [t, d_sae] float32 on the CPU."""
    codes = sae.encode(torch.cat(list(rows))).float().cpu()
    return list(codes.split([len(x) for x in rows]))


def require_width(lm: LanguageModel, name: str, sae: LoadedSae, hook: str, width: int) -> None:
    """UserError for an SAE that does not fit what its hook gives."""
    if sae.module.d_in != width:
        raise UserError(
            f"{name} reads activations of width {sae.module.d_in}, and '{hook}' of {lm.identity.name} has {width}; it "
            "was made on another model or hook."
        )


def _made_on(record: Mapping[str, Any] | None) -> tuple[str, str]:
    model = record["lineage"]["model"] if record is not None else {}
    return model["digest"], model.get("weights", "trained")


def _model_words(record: Mapping[str, Any]) -> str:
    digest, weights = _made_on(record)
    shuffled = " with shuffled weights" if weights == "shuffled" else ""
    return f"{record['id']} that of {record['lineage']['model']['name']} ({digest[:12]}){shuffled}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")
