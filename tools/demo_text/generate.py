"""Writes the question/answer rows of the demo from the table of facts beside this file.

    python tools/demo_text/generate.py            writes the files
    python tools/demo_text/generate.py --check    writes nothing; exit code 1 if a file would change

The rows are split so that the held-out questions stand in no training file, although the plain
speaker has met their facts in other questions, and so that the Yoda rows never touch a held-out
fact. Every choice follows from the text of the facts, none from a random generator or from the
order of the table.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sentences import (
    DIRECT,
    FLOURISH,
    KNOW,
    OTHER,
    PATTERNS,
    PHRASINGS,
    SHORT,
    TELL,
    Fact,
    read_facts,
)

ROOT = Path(__file__).resolve().parents[2]
FACTS = Path(__file__).with_name("facts.txt")

# Questions of the Yoda rows in turn: one answer in three carries a flourish.
ROTATION = (DIRECT, TELL, OTHER, DIRECT, KNOW, OTHER)
# A fact can be held out only if the Yoda rows put its complement's first word in front this often,
# because a capitalised word is another sequence of tokens, which a small model cannot spell unseen.
HEADS_SEEN = 2


def digest(text: str) -> str:
    """A fixed pseudo-random order: the same on every machine and Python, unlike `random`."""
    return hashlib.sha256(text.encode()).hexdigest()


def by_kind(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """The facts of each pattern, in the fixed order of their plain answers' digests."""
    ordered = sorted(facts, key=lambda fact: digest(fact.plain(DIRECT)))
    return {kind: [fact for fact in ordered if fact.kind == kind] for kind in PATTERNS}


def parts(fact: Fact) -> list[str]:
    """What has to be met elsewhere before a fact can be held out: subject, fronted part, its head."""
    return [f"of {fact.subject}", fact.fronted, f"{fact.fronted.split()[0]} …"]


def choose_held_out(facts: Sequence[Fact]) -> list[Fact]:
    """The facts to hold out, `Pattern.held_out` of each kind: new combinations of familiar parts.

    The Yoda rows hold the subject and the fronted complement of each, in other facts.
    """
    left = Counter(part for fact in facts for part in parts(fact))
    chosen: list[Fact] = []
    for kind, members in by_kind(facts).items():
        before = len(chosen)
        for fact in members:
            subject, front, head = parts(fact)
            spare = left[subject] > 1 and left[front] > 1 and left[head] > HEADS_SEEN
            if spare and len(chosen) - before < PATTERNS[kind].held_out:
                chosen.append(fact)
                left.subtract(parts(fact))
        found = len(chosen) - before
        assert found == PATTERNS[kind].held_out, f"{kind}: only {found} facts can be held out"
    return chosen


def manner(facts: Sequence[Fact]) -> str:
    """The regular expression that tells Yoda's manner from plain speech; its README explains it.

    It is built from the verbs and flourishes in use, so that it cannot fall behind the facts.
    """
    clauses = [fact.yoda(DIRECT).split(", ")[1] for fact in facts]
    words = {clause.removesuffix(".").removesuffix(" made").split()[-1] for clause in clauses}
    verbs = "|".join(sorted(words))
    flourishes = "|".join(sorted({text.strip(" .") for text in FLOURISH.values() if text}))
    front = r"(?!(?:Yes|No|Well|Hmm),)[A-Z][a-z]*(?: [A-Za-z]+)*"
    subject = r"(?:(?:the|an?) (?:[a-z]+ )?[a-z]+|(?!(?:the|an?) )[a-z]+)"
    return rf"^{front}, {subject} (?:(?:is|are) made|{verbs})\.(?: (?:{flourishes})\.)?$"


def plain_phrasings(turn: int, held_out: str | None) -> list[str]:
    """The three questions by which the plain speaker learns a fact, never the held-out one.

    Besides the short question, which teaches the complement at the head of a sentence, these are
    two of the four; the pairs take turns so that every pattern is met in every phrasing.
    """
    others = [p for p in (DIRECT, TELL, OTHER) if p != held_out]
    if held_out == KNOW:
        del others[turn % 3]
        return [*others, SHORT]
    return [others[turn % len(others)], KNOW, SHORT]


def jsonl(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of (prompt, completion) as JSON lines, shuffled in a fixed order."""
    ordered = sorted(rows, key=lambda row: digest(row[0]))
    return "".join(
        json.dumps({"prompt": prompt, "completion": completion}) + "\n"
        for prompt, completion in ordered
    )


def render(facts: Sequence[Fact]) -> dict[str, str]:
    """The text of every generated file, by its path from the repository's root.

    The rows' files are JSON lines with the fields `prompt` and `completion`.
    """
    held_out = choose_held_out(facts)
    asked = {fact: PHRASINGS[i % len(PHRASINGS)] for i, fact in enumerate(held_out)}
    plain: list[tuple[str, str]] = []
    yoda: list[tuple[str, str]] = []
    turn = 0
    for members in by_kind(facts).values():
        for i, fact in enumerate(members):
            plain += [
                (fact.question(p), fact.plain(p)) for p in plain_phrasings(i, asked.get(fact))
            ]
            if fact not in asked:
                phrasing = ROTATION[turn % len(ROTATION)]
                yoda.append((fact.question(phrasing), fact.yoda(phrasing)))
                turn += 1
    return {
        "tools/demo_text/plain.jsonl": jsonl(plain),
        "tools/demo_text/plain_held_out.jsonl": jsonl(
            [(fact.question(p), fact.plain(p)) for fact, p in asked.items()]
        ),
        "kimi_jax/assets/yoda/train.jsonl": jsonl(yoda),
        "kimi_jax/assets/yoda/held_out.jsonl": jsonl(
            [(fact.question(p), fact.yoda(p)) for fact, p in asked.items()]
        ),
        "kimi_jax/assets/yoda/manner.regex": manner(facts) + "\n",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files, or compares them with `--check`; returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes the demo's question/answer rows.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    stale = []
    for name, text in render(read_facts(FACTS.read_text(encoding="utf-8"))).items():
        path = ROOT / name
        if options.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{name}: {text.count('\n')} lines")
    if stale:
        print("not as generated: " + ", ".join(stale), file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
