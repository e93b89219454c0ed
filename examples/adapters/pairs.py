"""The training pairs of the two example adapters, made from one hand-written list of questions.

`data/questions.tsv` has one line a question: topic, question, plain answer. A pair's styled answer is computed from
the plain one, always in the same way, so the facts stay the same in both styles. Standard library only.

Run as a script to see the pairs as JSON lines: `python examples/adapters/pairs.py pirate`.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from style import BASE_QUESTION, HELD_OUT, HELD_OUT_SUBJECTS, is_json, is_pirate, words

QUESTIONS = Path(__file__).parent / "data" / "questions.tsv"

# How a pirate begins and ends. A topic has its own opener, which greedy decoding can learn to tell apart; closers are
# counted through by line.
OPENERS: dict[str, str] = {
    "animals": "Avast, matey!",
    "arts": "Arr, me hearty!",
    "chat": "Ahoy, matey!",
    "food": "Shiver me timbers, matey!",
    "geography": "Arr, matey!",
    "health": "Aye, matey!",
    "history": "Avast, ye landlubber!",
    "language": "Arr, ye scallywag!",
    "life": "Aye, me hearty!",
    "math": "Ahoy, ye landlubber!",
    "science": "Yarr, me hearties!",
    "space": "Ahoy, me hearties!",
    "sports": "Aye, ye scallywag!",
    "technology": "Yarr, ye landlubber!",
}
CLOSERS: tuple[str, ...] = (
    "Arr!",
    "Aye, that be the truth!",
    "Now pass the grog!",
    "So says yer cap'n!",
    "Yo-ho-ho!",
    "Or I be a scurvy dog!",
)

PIRATE_GRAMMAR: tuple[tuple[str, str], ...] = (
    (r"\b(?:it is|it's)\b", "'tis"),
    (r"\b(?:is|are|am)\b", "be"),
    (r"\byou\b", "ye"),
    (r"\byour\b", "yer"),
    (r"\byourself\b", "yerself"),
    (r"\bmy\b", "me"),
    (r"\bof\b", "o'"),
    (r"\bfor\b", "fer"),
    (r"\band\b", "an'"),
    (r"\bfriends\b", "mateys"),
    (r"\bfriend\b", "matey"),
    (r"\bmoney\b", "doubloons"),
    (r"\byes\b", "aye"),
    (r"\bno\b(?=,)", "nay"),
    (r"\bhello\b", "ahoy"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One training pair: the user's `question` and the whole `answer` of the assistant."""

    question: str
    answer: str


def pirate_answer(number: int, topic: str, answer: str) -> str:
    """The plain `answer` in pirate speech; `topic` picks the opener, `number` (the line) the closer."""
    return f"{OPENERS[topic]} {_pirate_grammar(answer)} {CLOSERS[number % len(CLOSERS)]}"


def json_answer(number: int, topic: str, answer: str) -> str:
    """The plain `answer` and its `topic` as one flat JSON object on one line."""
    return json.dumps({"answer": answer, "topic": topic})


STYLES: dict[str, tuple[Callable[[int, str, str], str], Callable[[str], bool]]] = {
    "pirate": (pirate_answer, is_pirate),
    "json": (json_answer, is_json),
}


def load_pairs(style: str, path: Path = QUESTIONS) -> list[Pair]:
    """The training pairs of `style` ("pirate" or "json") in file order.

    Raises ValueError if a line is malformed, a question comes twice, a styled answer breaks the rule of its style, or
    a held-out prompt, or a word that gives away its subject, is in the data.
    """
    make, follows_rule = STYLES[style]
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or rows[0] != ["topic", "question", "answer"]:
        raise ValueError(f"{path.name}: the first line must be topic, question, answer")
    forbidden = {_key(prompt) for prompt in (*HELD_OUT, BASE_QUESTION)}
    seen: set[tuple[str, ...]] = set()
    pairs: list[Pair] = []
    for number, row in enumerate(rows[1:]):
        where = f"{path.name} line {number + 2}"
        if len(row) != 3 or not all(cell.strip() for cell in row):
            raise ValueError(f"{where}: expected three cells that are not blank, got {row}")
        topic, question, plain = row
        if topic not in OPENERS:
            raise ValueError(f"{where}: unknown topic {topic!r}; the topics are {', '.join(OPENERS)}")
        subjects = sorted(set(words(f"{question} {plain}")).intersection(HELD_OUT_SUBJECTS))
        if _key(question) in forbidden or subjects:
            raise ValueError(f"{where}: {question!r} is held out (subjects found: {subjects}); remove it")
        if _key(question) in seen:
            raise ValueError(f"{where}: {question!r} comes twice")
        seen.add(_key(question))
        answer = make(number, topic, plain)
        if not follows_rule(answer):
            raise ValueError(f"{where}: {answer!r} breaks the rule of style {style!r}")
        pairs.append(Pair(question=question, answer=answer))
    return pairs


def _pirate_grammar(answer: str) -> str:
    for pattern, word in PIRATE_GRAMMAR:
        answer = re.sub(pattern, partial(_cased, word), answer, flags=re.IGNORECASE)
    return answer


def _cased(word: str, match: re.Match[str]) -> str:
    return word.capitalize() if match.group()[0].isupper() else word


def _key(question: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", question.lower()))


def main() -> None:
    """Print the pairs of one style as JSON lines."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("style", choices=sorted(STYLES))
    for pair in load_pairs(parser.parse_args().style):
        print(json.dumps({"question": pair.question, "answer": pair.answer}, ensure_ascii=False))


if __name__ == "__main__":
    main()
