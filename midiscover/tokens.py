"""Token ids as the strings that people read; knows tokenizers by what transformers calls them, and no model.

A token of byte-level BPE may be a piece of a character: it is shown as the replacement character, as the tokenizer
itself decodes it. An id that the tokenizer does not have (phi-2 has 51,200 embedding rows for 50,295 ids) is named
`<|outofrange|>`, Neuronpedia's word for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

OUT_OF_RANGE = "<|outofrange|>"
PIECE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers write for bytes that are no whole character."""
_MOST_PIECES = 8
"""Tokens that are tried together; a character has 4 bytes at most, but a token may end one and begin the next."""
_VISIBLE = {"\n": "↵", "\t": "→", "\r": "↵"}


def shown(token: str) -> str:
    """A token on one line: line breaks and tabs as arrows, what can't be printed as a dot."""
    return "".join(_VISIBLE.get(c, c if c.isprintable() else "·") for c in token) or "·"


class TokenStrings:
    """The string of each id of a tokenizer; each is decoded once.

    >>> strings = TokenStrings(tokenizer)
    >>> strings([1, 2, 51_199])    # ['"', '#', '<|outofrange|>']
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self.count = len(tokenizer)
        """Ids that the tokenizer has, its added ones included."""

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """One string for each id."""
        return [self._string(int(token)) for token in ids]

    def in_text(self, ids: Sequence[int], *, once: bool = False) -> list[str]:
        """The same for ids that follow each other in a text: each piece of a character as that character.

        once: the character stands at its first piece alone, and nothing at the others, so that all together are the
        text.
        """
        strings = self(ids)
        start = 0
        while start < len(ids):
            end = start + 1
            while end <= min(len(ids), start + _MOST_PIECES) and PIECE in strings[end - 1]:
                text = self._tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False)
                before, after = strings[start].partition(PIECE)[0], strings[end - 1].rpartition(PIECE)[2]
                if PIECE not in text and text.startswith(before) and text.endswith(after):
                    whole = text[len(before) : len(text) - len(after)]
                    strings[start:end] = [whole, *([""] * (end - start - 1))] if once else [whole] * (end - start)
                    strings[start], strings[end - 1] = before + strings[start], strings[end - 1] + after
                    start = end - 1
                    break
                end += 1
            start += 1
        return strings

    def _string(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode(token) if 0 <= token < self.count else OUT_OF_RANGE
        return self._known[token]

    def _decode(self, token: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if not isinstance(piece, str) or not piece.startswith("\u2581"):
            return text
        # Decoders of SentencePiece drop a space in front of a first token; "\u2581" is how it writes each.
        return " " * (len(piece) - len(piece.lstrip("\u2581"))) + text.lstrip(" ")
