"""What the two example adapters must sound like, as rules on plain text.

Standard library only, so that a test or a demo can judge an answer without loading anything. The prompts of
`HELD_OUT` and `BASE_QUESTION` are in no training pair; `pairs.load_pairs` refuses data that contain them.
"""

from __future__ import annotations

import json
import re

BASE_QUESTION = "What is the capital of France?"

HELD_OUT: tuple[str, ...] = (
    "What is the capital of Japan?",
    "Who wrote Romeo and Juliet?",
    "What color is a ripe banana?",
    "How many days are there in a week?",
    "What do bees make?",
    "Why is sleep important?",
    "How do I boil an egg?",
    "Name an animal that lives in the desert.",
    "What is the largest planet in the solar system?",
    "What should I wear on a rainy day?",
)

# Words that give away a prompt's subject. No training pair may contain one: no prompt is there in other words either.
HELD_OUT_SUBJECTS: tuple[str, ...] = (
    "france",
    "paris",
    "japan",
    "tokyo",
    "juliet",
    "banana",
    "week",
    "bee",
    "bees",
    "honey",
    "sleep",
    "egg",
    "eggs",
    "desert",
    "jupiter",
    "rain",
    "rainy",
)

PIRATE_WORDS: frozenset[str] = frozenset(
    (
        "ahoy",
        "arr",
        "arrr",
        "avast",
        "aye",
        "bilge",
        "booty",
        "buccaneer",
        "cap'n",
        "doubloons",
        "grog",
        "hearties",
        "hearty",
        "landlubber",
        "landlubbers",
        "matey",
        "mateys",
        "o'",
        "scallywag",
        "scurvy",
        "shiver",
        "swashbuckler",
        "yarr",
        "ye",
        "yer",
        "yo-ho-ho",
    )
)

MIN_PIRATE_WORDS = 2


def words(text: str) -> list[str]:
    """The lower-case words of `text`; an apostrophe or a hyphen belongs to its word (`o'`, `cap'n`, `yo-ho-ho`)."""
    return re.findall(r"[a-z]+(?:['-][a-z]+)*'?", text.lower().replace("\u2019", "'"))


def is_json(text: str) -> bool:
    """True if `text`, stripped, is exactly one JSON object, flat (no list or object inside), with an "answer".

    `answer` is a string that is not blank. Text before or after the object, a cut-off object, or the literals NaN and
    Infinity, which are not JSON, make it false.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except ValueError:
        return False
    if not isinstance(value, dict) or any(isinstance(item, dict | list) for item in value.values()):
        return False
    answer = value.get("answer")
    return isinstance(answer, str) and bool(answer.strip())


def is_pirate(text: str) -> bool:
    """True if `text` contains at least two distinct words of `PIRATE_WORDS` (whole words, any case)."""
    return len(PIRATE_WORDS.intersection(words(text))) >= MIN_PIRATE_WORDS


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
