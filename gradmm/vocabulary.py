"""Which token a text may hold at which place: whole characters, words at its beginning, an end.

Knows tokenizers but no language model. Letters: N texts, V vocabulary, S states. Many tokens of byte-level vocabularies
are parts of characters: what a text may hold is judged by the bytes that stand in it so far, which its state tells.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gradmm.readability import BROKEN, CLOSERS, END, SENTENCE_ENDS, UNSPACED, unseen

# States of a text in UTF-8 and the bytes that lead on from each: (first, last, next state). In 0 all characters are
# whole, in 1 and 2 as many more bytes are needed; 3 to 7 follow a byte that narrows the next one. Overlong forms,
# surrogates, control and private characters and planes without characters lead nowhere.
STATES = (
    ((0x20, 0x7E, 0), (0xC2, 0xC2, 3), (0xC3, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEC, 2), (0xED, 0xED, 5),
     (0xEF, 0xEF, 6), (0xF0, 0xF0, 7)),
    ((0x80, 0xBF, 0),),
    ((0x80, 0xBF, 1),),
    ((0xA0, 0xBF, 0),),
    ((0xA0, 0xBF, 1),),
    ((0x80, 0x9F, 1),),
    ((0xA4, 0xBF, 1),),
    ((0x90, 0xBF, 2),),
)  # fmt: skip
NEVER = 127  # in place of how many more tokens: this one leads nowhere
WORDLIKE = re.compile(f"[{UNSPACED}]")  # a character that stands for a word or begins one without a space
OPENING = re.compile(r"[\"'“‘«„¿¡(\[《「『（【]")
MARKUP = re.compile(r"<\|.*\|>|[<\[]unused_?\d+[>\]]|[<\[]\w*reserved\w*[>\]]", re.IGNORECASE)
ADDED_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\{[^{}\s]+\}|<[|｜].*[|｜]>")
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


@dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a vocabulary do to a text; S is 1 where no token of a text is a part of a character.

    Attributes:
        needs: (S, V) int8, how many more tokens at least make all characters whole again behind this one; NEVER: not
            allowed.
        follows: (S, V) int8, the state behind a token.
        begins: (2, V) bool, tokens that can be a text's first behind a word, and behind a space or nothing.
        spaces: (V,) bool, tokens behind which a word begins without a space.
        closes: (V,) bool, tokens that may end a sentence, see `readability.ends_sentence`.
        closers: (V,) bool, what leaves open whether a sentence has ended: closing quotes and brackets, which belong to
            it, and a space alone.
        stops: (V,) bool, tokens that end a text and are no part of it: end tokens and line breaks.
        left: (V,) int64, the token that a stop leaves in the text: of a mark with a line break, a token of Llama 3 and
            Qwen, the mark; -1 where nothing is left.
        markup: numbers of the special tokens and of what else is no text but a model's markup.
    """

    needs: Tensor
    follows: Tensor
    begins: Tensor
    spaces: Tensor
    closes: Tensor
    closers: Tensor
    stops: Tensor
    left: Tensor
    markup: frozenset[int]

    @staticmethod
    def of(tokenizer, pieces: Sequence[str], ends: Sequence[int], device: torch.device | str) -> "Vocabulary":
        """Sort a vocabulary.

        Args:
            pieces: what each of V tokens adds to a text, see `Model.pieces`.
            ends: the model's end tokens.
            device: of the tensors.
        """
        markup = markup_tokens(tokenizer, pieces)
        raw = {
            token: _bytes_of(tokenizer, token)
            for token, piece in enumerate(pieces)
            if BROKEN in piece and token not in markup
        }
        # A space alone stands before numbers, and before words of many scripts.
        whole = torch.tensor(
            [token not in markup and (piece == " " or printable(piece)) for token, piece in enumerate(pieces)]
        )
        follows = torch.full((len(STATES), len(pieces)), -1, dtype=torch.int8)
        follows[0, whole] = 0
        for token, some in raw.items():
            follows[:, token] = torch.tensor([_read(state, some) for state in range(len(STATES))], dtype=torch.int8)
        begins = torch.tensor(
            [[_begins(piece, raw.get(token), free) for token, piece in enumerate(pieces)] for free in (False, True)]
        )

        def where(test) -> Tensor:
            return torch.tensor([bool(test(token, piece)) for token, piece in enumerate(pieces)])

        tables = (
            follows,
            begins,
            where(lambda token, piece: token in markup or piece[-1:].isspace()),
            where(lambda token, piece: _closes(piece.rstrip(), raw.get(token))),
            where(lambda token, piece: piece == " " or (piece and not piece.strip(CLOSERS))),
            where(lambda token, piece: token in ends or "\n" in piece),
            _left(pieces, whole),
        )
        return Vocabulary(_needs(follows), *tables, markup).only(torch.ones(len(pieces), dtype=torch.bool)).to(device)

    @staticmethod
    def free(allowed: Tensor) -> "Vocabulary":
        """A vocabulary of whole tokens, each of which may stand anywhere and ends nothing; allowed: (V,) bool."""
        none, zero = torch.zeros_like(allowed), torch.zeros_like(allowed, dtype=torch.int8)[None]
        nothing = torch.full(allowed.shape, -1, device=allowed.device)
        return Vocabulary(
            zero.masked_fill(~allowed, NEVER), zero, allowed.expand(2, -1), none, none, none, none, nothing, frozenset()
        )

    def only(self, allowed: Tensor) -> "Vocabulary":
        """The same with no other tokens than these: (V,) bool; parts of characters stay where these complete them."""
        follows = self.follows.masked_fill(~allowed.to(self.follows.device) | (self.needs == NEVER), -1)
        needs = _needs(follows)
        used = 1 if bool((needs[1:] == NEVER).all()) else len(needs)
        begins = self.begins & (needs[0] < NEVER)
        left = self.left.masked_fill(needs[0][self.left.clamp_min(0)] != 0, -1)
        return replace(self, needs=needs[:used], follows=follows[:used], begins=begins, left=left)

    def to(self, device: torch.device | str) -> "Vocabulary":
        """The same on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @property
    def whole(self) -> Tensor:
        """Tokens of whole characters that a text may hold: (V,) bool."""
        return (self.needs[0] == 0) & (self.follows[0] == 0)

    def open_to(self, state: Tensor, left: Tensor) -> Tensor:
        """Tokens that a text may go on with: (N, V) bool, or (V,) where it is the same for all.

        Args:
            state: (N,) the texts' states.
            left: (N,) how many tokens each may still have behind this one.
        """
        if len(self.needs) == 1:
            return self.needs[0] == 0
        return self.needs[state] <= left.clamp_max(NEVER - 1).unsqueeze(1)

    def state_after(self, state: Tensor, token: Tensor) -> Tensor:
        """The states behind one more token of each: (N,), (N,) -> (N,); behind one that is no part of a text 0."""
        return state if len(self.follows) == 1 else self.follows[state, token].long().clamp_min(0)

    def first(self, before: Tensor) -> Tensor:
        """Tokens that may be the first of each text, by the last token (N,) before it: (N, V) bool."""
        return self.begins[self.spaces[before].long()]


def _left(pieces: Sequence[str], whole: Tensor) -> Tensor:
    """For each piece with a line break the whole token of what stands before it, else -1: (V,)."""
    tokens = {pieces[token]: token for token in reversed(whole.nonzero().flatten().tolist())}
    return torch.tensor([tokens.get(piece.partition("\n")[0], -1) if "\n" in piece else -1 for piece in pieces])


def tokens_of(tokenizer) -> int:
    """One more than the largest token: their numbers may have holes."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def markup_tokens(tokenizer, pieces: Sequence[str]) -> frozenset[int]:
    """Special tokens, and what looks like markup among the added tokens, or like a model's own markup anywhere."""
    added = {
        token
        for token, some in tokenizer.added_tokens_decoder.items()
        if some.special or ADDED_MARKUP.fullmatch(some.content.strip())
    }
    return frozenset(
        {*tokenizer.all_special_ids, *added, *(i for i, piece in enumerate(pieces) if MARKUP.fullmatch(piece.strip()))}
    )


