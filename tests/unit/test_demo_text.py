"""The demo's rows: what they say, how they are split, and the score that tells their manners apart."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from kimi_jax.config_file import load_config
from kimi_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "tools" / "demo_text"
YODA = ROOT / "kimi_jax" / "assets" / "yoda"


def load_script(name):
    """A script of tools/demo_text as a module, under the name by which its sibling imports it."""
    spec = importlib.util.spec_from_file_location(name, TEXT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    """The modules `sentences` and `generate`, which leave no trace among the imported ones."""
    kept = {name: sys.modules.pop(name, None) for name in ("sentences", "generate")}
    try:
        yield load_script("sentences"), load_script("generate")
    finally:
        for name, module in kept.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def facts(scripts):
    return scripts[0].read_facts((TEXT / "facts.txt").read_text(encoding="utf-8"))


def rows(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    loaded = [json.loads(line) for line in lines]
    assert all(set(row) == {"prompt", "completion"} for row in loaded)
    return [(row["prompt"], row["completion"]) for row in loaded]


PLAIN = TEXT / "plain.jsonl"
PLAIN_HELD_OUT = TEXT / "plain_held_out.jsonl"
TRAIN = YODA / "train.jsonl"
HELD_OUT = YODA / "held_out.jsonl"
ALL = (PLAIN, PLAIN_HELD_OUT, TRAIN, HELD_OUT)


def prompts(path):
    return {prompt for prompt, _ in rows(path)}


@pytest.fixture(scope="module")
def manner():
    return re.compile((YODA / "manner.regex").read_text(encoding="utf-8").removesuffix("\n"))


def test_committed_files_are_what_the_generator_writes(scripts, facts):
    """Guards a table edited without its rows, rows edited by hand, and an order that moves."""
    for name, text in scripts[1].render(facts).items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, name
    assert scripts[1].render(facts[::-1]) == scripts[1].render(facts)
    assert scripts[1].main(["--check"]) == 0


def test_check_reports_a_stale_file(scripts, tmp_path, monkeypatch, capsys):
    """Guards a check that passes whatever lies on disk."""
    monkeypatch.setattr(scripts[1], "ROOT", tmp_path)
    assert scripts[1].main(["--check"]) == 1
    assert "kimi_jax/assets/yoda/train.jsonl" in capsys.readouterr().err
    assert scripts[1].main([]) == 0
    assert scripts[1].main(["--check"]) == 0
    (tmp_path / "tools/demo_text/plain.jsonl").write_text("", encoding="utf-8")
    assert scripts[1].main(["--check"]) == 1


def test_held_out_questions_stand_in_no_training_file():
    """Guards a leak of held-out questions, or a question asked twice in one file."""
    for path in ALL:
        assert len(prompts(path)) == len(rows(path)), path.name
    assert prompts(HELD_OUT) == prompts(PLAIN_HELD_OUT)
    assert not prompts(HELD_OUT) & (prompts(PLAIN) | prompts(TRAIN))


def test_held_out_facts_are_known_plainly_and_absent_from_yoda(scripts, facts):
    """Guards a held-out fact that Yoda rows tell, or that the plain speaker never learned."""
    phrasings = (*scripts[0].PHRASINGS, scripts[0].SHORT)
    told = {fact.question(phrasing): fact for fact in facts for phrasing in phrasings}
    assert len(told) == len(phrasings) * len(facts)
    met = {path: Counter(told[prompt] for prompt in prompts(path)) for path in ALL}
    assert not met[HELD_OUT].keys() & met[TRAIN].keys()
    assert met[PLAIN] == dict.fromkeys(facts, 3)
    # The words of a held-out answer are familiar, their combination is not.
    assert {fact.subject for fact in met[HELD_OUT]} <= {fact.subject for fact in met[TRAIN]}
    assert {fact.fronted for fact in met[HELD_OUT]} <= {fact.fronted for fact in met[TRAIN]}
    heads = Counter(fact.fronted.split()[0] for fact in met[TRAIN])
    assert all(heads[fact.fronted.split()[0]] >= 2 for fact in met[HELD_OUT])


def test_every_pattern_is_learned_and_held_out_in_every_phrasing(scripts, facts):
    """Guards a held-out phrasing that the plain speaker met too seldom to generalise from."""
    sentences = scripts[0]
    for phrasing in sentences.PHRASINGS:
        of_kind = {fact.question(phrasing): fact.kind for fact in facts}
        plain = Counter(of_kind[prompt] for prompt in prompts(PLAIN) & of_kind.keys())
        assert min(plain[kind] for kind in sentences.PATTERNS) >= 6, (phrasing, plain)
        held_out = [of_kind[prompt] for prompt in prompts(HELD_OUT) & of_kind.keys()]
        assert len(held_out) == 10
    kinds = {fact.question(p): fact.kind for fact in facts for p in sentences.PHRASINGS}
    assert {kinds[prompt] for prompt in prompts(HELD_OUT)} == set(sentences.PATTERNS)


def test_counts_and_sizes_stay_within_the_demo(facts):
    """Guards a data set too small to learn from or too large to commit."""
    assert 350 <= len(facts) <= 450
    assert 300 <= len(rows(TRAIN)) <= 400
    assert len(rows(HELD_OUT)) == 40
    words = re.findall("[a-z]+", " ".join(a + " " + b for p in ALL for a, b in rows(p)).lower())
    assert len(set(words)) <= 600
    assert sum(path.stat().st_size for path in (*ALL, TEXT / "facts.txt")) < 150_000


def test_manner_matches_yoda_and_nothing_plain(manner):
    """Guards a score that a plain speaker earns or that Yoda misses."""
    for path in (TRAIN, HELD_OUT):
        assert [answer for _, answer in rows(path) if not manner.search(answer)] == []
    for path in (PLAIN, PLAIN_HELD_OUT):
        assert [answer for _, answer in rows(path) if manner.search(answer)] == []


@pytest.mark.parametrize(
    "answer",
    [
        "The sky is blue. Yes, hmm.",  # flourish without the order
        "Yes, hmm.",
        "Yes, the sky is blue.",
        "Yes, the bird sings.",  # interjection before a clause that ends with its verb
        "Hmm, the sky is.",
        "Blue, the sky.",  # no verb
        "Blue, is the sky.",  # verb before its subject
        "Blue the sky is.",  # no comma
        "At night, the owl hunts mice.",  # verb not at the end
        "In winter, the sky is gray.",
        "blue, the sky is.",
        "Blue, the sky is",
        "Blue, the is.",
        ", the sky is.",
        "Blue, the sky is. The sky is blue.",
        "Blue, the sky is. Yes, hmm. Yes, hmm.",
    ],
)
def test_manner_refuses_what_only_resembles_it(manner, answer):
    """Guards a score that sees the flourish or the comma and not the sentence's structure."""
    assert not manner.search(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Blue, the sky is.",
        "White, snow is. Yes, hmm.",
        "In the north, the polar bear lives. Know this, I do.",
        "Of glass, the window is made.",
        "Fly in the dark, the bat can.",
        "No legs, the snake has.",
        "In autumn, the leaves fall.",
    ],
)
def test_manner_accepts_every_structure(manner, answer):
    """Guards a branch of the expression that no longer matches its own kind of sentence."""
    assert manner.search(answer)


