import base64
import json
import random

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Foreign

from kimi_jax.data import tokenizer as module
from kimi_jax.data.tokenizer import SPLIT_PATTERN, Tokenizer
from kimi_jax.errors import MissingFileError, UserError

CASES = ["helloWorld", "你好world", "don't", "I'VE", "1234567", "  \n x", "", "\r\n\r\n  a", "é́ñ🙂"]


@pytest.fixture(scope="module")
def foreign(pristine, byte_characters):
    """The same vocabulary and split in HF's tokenizers: every split of a token is a merge."""
    tokens = pristine[1]
    text = {token: "".join(byte_characters[byte] for byte in token) for token in tokens}
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in cuts if a in rank and b in rank]
        merges += [
            (text[a], text[b]) for a, b in sorted(known, key=lambda p: (rank[p[0]], rank[p[1]]))
        ]
    result = Foreign(models.BPE({text[t]: rank[t] for t in tokens}, merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    return result


@pytest.mark.parametrize("text", CASES)
def test_known_strings_have_the_foreign_ids(tokenizer, foreign, text):
    # Guards the split pattern: a Llama-like one differs on case changes and on mixed scripts.
    assert tokenizer.encode(text) == foreign.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("helloWorld JSONParser", ["hello", "World", " JSONParser"]),
        ("World你好world", ["World", "你好", "world"]),
        ("don't I'VE we'll-see", ["don't", " I'VE", " we'll", "-see"]),
        ("1234567 8", ["123", "456", "7", " ", "8"]),
        ("  \n x", ["  \n", " x"]),
        ("a   b, c!\n\n", ["a", "  ", " b", ",", " c", "!\n\n"]),
        ("ends   ", ["ends", "   "]),
    ],
)
def test_text_is_cut_into_the_familys_pieces(text, pieces):
    # Written out by hand: the comparison of ids below uses one pattern on both sides.
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


def test_random_strings_have_the_foreign_ids(tokenizer, foreign):
    rng = random.Random(0)
    alphabet = [
        *"aBcdEéÑ你好北ǅʰ12 3\t\n\r'sST.,!-_🙂\u0301",
        " the",
        "river",
        "helloWorld",
        "don't",
    ]
    for _ in range(400):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 25)))
        assert tokenizer.encode(text) == foreign.encode(text).ids, repr(text)


def test_control_tokens_in_text_stay_text(tokenizer):
    text = "say <|im_end|> or [EOS] or <think> or <|reserved_token_430|>"
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_control(i) for i in ids)
    assert tokenizer.decode(ids) == text


def test_ids_are_looked_up(tokenizer, pristine):
    base = len(pristine[1])
    assert tokenizer.vocab_size == base + 256
    assert tokenizer.control_id("<|im_end|>") == base + 2 == tokenizer.end_id
    assert tokenizer.control_id("[PAD]") == base + 255
    assert tokenizer.control_id(f"<|reserved_token_{base + 100}|>") == base + 100
    assert tokenizer.end_name == "<|im_end|>"  # and not tokenizer_config's eos_token, [EOS]
    with pytest.raises(UserError, match=r"no control token '<\|im_start\|>'"):
        tokenizer.control_id("<|im_start|>")


