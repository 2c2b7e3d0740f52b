"""The demo checkpoint's tokenizer files, in K2-Thinking's own form."""

import base64
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from kimi_jax.data.tokenizer import SPLIT_PATTERN
from kimi_jax.data.vocabulary import RESERVED_IDS

TEXT_TOKENS = 1024  # fewer, and half of the 529 words of the texts fall into pieces

# Offsets from the number of text tokens, and whether decoding with "skip special" drops them; as in
# K2-Thinking's tokenizer_config.json.
CONTROL = {
    "[BOS]": (0, True),
    "[EOS]": (1, True),
    "<|im_end|>": (2, True),
    "<|im_user|>": (3, True),
    "<|im_assistant|>": (4, True),
    "<|start_header_id|>": (6, True),
    "<|end_header_id|>": (7, True),
    "[EOT]": (9, True),
    "<|im_system|>": (10, True),
    "<|tool_calls_section_begin|>": (11, False),
    "<|tool_calls_section_end|>": (12, False),
    "<|tool_call_begin|>": (13, False),
    "<|tool_call_argument_begin|>": (14, False),
    "<|tool_call_end|>": (15, False),
    "<|im_middle|>": (17, True),
    "<think>": (22, False),
    "</think>": (23, False),
    "[UNK]": (254, True),
    "[PAD]": (255, True),
}


def vocab_size() -> int:
    """Text tokens and the reserved range behind them."""
    return TEXT_TOKENS + RESERVED_IDS


def control_id(name: str) -> int:
    """Id of a control token of the demo."""
    return TEXT_TOKENS + CONTROL[name][0]


def write_tokenizer(directory: Path, texts: list[str]) -> None:
    """Learns byte pairs from `texts` and writes `tiktoken.model` and `tokenizer_config.json`.

    A pair's rank is its place in the order of learning, which is all that tiktoken's engine needs.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    byte_of = _byte_of_character()
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(byte_of[c] for c in token) for token, _ in learned if len(token) > 1]
    ranks = [bytes([value]) for value in range(256)] + merged
    assert len(ranks) == TEXT_TOKENS, f"{len(ranks)} tokens: too little text for {TEXT_TOKENS}"
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (directory / "tiktoken.model").write_text("".join(lines), encoding="ascii")
    config = {
        "added_tokens_decoder": {
            str(TEXT_TOKENS + offset): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": special,
            }
            for name, (offset, special) in CONTROL.items()
        },
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        # As in the releases, this is not the token that ends a turn: config.json's eos_token_id is.
        "eos_token": "[EOS]",
        "model_max_length": 1_000_000_000,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _byte_of_character() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in set(printable)]
    return table | {chr(256 + place): value for place, value in enumerate(others)}
