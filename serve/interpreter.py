"""A language model and SAEs that answer queries about texts. No Ray: `replicas.py` makes it a deployment.

One forward pass of a batch serves all SAEs that its texts are asked about, and ends at the deepest hook among them. All
work with the model happens in one thread, so that the event loop stays free and no two passes meet; texts are cut into
tokens in another; SAEs are loaded in others, so that a store that stays away holds up nobody who needs nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from midiscover.cards import default_device, is_out_of_memory
from midiscover.cores import compute_on, cores
from midiscover.cutting import cut_after, holds
from midiscover.errors import MiDiscoverError, UserError
from midiscover.features.concept_scores import encoded_scores
from midiscover.features.concepts import ConceptSettings, Judge
from midiscover.features.modules import SAE, read_module
from midiscover.interpret import (
    activations_of,
    batches,
    hook_of,
    load_model_of,
    refuse_too_long,
    require_width,
    start_token,
    tokenised,
)
from midiscover.models import model_type
from midiscover.saes import LoadedSae
from midiscover.serving import ServeConfig
from midiscover.steer import Change, Piece, Sampling, chat_text, generate
from midiscover.store.storage import open_store
from midiscover.tokens import PIECE, TokenStrings
from serve.answers import answer_query, nearest_rows
from serve.batching import TokenBatcher
from serve.exchange import Found, Front, Problem, Query, SteerPiece, SteerRequest, TextAnswer
from serve.problems import answers_problems, problem_of
from serve.shelf import ActivationCache, SaeShelf, SaeUnavailableError

Result = TypeVar("Result")
LOADERS = 4
log = logging.getLogger("midiscover.serve")


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """One text of a batch: whole ids, how many rows in front are left out, and what is asked with which SAE."""

    ids: list[int]
    front: int
    asked: Sequence[tuple[Query, LoadedSae | None, str]]
    """Query, its SAE, its hook."""


class Interpreter:
    """The model that an SAE with this record reads, and any SAE of the store that reads the same model."""

    def __init__(self, config: ServeConfig, record: Mapping[str, Any]) -> None:
        """Loads the model. Errors of a model that is not there are `MiDiscoverError`s."""
        self.config = config
        self.device = _device(config)
        if self.device == "cpu":  # Ray gives an actor as many as it has CPUs
            compute_on(config.threads or max(1, cores() // config.replicas))
        self.storage = open_store(config.store, create=False, patient=False)
        self.shelf = SaeShelf(self.storage, self.device, config.sae_bytes)
        self.cache = ActivationCache(config.cache_bytes)
        self._record = record
        self.lm = self._load([record["hook"]])
        self._model_type = model_type(self.lm.identity)
        self.strings = TokenStrings(self.lm.tokenizer)
        self._specials = set(self.lm.tokenizer.all_special_ids)
        self._compute = ThreadPoolExecutor(1, "compute")
        self._loading = ThreadPoolExecutor(LOADERS, "load")
        self._tokenising = ThreadPoolExecutor(1, "tokens")
        self._batcher: TokenBatcher[_Item, list[Found]] = TokenBatcher(
            self._run, lambda item: len(item.ids), config.batch_tokens, self._compute
        )
        self.done = {"texts": 0, "tokens": 0, "batches": 0, "generated_tokens": 0}
        self._broken: str | None = None

    def _load(self, hooks: Sequence[str]) -> Any:
        lm = load_model_of([self._record], self.storage.uri, device=self.device, dtype=self.config.dtype)
        if not self.config.steering:
            cut_after(lm, hooks)
        return lm

    # What is asked

    @answers_problems
    async def read(self, texts: Sequence[str], queries: Sequence[Query], front: Front) -> list[TextAnswer]:
        """Answer all queries about each text; see `exchange.Model`."""
        saes = await self._saes({query.sae for query in queries if query.sae})
        asked = [(query, saes.get(query.sae), query.hook or hook_of(query.sae, saes[query.sae])) for query in queries]
        tokens = await self._in_tokenising(lambda: self._tokens(texts, front, list(saes.values())))
        items = [_Item(ids, dropped, asked) for ids, dropped in tokens]
        count = sum(len(item.ids) - item.front for item in items)
        self._refuse_large(sum(query.numbers(count) for query in queries))
        found = await self._batcher.submit(items) if queries else [[] for _ in items]
        self._refuse_large(sum(one.value.size + one.values.size for each in found for one in each))
        return await self._in_tokenising(
            lambda: [self._answer(item, each, front) for item, each in zip(items, found, strict=True)]
        )

    @answers_problems
    async def tokenise(self, text: str, front: Front) -> TextAnswer:
        """The tokens alone."""
        ((ids, dropped),) = await self._in_tokenising(lambda: self._tokens([text], front, []))
        return self._answer(_Item(ids, dropped, []), [], front)

    @answers_problems
    async def concept(self, name: str, saes: Sequence[str], top: int) -> dict[str, Any]:
        """SAE -> the judged features of a concept module; see `midiscover.features.concepts`.

        A forward pass and an SAE at a time, so that others' requests come between, and nothing goes on for nobody.
        """
        concept = read_module(name)
        loaded = await self._saes(set(saes))
        self._refuse_wide(loaded)
        asked = [(Query(sae=sae), found, hook_of(sae, found)) for sae, found in loaded.items()]
        texts = [*concept.texts, *concept.controls]

        def cut() -> tuple[list[_Item], list[list[str]]]:
            tokens = self._tokens(texts, "corpus", list(loaded.values()), ours=True)
            items = [_Item(ids, front, asked) for ids, front in tokens]
            return items, [self.strings(item.ids[item.front :]) for item in items]

        items, strings = await self._in_tokenising(cut)
        rows: list[dict[str, Tensor]] = []
        for places in batches([len(item.ids) for item in items], self.config.batch_tokens):
            rows += await self._in_compute(partial(self._activations, [items[place] for place in places]))

        def judged(sae: str, loaded: LoadedSae, hook: str) -> dict[str, Any]:
            x = [found[hook][item.front :] for found, item in zip(rows, items, strict=True)]
            require_width(self.lm, sae, loaded, hook, x[0].shape[-1])
            scores = encoded_scores(loaded.encode, x, with_peak=True)
            return Judge(concept, ConceptSettings(top_features=top, shuffles=200)).document({SAE: scores}, strings)

        return {query.sae: await self._in_compute(partial(judged, query.sae, sae, hook)) for query, sae, hook in asked}

    @answers_problems
    async def direction(self, sae: str, feature: int, which: Literal["encoder", "decoder"]) -> list[float]:
        """A feature's column of W_enc or row of W_dec."""
        module = (await self._saes({sae}))[sae].module
        _require_feature(sae, feature, module.d_sae)
        return (module.W_enc[:, feature] if which == "encoder" else module.W_dec[feature]).tolist()

    @answers_problems
    async def nearest(self, sae: str, vector: Sequence[float] | int, top: int) -> list[tuple[int, float]]:
        """Features whose decoder directions are nearest by cosine, a feature itself left out."""
        module = (await self._saes({sae}))[sae].module
        if isinstance(vector, int):
            _require_feature(sae, vector, module.d_sae)
            direction = module.W_dec[vector]
        else:
            direction = torch.tensor(vector, device=module.W_dec.device)
            if direction.shape != module.W_dec.shape[1:]:
                raise UserError(f"The vector has {len(vector)} numbers; {sae} writes {module.W_dec.shape[1]}.")

        besides = vector if isinstance(vector, int) else None
        return await self._in_compute(partial(nearest_rows, module.W_dec, direction, top, besides))

    async def steer(self, request: SteerRequest) -> AsyncIterator[SteerPiece | Problem]:
        """Generate, token by token."""
        try:
            if not self.config.steering:
                raise UserError("This deployment keeps no whole language model, so it can't generate; set steering.")
            saes = await self._saes({edit.sae for edit in request.edits})
            prompt, ids = await self._in_tokenising(lambda: self._prompt(request, list(saes.values())))
            pieces = self._pieces(request, ids, saes)
            counted = 0
            while (piece := await self._in_compute(partial(next, pieces, None))) is not None:
                made = sum(map(len, piece.token_ids.values()))
                self.done["generated_tokens"] += made - counted
                counted = made
                texts = {side: self._text(made) for side, made in piece.token_ids.items()}
                if not piece.done:  # the beginning of a character would be another one in the next piece
                    texts = {side: text.rstrip(PIECE) for side, text in texts.items()}
                yield SteerPiece(texts, piece.done, prompt)
        except MiDiscoverError as error:
            yield problem_of(error)

    async def facts(self) -> dict[str, Any]:
        """What it holds and has done."""
        return {
            "model": self.lm.identity.name,
            "model_type": self._model_type,
            "steering": self.config.steering,
            "device": self.device,
            "saes": self.shelf.ids,
            "sae_bytes": self.shelf.bytes,
            "sae_loads": self.shelf.loads,
            "cache_bytes": self.cache.bytes,
            "cache_hits": self.cache.hits,
            "cache_misses": self.cache.misses,
            **self.done,
        }

    def check_health(self) -> None:
        """Raises where the model has failed: a replica that says so is replaced."""
        if self._broken is not None:
            raise RuntimeError(self._broken)

    # How it is answered

    async def _saes(self, names: set[str]) -> dict[str, LoadedSae]:
        """Those that are not loaded yet are loaded side by side."""
        loop = asyncio.get_running_loop()
        found = {name: self.shelf.held(name) for name in sorted(names)}
        missing = [name for name, sae in found.items() if sae is None]
        if missing and len(found) > 1:
            await loop.run_in_executor(self._loading, self.shelf.require_room, list(found))
        for name, sae in zip(
            missing,
            await asyncio.gather(*(loop.run_in_executor(self._loading, self.shelf.get, name) for name in missing)),
            strict=True,
        ):
            log.info("sae_loaded", extra={"fields": {"sae": name}})
            found[name] = sae
        loaded = {name: sae for name, sae in found.items() if sae is not None}
        self._require_model(loaded)
        return loaded

    def _require_model(self, saes: dict[str, LoadedSae]) -> None:
        digest = self.lm.identity.digest
        for name, sae in saes.items():
            if sae.record is None:
                raise SaeUnavailableError(f"{name} has no record.json, so its language model is unknown.")
            if sae.record["lineage"]["model"]["digest"] != digest:
                made_on = sae.record["lineage"]["model"]["name"]
                raise UserError(f"{name} reads {made_on}, and this interpreter runs {self.lm.identity.name}.")

    def _tokens(
        self, texts: Sequence[str], front: Front, saes: Sequence[LoadedSae], new_tokens: int = 0, *, ours: bool = False
    ) -> list[tuple[list[int], int]]:
        """Of each text its ids with what stands before them, and how many of those rows are left out.

        ours: texts of the deployment itself, for which `limits.tokens` is not meant.
        """
        found = tokenised(self.lm, texts)
        start = start_token(self.lm, saes) if front == "corpus" else self._bos() if front == "bos" else None
        most = None if ours else self.config.limits.tokens
        refuse_too_long(self.lm, texts, found, (start is not None) + new_tokens, most)
        if start is None:
            return [(ids, 0) for ids in found]
        if front == "corpus":
            return [([start, *ids], 1) for ids in found]
        return [(ids if ids[0] == start else [start, *ids], 0) for ids in found]

    def _prompt(self, request: SteerRequest, saes: Sequence[LoadedSae]) -> tuple[str, list[int]]:
        """What is gone on from, as text and as ids."""
        prompt = chat_text(self.lm, request.messages) if request.messages else request.prompt
        ((ids, _),) = self._tokens([prompt], request.front, saes, request.new_tokens)
        return prompt, ids

    def _bos(self) -> int | None:
        bos: Any = self.lm.tokenizer.bos_token_id
        return self.lm.tokenizer.eos_token_id if bos is None else bos

    def _answer(self, item: _Item, found: list[Found], front: Front) -> TextAnswer:
        ids = item.ids[item.front :]
        special = [token in self._specials for token in ids]
        # Neuronpedia's server names each token by itself.
        strings = self.strings.in_text(ids) if front == "corpus" else self.strings(ids)
        return TextAnswer(ids, strings, special, self._begins(ids), found)

    def _begins(self, ids: Sequence[int]) -> bool:
        """Whether with BOS."""
        return list(ids[:1]) == [self._bos()]

    def _text(self, ids: Sequence[int]) -> str:
        return self.lm.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _refuse_large(self, numbers: int) -> None:
        most = self.config.limits.numbers
        if numbers > most:
            raise UserError(
                f"The answer would hold {numbers:,} activations, and at most {most:,} are given at once; "
                "ask about fewer texts, SAEs or features."
            )

    def _refuse_wide(self, saes: Mapping[str, LoadedSae]) -> None:
        count, most = sum(sae.module.d_sae for sae in saes.values()), self.config.limits.judged
        if len(saes) > 1 and count > most:
            raise UserError(
                f"These {len(saes)} SAEs have {count:,} features, and at most {most:,} are judged at once; ask fewer."
            )

    async def _in_compute(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._compute, self._noted, work)

    def _noted(self, work: Callable[[], Result]) -> Result:
        """What `work` with the model gives; its failure is kept for `check_health`, unless only memory ran out."""
        try:
            return work()
        except RuntimeError as error:  # of torch, as of a card that fell off
            reason = str(error).partition("\n")[0] or type(error).__name__
            if not is_out_of_memory(error):
                self._broken = f"The language model failed: {reason}"
                log.error("model_failed", extra={"fields": {"reason": self._broken}})
                raise
        # Outside the handler, so that what the error's traceback held is free by now.
        torch.cuda.empty_cache()
        log.warning("out_of_memory", extra={"fields": {"reason": reason}})
        raise SaeUnavailableError("There is no memory left for this now; ask for less.")

    async def _in_tokenising(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, work)

    def _pieces(self, request: SteerRequest, ids: list[int], saes: dict[str, LoadedSae]) -> Iterator[Piece]:
        return generate(
            self.lm,
            ids,
            saes,
            [Change(edit.sae, edit.feature, edit.mode, edit.value) for edit in request.edits],
            Sampling(
                new_tokens=request.new_tokens,
                temperature=request.temperature,
                frequency_penalty=request.frequency_penalty,
                seed=request.seed,
            ),
            sides=request.sides,
            orthogonal=request.method == "orthogonal",
            spared=() if request.steer_special else self._specials,
        )

    def _run(self, items: Sequence[_Item]) -> list[list[Found] | Exception]:
        """One batch, in the compute thread."""
        try:
            rows = self._noted(partial(self._activations, items))
        except RuntimeError:
            raise
        except Exception as error:  # of somebody's hooks; whose they are is seen when each is run alone
            return [error] if len(items) == 1 else [self._run([item])[0] for item in items]
        self.done["batches"] += 1
        self.done["texts"] += len(items)
        self.done["tokens"] += sum(len(item.ids) for item in items)
        answers: list[list[Found] | Exception] = []
        for item, found in zip(items, rows, strict=True):
            try:
                answers.append([self._found(*asked, found, item) for asked in item.asked])
            except Exception as error:  # whatever it is, it is this item's own
                answers.append(error)
        return answers

    def _found(self, query: Query, sae: LoadedSae | None, hook: str, rows: dict[str, Tensor], item: _Item) -> Found:
        x = rows[hook]
        if query.skip_first and not self._begins(item.ids):
            query = replace(query, skip_first=False)
        if sae is not None:
            require_width(self.lm, query.sae, sae, hook, x.shape[-1])
        found = answer_query(query, sae, x[item.front :])
        self._refuse_large(found.value.size)
        return found

    def _require_hooks(self, hooks: Collection[str]) -> None:
        """Load the model anew where it was cut above these hooks."""
        if not holds(self.lm, hooks):
            self.lm = self._load(sorted(hooks))

    def _activations(self, items: Sequence[_Item]) -> list[dict[str, Tensor]]:
        """For each item, hook -> [t, d_in], of the whole sequence; from the cache where it has them all."""
        known: list[dict[str, Tensor]] = []
        for item in items:
            wanted = {hook for _, _, hook in item.asked}
            held = {hook: self.cache.get(hook, item.ids) for hook in wanted} if self.config.cache_bytes else {}
            known.append({hook: rows for hook, rows in held.items() if rows is not None})
        missing = [i for i, item in enumerate(items) if any(hook not in known[i] for _, _, hook in item.asked)]
        hooks = {hook for i in missing for _, _, hook in items[i].asked if hook not in known[i]}
        if hooks:
            self._require_hooks(hooks)
            found = activations_of(self.lm, [items[i].ids for i in missing], 0, sorted(hooks))
            for place, i in enumerate(missing):
                for hook in hooks:
                    known[i][hook] = found[hook][place]
                    if self.config.cache_bytes:
                        self.cache.put(hook, items[i].ids, found[hook][place])
        return known


def _require_feature(sae: str, feature: int, d_sae: int) -> None:
    if not 0 <= feature < d_sae:
        raise UserError(f"{sae} has no feature {feature}; its features are 0 to {d_sae - 1}.")


def _device(config: ServeConfig) -> str:
    if config.device != "auto":
        return config.device
    return default_device()
