"""Where sentences end: a table in several languages, and texts cut back to what is certain."""

import pytest

from gradmm.readability import count_words, cut_to_sentence, ends_sentence, unquoted

ENDS = [
    ("I saw it.", " It"), ("I saw it.", ""), ("I saw it.", None), ("it was great .", " the film"),
    ("it was great .", None),
    ("Really?!", " Yes"), ("wow!", None), ("He said \"no.\"", " Then"), ("(It rained.)", " We"),
    ("It cost $10.", " The"),
    ("Sales rose 5%.", None), ("I was there in 1999.", ""), ("Visit example.com.", " The"), ("and so on ...", " Then"),
    ("这部电影很好。", "很"), ("真的吗？", None), ("太好了！", "我"), ("好!", "很"), ("Das war schön.", " Der"),
    ("C'était bien.", " Il"), ("¿Qué tal?", " Bien"), ("Фильм хороший.", " Он"), ("映画は良かった。", ""),
    ("i said no.", " then"),
    ("The film is state-of-the-art.", None), ("it's the actors'.", " They"),
    ("कमरा साफ है।", " सेवा"), ("कमरा साफ है।", None), ("کمرہ صاف ہے۔", ""), ("هل هو جيد؟", " نعم"), ("Լավ էր։", ""),
    ("ጥሩ ነበር።", ""), ("ကောင်းတယ်။", "ဒါ"), ("ល្អណាស់។", "វា"), ("ห้องสะอาดมาก", ""), ("ຫ້ອງສະອາດ", ""),
    ("Great.\nWould buy again.", ""),
    ("Er sagte: „Das war gut.“", ""), ("Han sagde: »Det var godt.«", " Så"),
]  # fmt: skip
NO_ENDS = [
    ("I saw it", " It"), ("the TBO team vs.", " the"), ("the TBO team vs.", ""), ("revenue of $10.", "5"),
    ("revenue of $10.", None),
    ("revenue of $10.", " million"), ("http://www.", "example"), ("http://www.", " x"), ("I met Dr.", " Who"),
    ("Mr.", " Smith"),
    ("the U.S.", " Army"), ("fruit, e.g.", " apples"), ("J.", " Smith"), ("George W.", " Bush"), ("Ph.D.", " students"),
    ("at 5 p.m.", " on"), ("No.", " 7"), ("1.", " The"), ("the film...", " is"), ("the film.", "com"),
    ("这部电影很好。", "”"),
    ("z.B.", " Berlin"), ("Das sind ca.", " zehn"), ("Mme.", " Dupont"), ("Sra.", " García"), ("ул.", " Ленина"),
    ("т.е.", " он"),
    ("on Oct.", " 3"), ("St.", " Louis"), ("visit example.com.", None), ("Apple Inc.", " said"), ("", ""),
    ("he said, (cf.", " page"), ("ห้องสะอาดมาก", None), ("ห้องสะอาดมาก", "และ"), ("It was so.", "“No"),
    ("das war's.“", ""),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), ENDS)
def test_here_a_sentence_ends(before, after):
    assert ends_sentence(before, after)


@pytest.mark.parametrize(("before", "after"), NO_ENDS)
def test_here_none_ends(before, after):
    assert not ends_sentence(before, after)


@pytest.mark.parametrize(
    ("text", "complete", "left"),
    [
        ("A fine film. It cost $10.", False, "A fine film."),
        ("A fine film. It cost $10.", True, "A fine film. It cost $10."),
        ("It was on http://www.", True, ""), ("It was so. Then Dr.", True, "It was so."),
        ('He said "it was." and then', False, 'He said "it was."'),
        ("很好。但是", False, "很好。"), ("很好。“我们", False, "很好。"), ("ห้องสะอาดมาก", True, "ห้องสะอาดมาก"),
        ("ห้องสะอาดมาก", False, ""), ("Er sagte: „Das war gut.“", True, "Er sagte: „Das war gut.“"),
        ("no end at all", True, ""), ("", True, ""),
    ],
)  # fmt: skip
def test_a_text_goes_back_to_its_last_certain_end(text, complete, left):
    assert cut_to_sentence(text, complete) == left


