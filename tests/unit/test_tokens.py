"""Token ids as strings."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

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


def byte_level(pieces: list[bytes]) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are these pieces, as byte-level BPE writes them."""
    spelled = bytes_to_unicode()
    words = ["".join(spelled[one] for one in piece) for piece in pieces]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("cuts", [[1, 3, 4, 5, 7, 9, 12], [2, 3, 6, 8, 9, 10, 11, 12], [3, 5, 6, 10, 11]])
def test_pieces_of_a_character_are_shown_as_that_character(cuts: list[int]) -> None:
    text = "a \u4e2db\U0001f600\u05d0!"  # bytes 0, 1, 2-4, 5, 6-9, 10-11, 12
    data, starts = text.encode(), [len(text[:place].encode()) for place in range(len(text) + 1)]
    spans = list(pairwise([0, *cuts, len(data)]))
    strings = TokenStrings(byte_level([data[start:end] for start, end in spans]))
    ids = list(range(len(spans)))
    touched = [
        "".join(one for one, (a, b) in zip(text, pairwise(starts), strict=True) if a < end and b > start)
        for start, end in spans
    ]
    assert strings.in_text(ids) == touched
    assert "\ufffd" in "".join(strings(ids)), "each by itself is no character"


def test_what_is_no_character_stays_so() -> None:
    """Half a character, and the replacement character itself."""
    pieces = [b"a", "\u4e2d".encode()[:2], b"b", b"\xef\xbf", b"\xbd", "\u4e2d".encode()[2:]]
    strings = TokenStrings(byte_level(pieces))
    for ids in ([0, 1, 2], [3, 4], [1], [3, 4, 1, 0], [1, 3] * 20):
        assert strings.in_text(ids) == strings(ids)
    assert strings.in_text([3, 4, 1, 5, 0]) == [*strings([3, 4]), "\u4e2d", "\u4e2d", "a"]


def test_what_stands_on_one_line() -> None:
    assert shown("a\nb\tc\x00") == "a↵b→c·"
    assert shown("") == "·"
