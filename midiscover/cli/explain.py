"""`midiscover explain`: features in words by a language model, and how well these tell where the features fire."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from midiscover import featureview, tables
from midiscover.cli.features import LISTED, fitting, parse_filter, require_positive
from midiscover.errors import ConfigError, NotFoundError
from midiscover.features.explain import FEWEST
from midiscover.features.records import FeatureRecords, open_features
from midiscover.launch import Parser
from midiscover.store import layout
from midiscover.store.documents import read_json
from midiscover.store.storage import Storage, open_store
from midiscover.targets import find_sae

if TYPE_CHECKING:
    from midiscover.chat import Chat
    from midiscover.features.explain import ExplainSettings
    from midiscover.features.quiet import Quiet

COUNT = 20


def _parser() -> Parser:
    parser = Parser(
        prog="midiscover explain",
        description="Have a language model say in a phrase what features stand for, and judge by that alone where they "
        "fire: beside another feature's phrase, and beside the tokens at the peaks, which need no such model.",
        epilog="--llm takes its address from OPENAI_BASE_URL and its key from OPENAI_API_KEY. What is explained stays "
        "beside the features, and the same command goes on where it was. A feature takes 9 questions of --llm, 4 with "
        "--no-baselines, 1 with --no-scores; --local-llm is asked of each passage by itself.",
    )
    parser.add_argument("sae", metavar="SAE", help="an SAE, or a unique beginning of its id")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--llm", metavar="NAME", help="a model of an OpenAI-compatible server, such as gpt-4o-mini")
    who.add_argument("--local-llm", metavar="MODEL", help="an instructed model that runs here, named as model.id is")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--features", metavar="LIST", help="their numbers, such as 17,42")
    which.add_argument("--count", type=int, metavar="N", help=f"so many, drawn from those that fire ({COUNT})")
    which.add_argument("--all", action="store_true", help="all that fire")
    parser.add_argument("--filter", default="", metavar="CONDITIONS", help="of what is drawn: 'firing_rate<0.01,max>2'")
    parser.add_argument("--shown", type=int, default=10, metavar="N", help="contexts that the model sees (10)")
    parser.add_argument("--judged", type=int, default=10, metavar="N", help="passages of each kind it judges (10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="questions asked of --llm side by side (8)")
    parser.add_argument("--no-scores", action="store_true", help="explain, and judge nothing")
    parser.add_argument("--no-baselines", action="store_true", help="judge the explanations alone")
    parser.add_argument("--force", action="store_true", help="explain and judge anew")
    parser.add_argument("--model", metavar="MODEL", help="where the SAE's language model is, if not where it was")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _explain(argv: Sequence[str]) -> None:
    known = _parser().parse_args(list(argv))
    require_positive(at_once=known.at_once)
    for flag, given in (("shown", known.shown), ("judged", known.judged)):
        if given < FEWEST:
            raise ConfigError(f"--{flag} is {given}; it must be {FEWEST} at least.")
    storage = open_store(known.store, create=False)
    records = open_features(storage, find_sae(storage, known.sae))
    features = _chosen(records, known)
    from midiscover.features.explain import ExplainSettings, Reader
    from midiscover.features.explainer import Explainer
    from midiscover.features.explanations import Explanations
    from midiscover.lm import load_tokenizer
    from midiscover.origin import resolve_origin

    chat = _chat(known)
    settings = ExplainSettings(shown=known.shown, judged=known.judged, seed=known.seed)
    identity = resolve_origin(read_json(storage, layout.record(records.sae_id)), storage.uri, known.model)
    stored = Explanations(storage, records.sae_id, records.features_id, chat.name, _asked(settings, chat))
    explainer = Explainer(
        chat=chat,
        records=records,
        stored=stored,
        settings=settings,
        reader=Reader(load_tokenizer(identity)),
        held_out=None if known.no_scores else lambda: _held_out(storage, records, known),
        baselines=not known.no_baselines,
        progress=_Teller(),
    )
    outcome = explainer.run(features, force=known.force)
    if known.json:
        told = {"sae": records.sae_id, "llm": chat.name, "used": chat.used, "features": outcome.entries}
        told |= {"seldom": outcome.seldom, "silent": outcome.silent, "refused": outcome.refused}
        print(json.dumps(told, indent=1))
        return
    tables.show(featureview.explained(records.sae_id, chat.name, outcome, chat.used))


def _chosen(records: FeatureRecords, known: argparse.Namespace) -> list[int]:
    """Numbers of the features that are asked for, in order."""
    if known.features is not None:
        if known.filter:
            raise ConfigError("--filter goes with --count or --all; --features names the features itself.")
        words = [word.strip() for word in known.features.split(",")]
        wrong = [word for word in words if not (word.isascii() and word.isdigit())]
        if wrong:
            raise ConfigError(
                f"--features {known.features}: '{wrong[0]}' is no number of a feature; give such as 17,42."
            )
        for word in words:
            records.require(int(word))
        return sorted({int(word) for word in words})
    count = COUNT if known.count is None else known.count
    require_positive(count=count)
    conditions = parse_filter(known.filter)
    rows = records.table(LISTED).to_pylist()
    fits = [row["index"] for row in fitting(rows, conditions) if row["count"]]
    if not fits:
        raise NotFoundError(f"No feature of {records.sae_id} that fires fits --filter '{known.filter}'.")
    if known.all or count >= len(fits):
        return fits
    return sorted(random.Random(known.seed).sample(fits, count))


def _chat(known: argparse.Namespace) -> Chat:
    from midiscover.chat import EndpointChat, LocalChat

    if known.llm is not None:
        return EndpointChat(known.llm, known.at_once)
    from midiscover.cards import default_device

    return LocalChat(known.local_llm, known.store, default_device())


def _asked(settings: ExplainSettings, chat: Chat) -> Mapping[str, Any]:
    return {"shown": settings.shown, "judged": settings.judged, "seed": settings.seed, **chat.identity}


def _held_out(storage: Storage, records: FeatureRecords, known: argparse.Namespace) -> Quiet:
    """Held-out passages, by one forward pass for all features."""
    from midiscover.cards import default_device
    from midiscover.corpus import Corpus
    from midiscover.features.quiet import held_out_passages
    from midiscover.interpret import load_language_model
    from midiscover.saes import load_sae

    print("explain: reading held-out text", file=sys.stderr)
    corpus = Corpus.open(storage, records.manifest["corpus"])
    device = default_device()
    sae = load_sae(records.sae_id, store=storage.uri, device=device)
    lm = load_language_model([sae], storage.uri, model=known.model, device=device)
    told = records.manifest["settings"]
    return held_out_passages(lm, records.sae_id, sae, corpus, told["context_before"] + 1 + told["context_after"])


class _Teller:
    """Tells on standard error how far it is: on one line of a terminal, else now and then on one more."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        terminal, ended = sys.stderr.isatty(), done >= total
        if not (ended or time.monotonic() - self._last > (0.1 if terminal else 10.0)):
            return
        self._last = time.monotonic()
        start, end = ("\r", "\n" if ended else "") if terminal else ("", "\n")
        print(f"{start}explain: {done:,} of {total:,} features {what}", end=end, file=sys.stderr, flush=True)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"explain": _explain}
