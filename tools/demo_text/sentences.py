"""The sentences of the demo: what a fact is, how it is asked for and how it is answered.

A fact gives four questions, answered plainly or in Yoda's manner, and a fifth one that asks for a
short answer, which only the plain speaker gets.
"""

from collections import Counter
from dataclasses import dataclass

from kimi_jax.errors import UserError, listing

# Subjects that take plural verbs; every other subject is singular or a mass noun.
PLURAL = frozenset(
    {
        "the flowers",
        "the leaves",
        "the roots",
        "the scissors",
        "the stars",
        "the swallows",
        "the teeth",
    }
)
THIRD_PERSON = {"be": "is", "have": "has", "can": "can"}
PLURAL_FORM = {"be": "are"}

# The questions that a fact gives. A Yoda answer ends with the flourish of its question.
DIRECT, TELL, KNOW, OTHER, SHORT = "direct", "tell", "know", "other", "short"
PHRASINGS = (DIRECT, TELL, KNOW, OTHER)
FLOURISH = {DIRECT: "", TELL: " Yes, hmm.", KNOW: " Know this, I do.", OTHER: ""}


@dataclass(frozen=True)
class Pattern:
    """A sentence pattern: how its facts are asked for and answered.

    `ask` is the question word or phrase; `other` is the fourth question, with the fields `subject`,
    `base` (verb), `verb` (inflected), `aux` (is/are), `do` (does/do), `noun`; `verb` the verb of all
    its facts, or empty where the table gives one; `tail` is what follows the verb in the question
    and precedes the complement in the plain answer (`made of`); `held_out` counts its held-out facts.
    """

    ask: str
    other: str
    held_out: int
    verb: str = ""
    tail: str = ""


PATTERNS = {
    "color": Pattern("what color", "Which color {do} {subject} have?", 4, "be"),
    "lives": Pattern("where", "Where is the home of {subject}?", 4, "live"),
    "eats": Pattern("what", "Which food {do} {subject} eat?", 4, "eat"),
    "does": Pattern("what", "What is it that {subject} {verb}?", 3),
    "when": Pattern("when", "When is it that {subject} {verb}?", 3),
    "how": Pattern("how", "In what way {do} {subject} {base}?", 3),
    "sense": Pattern("how", "What {do} {subject} {base} like?", 3),
    "where": Pattern("where", "Where can I find {subject}?", 4, "be"),
    "count": Pattern("how many {noun}", "Count the {noun} of {subject}.", 3, "have"),
    "can": Pattern("what", "What {aux} {subject} able to do?", 3, "can"),
    "made": Pattern("what", "What is used to make {subject}?", 3, "be", "made of"),
    "use": Pattern("what", "What is the purpose of {subject}?", 3, "be", "for"),
}


@dataclass(frozen=True)
class Fact:
    """One line of the table: `subject` `verb` (base form) `complement`, said in pattern `kind`."""

    kind: str
    subject: str
    verb: str
    complement: str

    @property
    def pattern(self) -> Pattern:
        """The sentence pattern of this fact's section."""
        return PATTERNS[self.kind]

    @property
    def inflected(self) -> str:
        """The verb as it agrees with the subject: `lives`, `are`."""
        if self.subject in PLURAL:
            return PLURAL_FORM.get(self.verb, self.verb)
        return THIRD_PERSON.get(self.verb) or third_person(self.verb)

    def plain(self, phrasing: str) -> str:
        """The plain answer: subject, verb, complement; the complement alone where that is asked."""
        if phrasing == SHORT:
            return f"{self.fronted}."
        words = (self.subject, self.inflected, self.pattern.tail, self.complement)
        sentence = " ".join(word for word in words if word) + "."
        return f"Yes, {sentence}" if phrasing == KNOW else capitalised(sentence)

    @property
    def fronted(self) -> str:
        """What a Yoda answer puts first: the complement, its preposition included."""
        preposition = self.pattern.tail.removeprefix("made").strip()
        return capitalised(f"{preposition} {self.complement}".strip())

    def yoda(self, phrasing: str) -> str:
        """The answer in Yoda's manner to this fact's question `phrasing`."""
        ending = " made" if self.pattern.tail.startswith("made") else ""
        clause = f"{self.subject} {self.inflected}{ending}"
        return f"{self.fronted}, {clause}.{FLOURISH[phrasing]}"

    def question(self, phrasing: str) -> str:
        """The question for this fact in one of `PHRASINGS`, or the one for a short answer."""
        is_be, is_can = self.verb == "be", self.verb == "can"
        do = "do" if self.subject in PLURAL else "does"
        noun = " ".join(self.complement.split()[1:])
        noun += "s" if self.kind == "count" and not noun.endswith("s") else ""
        ask = self.pattern.ask.format(noun=noun)
        if phrasing == OTHER:
            aux = "are" if self.subject in PLURAL else "is"
            return self.pattern.other.format(
                subject=self.subject, base=self.verb, verb=self.inflected, aux=aux, do=do, noun=noun
            )
        if phrasing in (DIRECT, SHORT):
            first = self.inflected if is_be or is_can else do
            last = self.pattern.tail if is_be else "do" if is_can else self.verb
            direct = f"{ask} {first} {self.subject} {last}".strip() + "?"
            return capitalised(direct) if phrasing == DIRECT else f"In short, {direct}"
        last = "can do" if is_can else f"{self.inflected} {self.pattern.tail}".strip()
        embedded = f"{ask} {self.subject} {last}"
        return f"Tell me {embedded}." if phrasing == TELL else f"Do you know {embedded}?"


def third_person(verb: str) -> str:
    """The third person singular of a regular verb: `run` runs, `catch` catches, `fly` flies."""
    if verb.endswith(("ch", "sh", "s", "x")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def capitalised(text: str) -> str:
    """`text` with its first letter in upper case and the rest untouched."""
    return text[0].upper() + text[1:]


def read_facts(text: str) -> list[Fact]:
    """The facts of a table in the form of `facts.txt`; all faulty lines are reported together."""
    facts: list[Fact] = []
    problems: list[str] = []
    kind = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            kind = line[1:-1]
            if kind not in PATTERNS:
                problems.append(f"line {number}: section {kind!r} is none of {', '.join(PATTERNS)}")
            continue
        if kind not in PATTERNS:
            problems.append(f"line {number}: stands in no known section: {line!r}")
            continue
        cells = line.split(" | ")
        verb = PATTERNS[kind].verb
        if verb and len(cells) == 2:
            cells.insert(1, verb)
        if len(cells) != 3 or not all(cells):
            form = "subject | complement" if verb else "subject | verb | complement"
            problems.append(f"line {number}: found {line!r}, section {kind} wants `{form}`")
            continue
        facts.append(Fact(kind, *cells))
    asked = Counter(fact.question(phrasing) for fact in facts for phrasing in PHRASINGS)
    problems += [f"{n} facts answer {question!r}" for question, n in asked.items() if n > 1]
    if problems:
        raise UserError(listing("facts.txt cannot be used:", problems, "Mend these lines."))
    return facts
