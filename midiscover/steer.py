"""Text generated while features of SAEs are changed, beside the same text without. Reads no store.

A feature's decoder direction is added to what its hook gives, at every position, in the prompt as well:

    add      x + value * W_dec[i]
    clamp    x + (value - f_i(x)) * W_dec[i], so that the SAE would read `value` there
    ablate   clamp to 0

Several changes at one hook are made at once, all from the activations as they came. With `orthogonal`, what x has in an
added direction is taken out before it is added (`ORTHOGONAL_DECOMP` of Neuronpedia).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from midiscover.errors import UserError
from midiscover.interpret import hook_of
from midiscover.lm import LanguageModel
from midiscover.saes import LoadedSae

Mode = Literal["add", "clamp", "ablate"]


class Change(NamedTuple):
    """Of one feature."""

    sae: str
    feature: int
    mode: Mode
    value: float = 0.0


class Piece(NamedTuple):
    """What has been generated so far, by side."""

    token_ids: dict[str, list[int]]
    done: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn."""

    new_tokens: int = 40
    temperature: float = 0.0
    """0: the likeliest."""
    frequency_penalty: float = 0.0
    """Off a token's logit for each time that it was generated."""
    seed: int = 0


def generate(
    lm: LanguageModel,
    prompt: Sequence[int],
    saes: Mapping[str, LoadedSae],
    changes: Sequence[Change],
    sampling: Sampling,
    *,
    sides: Sequence[str] = ("steered", "default"),
    orthogonal: bool = False,
    spared: Collection[int] = (),
) -> Iterator[Piece]:
    """Go on from `prompt`, token by token; the side `steered` with the changes, every other without.

    Both sides run as one batch and draw by generators of the same seed, so that they differ by the changes alone. Ends
    at the model's end-of-text token or after `new_tokens`. UserError for a feature that is not there, and for changes
    of which the model makes no numbers.

    spared: tokens at which nothing is changed, such as the special ones of a chat.
    """
    where = _Where([side == "steered" for side in sides], spared, lm.device)
    edits = _edits(saes, changes, where, orthogonal=orthogonal)
    made: dict[str, list[int]] = {side: [] for side in sides}
    draw = {side: torch.Generator().manual_seed(sampling.seed) for side in sides}
    ended = dict.fromkeys(sides, False)
    ends, takes = _ends(lm), _takes(lm)
    ids = torch.tensor([list(prompt)] * len(sides))
    cache: Any = None
    for _ in range(sampling.new_tokens):
        past = 0 if cache is None else ids.shape[1] - 1
        where.look(ids[:, past:])
        # The hooks stand during one pass only: between two, others may use the model.
        logits, cache = _next(lm, ids[:, past:], past, cache, edits, takes)
        if not logits.amax(1).isfinite().all():
            raise UserError(f"{lm.identity.name} makes no numbers any more of changes this large; give smaller values.")
        chosen = []
        for row, side in enumerate(sides):
            token = _drawn(logits[row], made[side], sampling, draw[side])
            ended[side] = ended[side] or token in ends
            if not ended[side]:
                made[side].append(token)
            chosen.append(token)
        ids = torch.cat([ids, torch.tensor(chosen)[:, None]], dim=1)
        if all(ended.values()):
            break
        yield Piece({side: list(tokens) for side, tokens in made.items()}, False)
    yield Piece(made, True)


