"""A small checkpoint directory in the family's format: vocabulary, control tokens, template."""

import base64
import json
import shutil
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Foreign
from tokenizers import models, pre_tokenizers, trainers

from kimi_jax.data.chat import Chat
from kimi_jax.data.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parents[3] / "tools" / "demo_text" / "chat_template.jinja"

CORPUS = """The river runs to the sea, and the sea does not ask the river where it has been.
What is the capital of France? The capital of France is Paris. Don't say it isn't; we'll see.
helloWorld fooBar JSONParser I'VE seen 1234567 apples, 42 pears and 365 days, haven't you?
你好，世界。河流入海，海不问河从哪里来。你好world 北京 Beijing
    def double(x):
        return 2 * x
"""

CONTROL = [
    "[BOS]",
    "[EOS]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<think>",
    "</think>",
]


def _byte_characters():
    """The characters by which byte-level vocabularies write bytes, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def train_ranks(corpus, size):
    """Token bytes in rank order, by the foreign trainer."""
    foreign = Foreign(models.BPE())
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    foreign.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    by_rank = sorted(foreign.get_vocab().items(), key=lambda item: item[1])
    return [bytes(byte_of[character] for character in token) for token, _ in by_rank]


def write_checkpoint(directory):
    """Writes the tokenizer's files of a checkpoint into `directory`; returns its tokens' bytes."""
    tokens = train_ranks(CORPUS, 420)
    base = len(tokens)
    (directory / "tiktoken.model").write_text(
        "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))
    )
    unmarked = ("<think>", "</think>", "<|tool_call")
    added = {
        str(base + i): {"content": name, "special": not name.startswith(unmarked)}
        for i, name in enumerate(CONTROL)
    }
    added[str(base + 255)] = {"content": "[PAD]", "special": True}
    config = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    end = base + CONTROL.index("<|im_end|>")
    (directory / "config.json").write_text(
        json.dumps({"vocab_size": base + 256, "eos_token_id": end})
    )
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    shutil.copy(TEMPLATE, directory / "chat_template.jinja")
    return tokens


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """(directory, token bytes in rank order) of a checkpoint that no test may change."""
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, write_checkpoint(directory)


@pytest.fixture(scope="session")
def byte_characters():
    return _byte_characters()


@pytest.fixture
def checkpoint(pristine, tmp_path):
    """A copy of the checkpoint to change at will."""
    return Path(shutil.copytree(pristine[0], tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def tokenizer(pristine):
    return Tokenizer.from_checkpoint(pristine[0])


@pytest.fixture(scope="session")
def chat(pristine, tokenizer):
    return Chat.from_checkpoint(pristine[0], tokenizer)


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows (objects, or text as it is) to a JSONL file and returns its path."""

    def write(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


@pytest.fixture
def marked(tokenizer):
    """Decodes an example with what is trained between { and }."""

    def show(example):
        pairs = zip(example.tokens.tolist(), example.loss_weights.tolist(), strict=True)
        parts = []
        for weight, run in groupby(pairs, key=lambda pair: pair[1]):
            text = tokenizer.decode([token for token, _ in run])
            parts.append({0.0: text, 1.0: "{" + text + "}"}[weight])
        return "".join(parts)

    return show