@pytest.mark.parametrize(
    "text", ["བཟང་པོ་འདུག།", "ᱱᱚᱶᱟ ᱫᱚ ᱵᱮᱥ ᱜᱮᱭᱟ᱾", "ꯃꯁꯤ ꯐꯖꯩ꯫", "ᠰᠠᠶᠢᠨ᠃", "ꦱꦲꦺ꧉", "ጥሩ ነው፧", "この方法は有効である．"]
)
def test_sentences_end_in_scripts_with_marks_of_their_own(text):
    assert cut_to_sentence(text, complete=True) == text


@pytest.mark.parametrize("space", [" ", "\u00a0", "\u202f"])
def test_a_french_quotation_keeps_its_closing_mark(space):
    text = f"«{space}C'est un très bon film.{space}»"
    assert cut_to_sentence(text, complete=True) == text
    assert cut_to_sentence(f"{text} Il a", complete=False) == text


def test_a_german_quotation_that_opens_is_no_part_of_the_sentence_before_it():
    assert cut_to_sentence("Er kam herein. »Wer ist da?« fragte sie", complete=False) == "Er kam herein."
    assert cut_to_sentence("Er kam. »", complete=True) == "Er kam."


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('"A fine film."', "A fine film."), ("'A fine film.'", "A fine film."),
        ("“It's so worth it”.", "It's so worth it."),
        ("“‘A fine film.’”", "A fine film."), ("“Wow!”.", "Wow!"), ("„Ein guter Film.“", "Ein guter Film."),
        ("«\u202fIl est bon.\u202f»", "Il est bon."), ("»Ein guter Film.«", "Ein guter Film."),
        ("”En bra film.”", "En bra film."), ("「很好。」", "很好。"),
        ('"The film "Jaws" is good."', 'The film "Jaws" is good.'),
        ("‘I don’t think I’ll see ‘Jaws’ again.’", "I don’t think I’ll see ‘Jaws’ again."),
    ],
)  # fmt: skip
def test_marks_around_a_whole_text_go(text, left):
    assert unquoted(text) == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("“It is a wonderful film.", "It is a wonderful film."), ('"Oh the irony!', "Oh the irony!"),
        ("‘I don’t like it.", "I don’t like it."), ("« Il est bon.", "Il est bon."), ("It was good.”", "It was good."),
        ('It was good."', "It was good."), ("He isn’t good.’", "He isn’t good."), ("Il est bon. »", "Il est bon."),
        ('The film "Jaws" is good."', 'The film "Jaws" is good.'),
        ('"The film "Jaws" is good.', 'The film "Jaws" is good.'),
        ("'The music is awful.", "The music is awful."), ("' I'm tired.", "I'm tired."),
        ("A “fine” film.”", "A “fine” film."), ("“", ""), ('""', ""), ("", ""),
    ],
)  # fmt: skip
def test_a_mark_at_an_end_whose_other_is_missing_goes(text, left):
    assert unquoted(text) == left


@pytest.mark.parametrize(
    "text",
    [
        '"Fine," he said, "is good."', '"Jaws" is good.', 'It was "good."', "He said: “Good.”", "»Wer?« fragte sie.",
        "'Tis a film.", "'twas good.", "'90s films.", "'Cause it's good.", "'s Ochtends.", "the dogs'.",
        "Rock 'n' roll.", "”Bra”, sade han.", "Han sa: ”Bra.”", "A film.",
        "It fell 5'10\".",
        "Er sagte: „Gut.“", "(A film.)", "“The film” is “good.”", "他说：「很好。」",
    ],
)  # fmt: skip
def test_quotations_within_a_text_stay(text):
    assert unquoted(text) == text


def test_words_are_counted_by_spaces_or_by_characters_where_there_are_none():
    assert [count_words(text) for text in ("a well-made film", "这部电影很好看。", "good 很好!", "")] == [3, 7, 3, 0]
