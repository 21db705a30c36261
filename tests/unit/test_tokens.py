"""Token ids as strings."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from midiscover.tokens import OUT_OF_RANGE, TokenStrings, shown


def test_every_space_of_a_sentencepiece_token_is_kept() -> None:
    """Llama-2's decoders drop one in front of a first token, and each token is decoded as a first one."""
    pieces = ["a", "\u2581a", "\u2581", "\u2581\u2581\u2581\u2581", "\u2581\u2581a", "\u2581a\u2581b"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="a"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([3]) == "   "  # one of four is gone
    assert TokenStrings(fast)(range(7)) == ["a", " a", " ", "    ", "  a", " a b", OUT_OF_RANGE]


def test_what_stands_on_one_line() -> None:
    assert shown("a\nb\tc\x00") == "a↵b→c·"
    assert shown("") == "·"