def chat_text(lm: LanguageModel, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as the model reads it, up to where it answers. messages: `role` and `content` of each turn.

    UserError for a model without a chat template, and for turns that its template does not take.
    """
    tokenizer: Any = lm.tokenizer
    if not tokenizer.chat_template:
        raise UserError(f"{lm.identity.name} has no chat template, so it knows no turns; steer a completion instead.")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"The chat template of {lm.identity.name} takes no such turns: {error}.") from error


class _Takes(NamedTuple):
    """What a model is given beside token ids."""

    cache: bool
    """Keys and values of what it read before; one that keeps none, as Mamba, reads the whole text for each token."""
    positions: bool
    """By themselves Bamba and MiniMax count anew in every pass; RoBERTa and its kin count from their padding's id, and
    go on by themselves."""


def _takes(lm: LanguageModel) -> _Takes:
    parameters = inspect.signature(lm.model.forward).parameters
    counts = any(hasattr(module, "create_position_ids_from_input_ids") for module in lm.model.modules())
    return _Takes("past_key_values" in parameters, "position_ids" in parameters and not counts)


@torch.inference_mode()
def _next(
    lm: LanguageModel, ids: Tensor, past: int, cache: Any, edits: Mapping[str, Any], takes: _Takes
) -> tuple[Tensor, Any]:
    """Logits [rows, vocab_size] after the last position, float32 on the CPU, and the model's cache of all up to there.

    past: positions before `ids` [rows, tokens], which `cache` holds; None for it where the model keeps none.
    """
    given: dict[str, Any] = {"past_key_values": cache} if takes.cache else {}
    if takes.positions:
        given["position_ids"] = torch.arange(past, past + ids.shape[1], device=lm.device)[None]
    with lm.hooked(edits):
        found = lm.model(input_ids=ids.to(lm.device), use_cache=takes.cache, **given)
    return found.logits[:, -1].float().cpu(), getattr(found, "past_key_values", None)


def _drawn(logits: Tensor, made: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.frequency_penalty and made:
        counts = torch.bincount(torch.tensor(made), minlength=len(logits))
        logits = logits - sampling.frequency_penalty * counts
    if sampling.temperature <= 0:
        return int(logits.argmax())
    # Below 0 and in float64, so that no temperature, however small, makes inf - inf of it.
    shares = ((logits - logits.max()).double() / sampling.temperature).softmax(0).float()
    return int(torch.multinomial(shares, 1, generator=generator))


def _ends(lm: LanguageModel) -> set[int]:
    given: Any = getattr(lm.model.generation_config, "eos_token_id", None)
    own: Any = lm.tokenizer.eos_token_id
    return {token for token in (own, *(given if isinstance(given, list) else [given])) if token is not None}


class _Where:
    """At which positions of a pass something is changed."""

    def __init__(self, steered: Sequence[bool], spared: Collection[int], device: torch.device) -> None:
        self.rows = torch.tensor(steered)[:, None]
        self.spared, self.device = torch.tensor(sorted(spared), dtype=torch.long), device
        self.mask = torch.zeros(0)

    def look(self, ids: Tensor) -> None:
        """Before a pass over token ids [rows, tokens]."""
        self.mask = (self.rows & ~torch.isin(ids, self.spared))[..., None].to(self.device)


@dataclass
class _Site:
    """All changes of one SAE."""

    sae: LoadedSae
    changes: list[Change] = field(default_factory=list)
    seen: Tensor | None = None
    """What a transcoder read in this pass, at the hook before the one that it writes to."""


def _edits(
    saes: Mapping[str, LoadedSae],
    changes: Sequence[Change],
    where: _Where,
    *,
    orthogonal: bool,
) -> dict[str, Any]:
    """Hook -> what happens there."""
    sites: dict[str, _Site] = {}
    for change in changes:
        d_sae = saes[change.sae].module.d_sae
        if not 0 <= change.feature < d_sae:
            raise UserError(f"{change.sae} has no feature {change.feature}; its features are 0 to {d_sae - 1}.")
        sites.setdefault(change.sae, _Site(saes[change.sae])).changes.append(change)
    at: dict[str, list[Any]] = {}
    for name, site in sites.items():
        reads, writes = hook_of(name, site.sae), _writes(name, site.sae)
        if reads != writes:
            at.setdefault(reads, []).append(lambda x, site=site: _note(site, x))
        at.setdefault(writes, []).append(
            lambda x, site=site, same=reads == writes: _moved(site, x, x if same else site.seen, orthogonal=orthogonal)
        )
    return {hook: lambda x, steps=steps: _all(x, steps, where) for hook, steps in at.items()}


def _all(x: Tensor, steps: Sequence[Any], where: _Where) -> Tensor:
    """Every step sees the activations as they came; what they add is summed, where something is to change."""
    moves = [move for step in steps if (move := step(x)) is not None]
    return x if not moves else torch.where(where.mask, (x.float() + sum(moves)).to(x.dtype), x)


def _note(site: _Site, x: Tensor) -> None:
    site.seen = x


def _moved(site: _Site, x: Tensor, read: Tensor | None, *, orthogonal: bool) -> Tensor:
    """What the changes of one SAE add to its hook, [rows, tokens, d_out] float32."""
    module = site.sae.module
    total = torch.zeros_like(x, dtype=torch.float32)
    features = None
    for change in site.changes:
        direction = module.W_dec[change.feature].float()
        if change.mode == "add":
            if orthogonal:
                total -= (x.float() @ direction)[..., None] * direction / direction.pow(2).sum()
            total += change.value * direction
            continue
        if features is None:
            assert read is not None, "a transcoder reads before it writes"
            features = site.sae.encode(read).float()
        wanted = 0.0 if change.mode == "ablate" else change.value
        total += (wanted - features[..., change.feature])[..., None] * direction
    return total


def _writes(name: str, sae: LoadedSae) -> str:
    """The hook that an SAE's decoder writes to."""
    if sae.record is not None:
        return sae.record.get("output_hook") or sae.record["hook"]
    return sae.cfg.get("metadata", {}).get("hf_hook_name_out") or hook_of(name, sae)