def printable(text: str) -> bool:
    """Whether a text is visible on one line: no fragments of characters, no control characters, none `unseen`."""
    control = any(unicodedata.category(c) == "Cc" for c in text)
    return bool(text.strip()) and BROKEN not in text and not control and unseen(text) is None


def _bytes_of(tokenizer, token: int) -> bytes:
    """The bytes of a token that does not decode by itself; none where it is no part of a character."""
    name = tokenizer.convert_ids_to_tokens(token) or ""
    if found := BYTE.fullmatch(name):
        return bytes([int(found.group(1), 16)])
    some = bytes(BYTES[letter] for letter in name) if all(letter in BYTES for letter in name) else b""
    return b"" if BROKEN.encode() in some else some


def _read(state: int, some: bytes) -> int:
    """The state behind some bytes; -1 where they can't stand there, or there are none."""
    for byte in some:
        state = next((then for first, last, then in STATES[state] if first <= byte <= last), -1)
        if state < 0:
            break
    return state if some else -1


def _needs(follows: Tensor) -> Tensor:
    """From the state behind each token (S, V) how many more tokens lead back to state 0: (S, V) int8."""
    far = torch.full((len(follows) + 1,), NEVER, device=follows.device)  # the last for -1: no state
    far[0] = 0
    for _ in range(len(follows)):
        far[1:-1] = torch.minimum(far[1:-1], far[follows[1:].long()].amin(1) + 1).clamp_max(NEVER)
    return far[follows.long()].to(torch.int8)


def _begins(piece: str, raw: bytes | None, free: bool) -> bool:
    """Whether a token can be a text's first; `free`: no word stands right before it."""
    visible, spaced = piece.lstrip()[:1], free or piece[:1].isspace()
    if not visible:
        return False
    if raw is None or visible != BROKEN:
        kind = unicodedata.category(visible)
        word = kind[0] == "L" or kind in ("Nd", "Sc") or bool(OPENING.match(visible))
        return word and (spaced or bool(WORDLIKE.match(visible)))
    lead = raw.lstrip()[:1]
    if spaced:
        return b"\xc3" <= lead <= b"\xed" and lead != b"\xe2"
    return lead in (b"\xe0", b"\xe1") or b"\xe3" <= lead <= b"\xe9"


def _closes(piece: str, raw: bytes | None) -> bool:
    if raw:
        return raw[-1:] in {mark.encode()[-1:] for mark in SENTENCE_ENDS if len(mark.encode()) > 1}
    return any(found.end() == len(piece) for found in END.finditer(piece))
