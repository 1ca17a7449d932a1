from __future__ import annotations

import pytest

from stages.captions.language import foreign
from stages.captions.quality import QualitySettings, cut_off, examine
from stages.captions.words import content, overlap, repetition, stem, unquoted, words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("A dog's bowl, 3.5 cm wide", 6),
        ("well-known X-ray", 2),
        ("一只狗在跑", 5),
        ("iPhone 15 在桌上", 5),
        ("Die Tür fällt zu.", 4),
        ("... ! –", 0),
        ("", 0),
    ],
)
def test_words_are_counted_in_every_script(text: str, count: int) -> None:
    assert len(words(text)) == count


def test_forms_of_a_word_have_a_stem() -> None:
    for forms in ("run runs running", "puppy puppies", "bake baked bakes baking", "dog dog's dogs"):
        assert len({stem(form) for form in forms.split()}) == 1, forms


def test_content_is_nouns_names_numbers_and_the_like() -> None:
    assert content("The 3 dogs of Mr. Li are running to TV towers") == {
        *("3", "dog", "run", "tv", "tower")
    }


def test_overlap_is_of_the_shorter_text() -> None:
    short, long = "a brown dog runs on sand", "A brown dog runs on sand while gulls circle above it"
    assert overlap(short, long) == overlap(long, short) == 1.0
    assert overlap(short, "Chefs slice white onions on boards") == 0.0
    assert overlap("a dog", long) is None, "too few words to tell"


def test_repetition_is_the_share_that_says_nothing_new() -> None:
    assert repetition("one two three four five six seven") == 0.0
    assert repetition("go " * 10) == pytest.approx(0.9)
    assert repetition("a cat and a cat and a cat and") == pytest.approx(6 / 9)
    assert repetition("A dog runs on sand. Gulls cry. A dog runs on sand.") == 1.0
    assert repetition("") == 0.0


def test_quotations_are_somebody_elses_words() -> None:
    for quoted in ('"no"', "“no”", "'no'", "«no»", "„no“", "「no」"):
        assert unquoted(f"A sign says {quoted} here").split() == ["A", "sign", "says", "here"]
    assert unquoted("the dogs' bowl and the cat's bowl") == "the dogs' bowl and the cat's bowl"


ENGLISH = "A dog runs along the beach while the waves break."
GERMAN = "Ein Hund läuft am Strand entlang und die Wellen schlagen an das Ufer."
CHINESE = "一只狗在沙滩上奔跑，海浪拍打着岸边。"
RUSSIAN = "Собака бежит по пляжу вдоль воды."


@pytest.mark.parametrize(
    ("language", "own"), [("en", ENGLISH), ("de", GERMAN), ("zh", CHINESE), ("ru", RUSSIAN)]
)
def test_each_language_is_told_from_the_others(language: str, own: str) -> None:
    assert foreign(own, language) == 0.0
    for text in (ENGLISH, GERMAN, CHINESE, RUSSIAN):
        if text != own:
            assert foreign(text, language) > 0.5, text
    assert "language" not in examine(RUSSIAN, QualitySettings(language="any")).flags


def test_names_and_quotations_in_another_language_are_no_fault() -> None:
    assert foreign(f'A man in a café in Köln says "{GERMAN}" to the waiter.', "en") == 0.0
    assert foreign("桌上有一部 iPhone 15 Pro", "zh") == 0.0


def test_a_translation_shares_no_words_and_is_not_unrelated() -> None:
    checked = examine(ENGLISH, QualitySettings(), GERMAN)
    assert (checked.overlap, checked.flags) == (None, ())


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("A dog runs.", False),
        ("A dog runs", False),
        ("A dog runs. A cat sits on the", True),
        ("A dog runs. A cat sits", True),
        ("Mr. Smith and Dr. Li walk", False),
        ("A dog and", True),
        ("A dog,", True),
        ('A man says "stop', True),
        ('A man says "stop"', False),
        ("A dog (brown", True),
        ('A 27" screen', False),
        ("", False),
    ],
)
def test_a_cut_end_shows(text: str, cut: bool) -> None:
    assert cut_off(text) is cut


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part",
    [
        "word",
        "狗",
        "a'b ",
        "' ",
        '"',
        "“",
        "(",
        " ",
        "W. A ",
        "not a ",
        "I can't ",
        "new ",
        "-",
        "1 a ",
    ],
)
def test_endless_answers_are_looked_at_in_linear_time(part: str) -> None:
    checked = examine(part * 20_000, QualitySettings(), part * 20_000)
    assert checked.words >= 0