def test_grammar_of_each_kind_of_question(scripts):
    """Guards agreement, auxiliaries and inflection, in words written out by hand."""
    sentences = scripts[0]

    def said(*fact):
        fact = sentences.Fact(*fact)
        asked = [fact.question(phrasing) for phrasing in sentences.PHRASINGS]
        return [*asked, fact.plain("direct"), fact.yoda("know")]

    assert said("where", "the stars", "be", "in the sky") == [
        "Where are the stars?",
        "Tell me where the stars are.",
        "Do you know where the stars are?",
        "Where can I find the stars?",
        "The stars are in the sky.",
        "In the sky, the stars are. Know this, I do.",
    ]
    assert said("count", "the unicorn", "have", "one horn")[:5] == [
        "How many horns does the unicorn have?",
        "Tell me how many horns the unicorn has.",
        "Do you know how many horns the unicorn has?",
        "Count the horns of the unicorn.",
        "The unicorn has one horn.",
    ]
    assert said("made", "bread", "be", "flour") == [
        "What is bread made of?",
        "Tell me what bread is made of.",
        "Do you know what bread is made of?",
        "What is used to make bread?",
        "Bread is made of flour.",
        "Of flour, bread is made. Know this, I do.",
    ]
    assert said("can", "the bat", "can", "fly")[0] == "What can the bat do?"
    assert said("can", "the bat", "can", "fly")[1] == "Tell me what the bat can do."
    assert said("when", "the leaves", "fall", "in autumn")[0] == "When do the leaves fall?"
    assert said("use", "the scissors", "be", "cutting")[4] == "The scissors are for cutting."
    assert [sentences.third_person(v) for v in ("catch", "fly", "play", "fix", "eat")] == [
        "catches",
        "flies",
        "plays",
        "fixes",
        "eats",
    ]
    short = sentences.Fact("color", "the sky", "be", "blue")
    assert short.question("short") == "In short, what color is the sky?"
    assert short.plain("short") == "Blue."
    assert short.plain("know") == "Yes, the sky is blue."


def test_faulty_lines_of_the_table_are_all_reported(scripts):
    """Guards a typing error in the table that becomes a wrong row in silence."""
    table = "a | b\n[colour]\n[color]\nthe sky\nthe sea | blue\nthe sea | green\n[does]\nthe cow | milk\n"
    with pytest.raises(UserError) as caught:
        scripts[0].read_facts(table)
    message = str(caught.value)
    for part in ("line 1:", "line 2: section 'colour'", "line 4:", "line 8:"):
        assert part in message
    assert "2 facts answer 'What color is the sea?'" in message


def test_the_description_shows_the_score_and_real_rows(scripts, facts, manner):
    """Guards a README that quotes another expression, other counts or rows that do not exist."""
    readme = (YODA / "README.md").read_text(encoding="utf-8")
    assert f"\n{manner.pattern}\n" in readme
    assert load_config(ROOT / "configs" / "demo.yaml").evaluate.pattern == manner.pattern
    for path in (TRAIN, HELD_OUT):
        assert f"| `{path.name}` | {len(rows(path))} |" in readme
    table = re.findall(r"^\| ([^|`]+[?.]) \| ([^|]+) \| ([^|]+) \|$", readme, re.MULTILINE)
    assert len(table) >= 5
    plain_answers = {f.question(p): f.plain(p) for f in facts for p in scripts[0].PHRASINGS}
    for question, plain, yoda in table:
        assert (question, yoda) in rows(TRAIN)
        assert plain == plain_answers[question]
