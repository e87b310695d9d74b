"""What makes a text unreadable, as far as its letters tell: markup, junk, loops, fragments, an echo of its prompt.

Knows no model and no task. The rules leave what people write alone: of the 8,530 train reviews of Rotten Tomatoes they
drop 5. A phrase that was cut out of a sentence, as most train rows of SST-2, may begin with a fragment and then is
dropped for it.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence

LOOP = "it repeats {!r}"
FRAGMENT = "it begins with the fragment {!r}"
MARKUP = "it holds {!r}, which is no text"
JUNK = "it spells {!r}, which is no word"
ECHO = "it echoes its prompt"
WORDLESS = "it has no word"
ECHO_WORDS = 3  # of an instruction: many texts begin with fewer by themselves, such as with "a"

BROKEN = "\ufffd"  # what a part of a character decodes to
TAG = re.compile(r"<\||\|>|</?[A-Za-z]\w*\s*/?>|\[/?INST\]|\ufffd")
JOINERS = "\u00ad\u200c\u200d"  # a soft hyphen, and what Persian words and composed emoji hold
# Scripts that set no spaces between words: there a character stands for a word.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0dff"  # of letters, which \w leaves out
NO_SPACE = re.compile(f"[{UNSPACED}]")
LETTERS = rf"(?:(?![{UNSPACED}])[\w{MARKS}])+"
WORD = re.compile(rf"[{UNSPACED}]|\d+(?:[.,:/-]\d+)+|{LETTERS}(?:['’]{LETTERS})*")
RUN = re.compile(r"([^\s\d]{1,12}?)\1{2,}")
RUN_LENGTH = 12  # characters; "hahaha" and "sooooo" are shorter
# What no word is: letters and digits joined by three signs of a calculation (but M*A*S*H), three small letters before
# capital ones, digits within letters three times, 45 letters in a row; in scripts that set spaces between words.
# Addresses, names and tags of users are not looked at.
LETTER = rf"(?:(?![{UNSPACED}])[^\W\d_])"
NO_WORD = re.compile(
    rf"(?!(?:[A-Z]\*)+[A-Z](?![\w*]))(?:(?:{LETTER}|\d)+[+*=|~^\\<>]){{3}}(?:{LETTER}|\d)|(?:[a-z]+[A-Z]+){{3}}|"
    rf"(?:{LETTER}+\d+){{3}}{LETTER}|{LETTER}{{45}}"
)
ADDRESS = frozenset("/@#_")
# What closes something, a dash or mark before a space, the rest of a hyphened word or contraction; ". . ." and "..."
# may begin a text, and so may ” where it opens, as in Swedish, and the Dutch 's before a name.
BEGINNING = re.compile(
    r"[,)\]}%、。，！？；：）】》」』]|”(?![^\W\d_])|(?:(?!\.\s?\.)[.;:!?/–—-]|--+)(?=\s)|-(?=[^\W\d_])|"
    r"['’](?:s(?![ -](?-i:[A-Z]))|re|ve|ll|d|m)\b|n['’]t\b",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """The words of a text, lower-cased and without punctuation; each character in scripts without spaces.

    >>> words("It's good, 很好!")
    ["it's", 'good', '很', '好']
    """
    return WORD.findall(text.lower())


def count_words(text: str) -> int:
    """How many words a text has, as spaces part them; in scripts without spaces each character is one.

    >>> count_words("a well-made film"), count_words("很好!")
    (3, 2)
    """
    return sum(max(1, len(NO_SPACE.findall(piece))) for piece in text.split())


def flaw(text: str, instruction: str = "") -> str | None:
    """Why a text is not readable, or None.

    It has no word. Leftover markup: a special token spelt out, a tag, a character that did not decode or that no one
    sees. Junk: see `NO_WORD`. A loop: see `times_of_a_loop`; or characters without a space that repeat at least three
    times over `RUN_LENGTH`. A fragment: it begins with a mark that closes something, a lone mark or dash, a part of a
    word, or inside a character. An echo: it begins with its whole instruction of `ECHO_WORDS` words or more, or all of
    it is a part of that, case and punctuation aside.

    Args:
        text: the text.
        instruction: what it was written from and is no part of it.

    >>> flaw("nighttime nighttime nighttime"), flaw(", and that was it."), flaw("a very, very good film")
    ("it repeats 'nighttime'", "it begins with the fragment ','", None)
    >>> flaw("Steve Jobs a librated pi+m+k+m+k!!"), flaw("An iPhone of YouTube's 2nd V8 era, E=mc2 and B2B.")
    ("it spells 'pi+m+k+m+k!!', which is no word", None)
    """
    spoken = words(text)
    return _markup(text) or _junk(text) or _loop(text, spoken) or _fragment(text) or _echo(spoken, words(instruction))


def unseen(text: str) -> str | None:
    """The first character that no one sees and no word needs: of format, private, unassigned; None without one.

    >>> unseen("a\\u202eb"), unseen("می\\u200cخواهم")
    ('\\u202e', None)
    """
    hidden = (c for c in text if unicodedata.category(c) in ("Cf", "Cn", "Co", "Cs") and c not in JOINERS)
    return next(hidden, None)


def times_of_a_loop(phrase: Sequence[str]) -> int:
    """How often in a row a phrase of some words makes a loop.

    Three times. Two-letter words four times, for "ha ha ha" and "no no no"; single letters and characters six times.
    Five words or more twice, if they have ten letters.
    """
    if len(phrase) == 1:
        return {1: 6, 2: 4}.get(len(phrase[0]), 3)
    return 2 if len(phrase) >= 5 and sum(map(len, phrase)) >= 10 else 3


def _markup(text: str) -> str | None:
    found = TAG.search(text)
    fault = found.group() if found else unseen(text)
    return None if fault is None else MARKUP.format(fault)


def _junk(text: str) -> str | None:
    pieces = (piece for piece in text.split() if not ADDRESS.intersection(piece))
    found = next((some for piece in pieces if (some := NO_WORD.search(piece))), None)
    return None if found is None else JUNK.format(found.string)


def _loop(text: str, spoken: Sequence[str]) -> str | None:
    for size in range(1, len(spoken) // 2 + 1):
        alike = 0  # words in a row that equal the one `size` places before them
        for place in range(size, len(spoken)):
            alike = alike + 1 if spoken[place] == spoken[place - size] else 0
            phrase = spoken[place - size + 1 : place + 1] if alike >= size else []
            if phrase and alike >= size * (times_of_a_loop(phrase) - 1):
                return LOOP.format(_joined(phrase))
    runs = (found for found in RUN.finditer(text) if len(found.group()) >= RUN_LENGTH)
    return next((LOOP.format(found.group(1)) for found in runs), None)


def _joined(phrase: Sequence[str]) -> str:
    return ("" if all(len(word) == 1 for word in phrase) else " ").join(phrase)


def _fragment(text: str) -> str | None:
    found = BEGINNING.match(text)
    if found or unicodedata.category(text[:1] or " ").startswith("M"):
        return FRAGMENT.format(found.group() if found else text[0])
    return None


def _echo(spoken: Sequence[str], asked: Sequence[str]) -> str | None:
    if not spoken:
        return WORDLESS
    part = any(asked[start : start + len(spoken)] == spoken for start in range(len(asked)))
    whole = len(asked) >= ECHO_WORDS and spoken[: len(asked)] == asked
    return ECHO if part or whole else None


# ---------------------------------------------------------------- where a sentence ends

# Those of Latin and its kin, Chinese and Japanese, Devanagari and its kin, Urdu, Arabic, Armenian, Amharic, Burmese,
# Khmer; the Amharic question; Tibetan, Santali, Meitei, Mongolian, Javanese; the stop of Japanese scientific text.
SENTENCE_ENDS = ".!?…。！？।॥۔؟։።။។፧།༎᱾᱿꯫᠃᠉꧉．"
WIDE_ENDS = "。！？။។．"  # no space follows these
UNMARKED = re.compile(r"[\u0e00-\u0eff]")  # Thai and Lao end a sentence by a space or by nothing
CLOSERS = "\"'”’)]»」』）】》"
PAIRED = {"“": "„", "«": "»"}  # what closes a quotation that the other opened, as in German, and else opens one
# In French a space stands before the mark that closes a quotation.
END = re.compile(rf"([{re.escape(SENTENCE_ENDS)}]+)(?:[{re.escape(CLOSERS)}]|[ \u00a0\u202f]»(?!\w))*")
WORD_BEFORE = re.compile(r"\S*$")
OPENERS = "\"'“‘«(["
# Lower-cased and without the last stop. Words that also stand at a sentence's end ("no", "in", "art", "sat") are left
# out.
ABBREVIATIONS = frozenset(
    """
    mr mrs ms mx dr prof sr jr st rev hon gen col capt lt sgt gov sen rep pres messrs vs v cf ca approx est dept univ
    inc ltd corp co bros llc fig eq vol ch pp pt al et tel ext ave blvd rd mt ft sq www http jan feb apr jun jul aug
    sept sep oct nov dec viz incl excl bzw usw evtl ggf inkl str nr abs hr mme mlle av ste sra srta dra ud uds sig dott
    ing avv pag núm nº п г г-н г-жа ул им стр рис руб тыс млн проф
    """.split()
)
NUMBERED = frozenset({"no", "nos", "art", "sec", "p", "page", "bd", "cap"})  # abbreviations before a number alone
INITIAL = re.compile(r"[^\W\d_]")
DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,3}")  # U.S, e.g, z.B, Ph.D, т.е


def ends_sentence(before: str, after: str | None) -> bool:
    """Whether a sentence ends where a text stands.

    A sentence ends with one of SENTENCE_ENDS, and CLOSERS behind it, if what follows begins a new word or is nothing. A
    full stop behind an abbreviation, an initial, or a number that may go on ends none. In scripts without such marks
    it ends where nothing follows.

    Args:
        before: the text up to there.
        after: what follows, or its beginning; "": nothing does; None: not known, and then only what is certain counts.

    >>> ends_sentence("I saw Dr.", " Who"), ends_sentence("It cost $10.", "5"), ends_sentence("I saw it.", " It")
    (False, False, True)
    """
    if before[-1:] == "»" and before[-2:-1].isspace() and "«" not in before:
        return False  # in German it opens a quotation
    opened = PAIRED.get(before[-1:])
    if opened and opened in before:
        before = before[:-1]
    found = next((some for some in END.finditer(before) if some.end() == len(before)), None)
    if found is None:
        return after == "" and bool(UNMARKED.match(before[-1:]))
    marks, follows = found.group(1), after or ""
    if marks[-1] in WIDE_ENDS:
        return follows[:1] not in tuple(CLOSERS)
    if follows and not (follows[0].isspace() or (marks[-1] in "!?" and ord(follows[0]) >= 0x2E80)):
        return False
    word = WORD_BEFORE.findall(before[: found.start()])[0].lstrip(OPENERS)
    if marks != ".":
        return not (marks[-1] in ".…" and follows.lstrip()[:1].islower())
    return not _stands_within(word, before[: found.start()].strip() == word, after)


def cut_to_sentence(text: str, complete: bool) -> str:
    """A text back to its last certain sentence end; empty without one.

    Args:
        complete: whether nothing follows the text; else what follows is not known.

    >>> cut_to_sentence("A fine film. It cost $10.", complete=False), cut_to_sentence("the TBO team vs.", complete=True)
    ('A fine film.', '')
    """
    if complete and ends_sentence(text, ""):
        return text
    ends = {place for some in END.finditer(text) for place in (some.end(1), some.end())}
    for place in sorted(ends, reverse=True):
        after = text[place:] or ("" if complete else None)
        if ends_sentence(text[:place], after):
            return text[:place]
    return ""


# What closes a quotation that a mark opens; straight marks do both, and so do German, Danish and Swedish ones.
QUOTES = dict(zip("\"'“‘”’«»‹「『《", "\"'”’”’»«›」』》", strict=True)) | {"„": "“”", "‚": "‘’"}
APOSTROPHES = "'’"  # of these one that nothing closes may belong to its word, as in 'tis
ELIDED = frozenset(
    ("bout", "cause", "cos", "em", "ere", "neath", "nuff", "round", "til", "till", "tis", "twas", "twere", "twill")
)
WITHIN = re.compile(rf"(?<=\w)[{APOSTROPHES}](?=\w)")
SHUT = re.compile(rf"(.*[{re.escape(SENTENCE_ENDS)}])\s?([^\w\s])", re.DOTALL)


def unquoted(text: str) -> str:
    """A text without the quotation marks around it, and without one at either end whose other is missing.

    A model that is asked for a sentence often quotes it, and stops within the quotation.

    >>> unquoted('"A fine film."'), unquoted("“A fine film. It"), unquoted('"Fine," he said.')
    ('A fine film.', 'A fine film. It', '"Fine," he said.')
    """
    closes = _partner(text)
    if closes is None:
        if text[:1] in QUOTES and not _elided(text):
            return unquoted(text[1:].lstrip())
        shut = SHUT.fullmatch(text)
        return shut.group(1) if shut and _lone(shut.group(2), shut.group(1)) else text
    inside, behind = text[1:closes].strip(), text[closes + 1 :]
    if behind.strip(SENTENCE_ENDS):  # the quotation is a part of the text
        return text
    return unquoted(inside if inside[-1:] in SENTENCE_ENDS else inside + behind)


def _elided(text: str) -> bool:
    """Whether the mark at the start of a text stands for letters that are left out, as in 'Tis and '90s."""
    behind = text[1:].lstrip()
    word = "".join(itertools.takewhile(str.isalpha, behind))
    return text[0] in APOSTROPHES and (not behind[:1].isupper() or word.casefold() in ELIDED)


def _partner(text: str) -> int | None:
    """Where the quotation that a text begins with is closed; None where it is not, or the text begins with none."""
    opens, within = text[:1], {found.start() for found in WITHIN.finditer(text)}
    depth = 1
    for place in range(1, len(text) if opens in QUOTES else 0):
        mark, begins = text[place], text[place - 1].isspace() and text[place + 1 : place + 2].isalnum()
        if mark == opens and (begins or mark not in QUOTES[opens]):
            depth += 1
        elif mark in QUOTES[opens] and place not in within:
            depth -= 1
        if not depth:
            return place
    return None


def _lone(mark: str, before: str) -> bool:
    """Whether a mark closes a quotation that nothing before it opens."""
    before = WITHIN.sub("", before)
    openers = [opens for opens, closing in QUOTES.items() if mark in closing]
    opened, closed = sum(before.count(opens) for opens in openers if opens != mark), before.count(mark)
    return bool(openers) and (opened <= closed if opened else closed % 2 == 0)


def _stands_within(word: str, alone: bool, after: str | None) -> bool:
    """Whether a full stop behind a word does not end the sentence; `alone`: the word is all that stands before it."""
    if not word or not word[-1].isalnum():
        return False
    if INITIAL.fullmatch(word) and (word.isupper() or word.casefold() in ABBREVIATIONS):
        return True
    last = re.split(r"[-/(\[]", word)[-1].casefold()
    if {word.casefold(), last} & ABBREVIATIONS or DOTTED.fullmatch(word):
        return True
    follows = (after or "").lstrip()[:1]
    if last in NUMBERED and follows.isdigit():
        return True
    if word[-1].isdigit():
        return alone or after is None or follows.islower() or follows.isdigit()
    return after is None and not word.replace("'", "").replace("’", "").replace("-", "").isalpha()
