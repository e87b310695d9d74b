"""Where a sentence ends, as far as its letters and what follows it tell.

Knows no model and no task. A full stop also stands behind abbreviations and initials, in numbers and in addresses.
"""

import re

SENTENCE_ENDS = ".!?…。！？"
WIDE_ENDS = "。！？"  # no space follows these
CLOSERS = "\"'”’)]»」』）】》"
END = re.compile(rf"([{re.escape(SENTENCE_ENDS)}]+)[{re.escape(CLOSERS)}]*")
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
    full stop behind an abbreviation, an initial, or a number that may go on ends none.

    Args:
        before: the text up to there.
        after: what follows, or its beginning; "": nothing does; None: not known, and then only what is certain counts.

    >>> ends_sentence("I saw Dr.", " Who"), ends_sentence("It cost $10.", "5"), ends_sentence("I saw it.", " It")
    (False, False, True)
    """
    found = next((some for some in END.finditer(before) if some.end() == len(before)), None)
    if found is None:
        return False
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
    for place in reversed([some.end() for some in END.finditer(text)]):
        after = text[place:] or ("" if complete else None)
        if ends_sentence(text[:place], after):
            return text[:place]
    return ""


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
