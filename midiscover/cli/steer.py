"""`midiscover steer`: how a text goes on while features are changed, beside the same without."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from midiscover import tables
from midiscover.cli.features import require_positive
from midiscover.errors import ConfigError
from midiscover.launch import Parser
from midiscover.store.storage import open_store
from midiscover.targets import find_sae

if TYPE_CHECKING:
    from midiscover.lm import LanguageModel
    from midiscover.saes import LoadedSae
    from midiscover.steer import Change, Mode


def steer_parser() -> Parser:
    """The words of `midiscover steer`."""
    parser = Parser(
        prog="midiscover steer",
        description="How a text goes on while features of an SAE are changed at every token, beside the same without.",
    )
    parser.add_argument("sae", metavar="SAE", help="an SAE, or a unique beginning of its id")
    parser.add_argument("text", metavar="TEXT", help="what is gone on from")
    for flag, words in (
        ("--add", "add VALUE times the feature's decoder direction"),
        ("--clamp", "hold the feature's activation at VALUE"),
    ):
        parser.add_argument(
            flag, metavar="FEATURE=VALUE", action="append", default=[], help=f"{words}; may be repeated"
        )
    parser.add_argument(
        "--ablate", metavar="FEATURE", action="append", default=[], help="take the feature out; may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="tokens generated at most (40)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn where the temperature is above 0 (0)")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _steer(argv: Sequence[str]) -> None:
    known = steer_parser().parse_args(list(argv))
    require_positive(tokens=known.tokens)
    if not 0 <= known.temperature < math.inf:
        raise ConfigError(f"--temperature is {known.temperature}; it must be 0 or above.")
    if not 0 <= known.seed < 2**63:
        raise ConfigError(f"--seed is {known.seed}; it must be a whole number from 0 to 2^63 - 1.")
    asked = _asked(known)
    storage = open_store(known.store, create=False)
    name = find_sae(storage, known.sae)
    from midiscover.interpret import load_language_model
    from midiscover.saes import load_sae
    from midiscover.steer import Change

    sae = load_sae(name, store=storage.uri)
    lm = load_language_model([sae], storage.uri)
    found = _generated(lm, name, sae, [Change(name, *change) for change in asked], known)
    if known.json:
        changes = [{"mode": mode, "feature": feature, "value": value} for feature, mode, value in asked]
        print(json.dumps({"sae": name, "prompt": known.text, "changes": changes, **found}, indent=1))
        return
    told = ", ".join(_told(*change) for change in asked)
    tables.show(
        Group(
            Text.assemble(("steered", "bold"), (f"  {told}", "dim")),
            Text.assemble((known.text, "dim"), found["steered"]),
            Text(),
            Text.assemble(("default", "bold"), ("  nothing changed", "dim")),
            Text.assemble((known.text, "dim"), found["default"]),
        )
    )


def _generated(
    lm: LanguageModel, name: str, sae: LoadedSae, changes: Sequence[Change], known: argparse.Namespace
) -> dict[str, str]:
    """What comes after the text, `steered` and `default`."""
    from midiscover.attach import context_length
    from midiscover.interpret import refuse_too_long, start_token, tokenised
    from midiscover.steer import Sampling, generate

    most = context_length(lm.model.config)
    if most is not None and known.tokens >= most:
        raise ConfigError(
            f"--tokens is {known.tokens:,}; {lm.identity.name} reads {most:,} tokens at most, the text among them."
        )
    ids = tokenised(lm, [known.text])
    start = start_token(lm, [sae])
    refuse_too_long(lm, [known.text], ids, (start is not None) + known.tokens)
    prompt = ids[0] if start is None else [start, *ids[0]]
    sampling = Sampling(new_tokens=known.tokens, temperature=known.temperature, seed=known.seed)
    *_, last = generate(lm, prompt, {name: sae}, changes, sampling)
    decode = lm.tokenizer.decode
    return {
        side: str(decode(made, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for side, made in last.token_ids.items()
    }


def _asked(known: argparse.Namespace) -> list[tuple[int, Mode, float]]:
    """Each change that is asked for. ConfigError for words that name none, and where nothing is to change."""
    changes: list[tuple[int, Mode, float]] = []
    for word in known.add:
        feature, value = _feature_and_value("--add", word)
        changes.append((feature, "add", value))
    for word in known.clamp:
        feature, value = _feature_and_value("--clamp", word)
        changes.append((feature, "clamp", value))
    for word in known.ablate:
        changes.append((_feature("--ablate", word, word), "ablate", 0.0))
    if not changes:
        raise ConfigError("Nothing is to be changed; give --add or --clamp FEATURE=VALUE, or --ablate FEATURE.")
    return changes


def _feature_and_value(flag: str, word: str) -> tuple[int, float]:
    feature, _, value = word.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{flag} {word} is no FEATURE=VALUE; give the feature's number and a value, such as 17=50.")
    return _feature(flag, word, feature), number


def _feature(flag: str, word: str, number: str) -> int:
    if not (number.isascii() and number.isdigit()):
        raise ConfigError(
            f"{flag} {word} names no feature; give its number, such as 17, from `midiscover feature list`."
        )
    return int(number)


def _told(feature: int, mode: Mode, value: float) -> str:
    return f"{mode} {feature}" if mode == "ablate" else f"{mode} {feature}={value:g}"


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"steer": _steer}
