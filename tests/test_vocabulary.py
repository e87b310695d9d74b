"""Which token may stand where: against a literal byte-by-byte oracle, on byte-level and byte-fallback tokenizers."""

from functools import cache

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gradmm.readability import flaw
from gradmm.vocabulary import NEVER, Vocabulary, markup_tokens, printable

WORDS = ("▁the", "▁film", "▁is", "good", "你", "▁“", ".", "。", "”", "▁")


def fallback_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words, and all other characters as bytes `<0xNN>`, as in Gemma and Llama."""
    pieces = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


@cache
def pieces_of(tokenizer) -> list[str]:
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    return [
        tokenizer.decode([*letter, token], clean_up_tokenization_spaces=False).removeprefix("a")
        for token in range(len(tokenizer))
    ]


@pytest.fixture(scope="module", params=["byte level", "byte fallback"])
def tokenizer(request, demo_model):
    return demo_model.tokenizer if request.param == "byte level" else fallback_tokenizer()


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    return Vocabulary.of(tokenizer, pieces_of(tokenizer), (tokenizer.eos_token_id,), "cpu")


TEXTS = ("这部电影很好看。", "好 😀 ok 👍🏽", "très déjà-vu", "Привет, мир", "ภาพยนตร์", "日本の映画は 𠮷", "हिन्दी")


@pytest.mark.parametrize("text", TEXTS)
def test_every_token_of_a_text_in_any_script_can_be_written_in_order(tokenizer, vocabulary, text):
    ids, state = tokenizer(text, add_special_tokens=False)["input_ids"], 0
    for place, token in enumerate(ids):
        needs = int(vocabulary.needs[state, token])
        assert needs < NEVER and needs <= len(ids) - 1 - place
        state = int(vocabulary.follows[state, token])
    assert state == 0


@pytest.mark.parametrize("left", [5, NEVER - 1, NEVER, 200])
def test_what_leads_nowhere_is_not_open_however_long_the_text(vocabulary, left):
    for state, needs in enumerate(vocabulary.needs):
        found = vocabulary.open_to(torch.tensor([state]), torch.tensor([left]))
        assert torch.equal(found[0], needs < NEVER) and not bool(found.all())


def literal_bytes(tokenizer, token: int) -> bytes:
    name = tokenizer.convert_ids_to_tokens(token)
    if name.startswith("<0x"):
        return bytes([int(name[3:5], 16)])
    if name in WORDS or "▁" in name:
        return name.replace("▁", " ").encode()
    alphabet = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(alphabet[letter] for letter in name)


def can_be_completed(some: bytes) -> bool:
    """Whether some bytes are printable characters but for a beginning of one: ends of up to three bytes are tried."""
    for tail in (b"", b"\x80", b"\xa5", b"\xbf", *(bytes([a, b]) for a in (0x80, 0x90, 0xA5, 0xBF) for b in (0x80,
        0xBF)),
                 *(bytes([a, 0xA0, b]) for a in (0x90, 0x9F, 0xA0, 0xBF) for b in (0x80, 0x9F))):  # fmt: skip
        try:
            text = (some + tail).decode()
        except UnicodeDecodeError:
            continue
        if not any(
            0xE000 <= ord(c) <= 0xF8FF or ord(c) >= 0x40000 or ord(c) < 0x20 or 0x7F <= ord(c) <= 0x9F for c in text
        ):
            return True
    return False


def test_the_tables_are_those_of_a_literal_walk_over_the_bytes(tokenizer, vocabulary):
    fragments = [token for token, piece in enumerate(pieces_of(tokenizer)) if "\ufffd" in piece]
    raw = {token: literal_bytes(tokenizer, token) for token in fragments}
    prefixes = (
        b"", b"\xc2", b"\xc3", b"\xe0", b"\xe4", b"\xed", b"\xef", b"\xf0", b"\xe4\xbd", b"\xf0\x9f", b"\xf0\x9f\x98",
    )  # fmt: skip
    for prefix in prefixes:
        state = 0
        for byte in prefix:
            state = next(int(vocabulary.follows[state, token]) for token in fragments if raw[token] == bytes([byte]))
        for token in fragments:
            after = int(vocabulary.follows[state, token])
            assert (after >= 0) == can_be_completed(prefix + raw[token]), (prefix, raw[token])
            assert (int(vocabulary.needs[state, token]) < NEVER) == (after >= 0)


def test_whole_tokens_are_printable_and_stand_only_behind_whole_characters(tokenizer, vocabulary):
    pieces, markup = pieces_of(tokenizer), markup_tokens(tokenizer, pieces_of(tokenizer))
    for token, piece in enumerate(pieces):
        assert bool(vocabulary.whole[token]) == ((printable(piece) or piece == " ") and token not in markup)
        if vocabulary.whole[token]:
            assert vocabulary.needs[:, token].tolist() == [0] + [NEVER] * (len(vocabulary.needs) - 1)


def test_without_fragments_there_is_one_mask_for_all(tiny_model):
    model = tiny_model("llama")
    vocabulary = model.vocabulary
    expected = [token > 1 and (printable(piece) or piece == " ") for token, piece in enumerate(model.pieces)]
    assert vocabulary.whole.tolist() == expected and len(vocabulary.needs) == 1
    row = torch.zeros(3, dtype=torch.long)
    assert torch.equal(vocabulary.open_to(row, row), vocabulary.whole)
    assert not bool(vocabulary.whole[len(model.tokenizer) :].any())


def test_fragments_that_cannot_be_completed_are_left_out(tokenizer, vocabulary):
    raw = {
        token: literal_bytes(tokenizer, token) for token, piece in enumerate(pieces_of(tokenizer)) if "\ufffd" in piece
    }
    lone = vocabulary.whole.clone()
    lone[[token for token, some in raw.items() if some[0] >= 0xC0]] = True  # beginnings alone
    assert len(vocabulary.only(lone).needs) == 1
    assert torch.equal(vocabulary.only(lone).whole, vocabulary.whole)


def test_a_text_begins_with_a_word(tokenizer, vocabulary):
    pieces = pieces_of(tokenizer)
    behind_word, free = (
        {piece for piece, may in zip(pieces, mask.tolist(), strict=True) if may} for mask in vocabulary.begins
    )
    assert behind_word <= free and " the" in behind_word and "." not in free and " ." not in free and "”" not in free
    assert not [piece for piece in behind_word if piece[0].isascii() and not piece[0].isspace()]
    if "你" in pieces:
        assert "你" in behind_word and "good" in free - behind_word and " “" in behind_word


def test_ends_are_those_of_the_tokenizer_and_of_the_settings(tiny_model):
    for given, ends in ((None, (0,)), (7, (0, 7)), ([7, 0, 9], (0, 7, 9)), ([200], (0,))):
        model = tiny_model("llama")
        model.lm.generation_config.eos_token_id = given
        assert model.ends == ends
        assert all(bool(model.vocabulary.stops[token]) for token in ends)


@pytest.mark.parametrize(
    ("word", "special", "barred"),
    [
        ("<jupyter_code>", False, True), ("<start_of_turn>", False, True), ("<unused1>", False, True),
        ("[unused12]", False, True),
        ("<|reserved_special_token_3|>", False, True), ("gradmm", True, True), ("gradmm", False, False),
        ("Hogwarts", False, False),
        ("don't", False, False),
    ],
)  # fmt: skip
def test_added_tokens_that_are_special_or_markup_are_barred(tiny_model, word, special, barred):
    model = tiny_model("llama")
    token = len(model.tokenizer)
    model.tokenizer.add_tokens([AddedToken(word, special=special, normalized=False)], special_tokens=special)
    assert bool(model.vocabulary.whole[token]) != barred
    assert (token in model.vocabulary.markup) == barred


@pytest.mark.parametrize("text", ["می\u200cخواهم", "\u200d", "क्\u200dष", "co\u00adop"])
def test_joiners_that_words_and_emoji_need_may_be_written_and_are_no_flaw(text):
    assert printable(text) and flaw(f"a text with {text} in it") is None


def test_what_is_printable():
    assert all(map(printable, ["a", " a", "the end", "é", "日本", "!", "שלום"]))
    assert not any(
        map(printable, ["", " ", "\n", "a\n", "\t", "\ufffd", "a\ufffd", "\u202e", "\u200b", "\x07", "a\u0000"])
    )