def test_decode_can_leave_control_tokens_out(tokenizer):
    ids = [*tokenizer.encode("yes"), tokenizer.end_id]
    assert tokenizer.decode(ids) == "yes<|im_end|>"
    assert tokenizer.decode(ids, skip_control=True) == "yes"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"
    with pytest.raises(UserError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


def test_long_texts_are_cut_where_the_family_cuts_them(tokenizer, monkeypatch):
    text = "aaa  the river"
    whole = tokenizer.encode(text)
    monkeypatch.setattr(module, "LONGEST_TEXT", 12)
    monkeypatch.setattr(module, "LONGEST_RUN", 5)
    assert list(module._cuts("aaaaaaa")) == ["aaaaa", "aa"]
    assert list(module._cuts("aaaaaaaaaaa")) == ["aaaaa", "aaaaa", "a"]
    assert list(module._cuts("aaa     b")) == ["aaa     b"]
    assert list(module._cuts("aaa      b")) == ["aaa     ", " b"]
    assert list(module._cuts("abc abc abc abc")) == ["abc abc abc ", "abc"]
    assert tokenizer.encode(text) == tokenizer.encode("aaa  the riv") + tokenizer.encode("er")
    assert tokenizer.encode(text) != whole  # " river" is one piece when it is not cut


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800")


def lines_of(checkpoint):
    return (checkpoint / "tiktoken.model").read_text().splitlines()


def test_every_bad_line_of_the_vocabulary_is_listed(checkpoint):
    lines = lines_of(checkpoint)
    lines[3] = "no-base64! 3"
    lines[5] = lines[4]
    lines[7] = f"{base64.b64encode(b'qq').decode()} seven"
    lines[9] = "one two three"
    lines[11] = f"{lines[10].split()[0]} 11"
    (checkpoint / "tiktoken.model").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        Tokenizer.from_checkpoint(checkpoint)
    message = str(caught.value)
    for expected in (
        "tiktoken.model:4: b'no-base64!' is not base64",
        "tiktoken.model:6: rank 4 repeats line 5",
        "tiktoken.model:8: rank b'seven' is not a whole number",
        "tiktoken.model:10: 3 fields",
        "tiktoken.model:12: token",
        "repeats line 11",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lines: [*lines[:300], *lines[301:]], "the first that is missing is 300"),
        (lambda lines: lines[1:], "single bytes are no token"),
        (lambda lines: [], "no token at all"),
        (lambda lines: ["version https://git-lfs.github.com/spec/v1"], "Git LFS pointer"),
    ],
)
def test_incomplete_vocabularies_are_refused(checkpoint, change, expected):
    (checkpoint / "tiktoken.model").write_text("\n".join(change(lines_of(checkpoint))))
    with pytest.raises(UserError, match=expected):
        Tokenizer.from_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json", "config.json"])
def test_absent_files_are_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(MissingFileError, match=name):
        Tokenizer.from_checkpoint(checkpoint)


def edit(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ({"3": {"content": "<x>"}}, "already a token of tiktoken.model"),
        ({"9999": {"content": "<x>"}}, "beyond the last reserved id"),
        ({"421": {"content": "<x>"}, "422": {"content": "<x>"}}, "421 and 422 are both called"),
        ({"four": {"content": "<x>"}}, "not an id"),
        ({"421": "<x>"}, '"content": text'),
        ({}, "missing or empty"),
    ],
)
def test_bad_control_tokens_are_refused(checkpoint, added, expected):
    edit(checkpoint / "tokenizer_config.json", added_tokens_decoder=added)
    with pytest.raises(UserError, match=expected):
        Tokenizer.from_checkpoint(checkpoint)


def test_files_that_are_no_json_are_named_with_the_line(checkpoint):
    (checkpoint / "tokenizer_config.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json:2: not valid JSON"):
        Tokenizer.from_checkpoint(checkpoint)


def test_vocabulary_must_fit_the_model(checkpoint):
    with pytest.raises(UserError, match="belong to another model"):
        Tokenizer.from_checkpoint(checkpoint, vocab_size=500)
    assert Tokenizer.from_checkpoint(checkpoint, vocab_size=1000).vocab_size == 676


def test_end_of_turn_is_that_of_the_model(checkpoint, tokenizer):
    end = tokenizer.end_id
    config, generation = checkpoint / "config.json", checkpoint / "generation_config.json"
    config.write_text(json.dumps({"text_config": {"vocab_size": 676, "eos_token_id": end}}))
    assert Tokenizer.from_checkpoint(checkpoint).end_id == end  # K2.5 keeps it in text_config
    edit(generation, eos_token_id=[end - 1, end])
    assert Tokenizer.from_checkpoint(checkpoint).end_id == end
    config.write_text(json.dumps({"vocab_size": 676}))
    with pytest.raises(UserError, match="eos_token_id is"):
        Tokenizer.from_checkpoint(checkpoint)
    edit(generation, eos_token_id=end)
    assert Tokenizer.from_checkpoint(checkpoint).end_id == end
    edit(config, eos_token_id=end - 1)
    with pytest.raises(UserError, match="must agree"):
        Tokenizer.from_checkpoint(checkpoint)
    generation.unlink()
    edit(config, eos_token_id=7)
    with pytest.raises(UserError, match="not a control token"):
        Tokenizer.from_checkpoint(checkpoint)
