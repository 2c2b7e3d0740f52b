"""Reads a checkpoint's tokenizer files: ranks, control tokens, end of turn. No remote code runs."""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from kimi_jax.errors import MissingFileError, UserError, listing

RANKS_FILE = "tiktoken.model"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
RESERVED_IDS = 256  # ids kept behind the ranks for control tokens, named or not


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. MissingFileError if absent, UserError if it is not an object."""
    if not path.is_file():
        raise MissingFileError(
            f"{path.name} is missing in {path.parent}. It comes with the checkpoint: download it again."
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}; a JSON object is required.")
    return value


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank from `tiktoken.model`: one `<base64> <rank>` a line.

    The ranks must be 0 … n-1, each once, and every single byte must be a token (else some text
    has no encoding). Raises UserError with every bad line's number.
    """
    if not path.is_file():
        raise MissingFileError(
            f"{path.name} is missing in {path.parent}. The tokenizer is built from it: download it "
            "with the rest of the checkpoint."
        )
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the vocabulary. Fetch the file itself.")
    ranks: dict[bytes, int] = {}
    first_line: dict[int, int] = {}
    problems = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = _parse_rank(line)
        except ValueError as error:
            problems.append(f"{path.name}:{number}: {error}")
            continue
        if rank in first_line:
            problems.append(f"{path.name}:{number}: rank {rank} repeats line {first_line[rank]}")
        elif token in ranks:
            other = first_line[ranks[token]]
            problems.append(f"{path.name}:{number}: token {token!r} repeats line {other}")
        else:
            ranks[token] = rank
            first_line[rank] = number
    if not problems:
        problems = _gaps(path, ranks)
    if problems:
        raise UserError(
            listing(
                f"{path} is not a usable vocabulary:",
                problems,
                "Each line must be `<base64 of the token> <rank>`. Download the file again.",
            )
        )
    return ranks


def _parse_rank(line: bytes) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2:
        raise ValueError(f"{len(fields)} fields, 2 are required")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{fields[0][:40]!r} is not base64 ({error})") from error
    if not token:
        raise ValueError("the token is empty")
    if not fields[1].isdigit():
        raise ValueError(f"rank {fields[1][:40]!r} is not a whole number")
    return token, int(fields[1])


def _gaps(path: Path, ranks: dict[bytes, int]) -> list[str]:
    if not ranks:
        return [f"{path.name}: no token at all"]
    problems = []
    absent = sorted(set(range(len(ranks))) - set(ranks.values()))
    if absent:
        problems.append(
            f"{path.name}: {len(ranks)} ranks must be 0 … {len(ranks) - 1}; the first that is "
            f"missing is {absent[0]} ({len(absent)} in all)"
        )
    bytes_absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if bytes_absent:
        problems.append(
            f"{path.name}: {len(bytes_absent)} single bytes are no token, the first is "
            f"0x{bytes_absent[0]:02x}"
        )
    return problems


def control_tokens(tokenizer_config: dict[str, Any], ranks: int, source: str) -> dict[str, int]:
    """Name -> id of all `RESERVED_IDS` control tokens.

    `added_tokens_decoder` names some of the ids `ranks` … `ranks + 255`; the others are called
    `<|reserved_token_{id}|>`. `source` is the file named in errors.
    """
    added = tokenizer_config.get("added_tokens_decoder")
    if not isinstance(added, dict) or not added:
        raise UserError(
            f"{source}: added_tokens_decoder is missing or empty; it must map ids to control tokens."
        )
    limit = ranks + RESERVED_IDS
    names: dict[int, str] = {}
    problems = []
    for key, entry in added.items():
        where = f"added_tokens_decoder[{key!r}]"
        if not key.isdigit():
            problems.append(f"{where}: the key is not an id")
        elif not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            problems.append(f'{where}: {{"content": text}} is required')
        elif not entry["content"]:
            problems.append(f"{where}: content is empty")
        elif int(key) < ranks:
            problems.append(
                f"{where}: id {key} is already a token of {RANKS_FILE} (0 … {ranks - 1})"
            )
        elif int(key) >= limit:
            problems.append(f"{where}: id {key} is beyond the last reserved id, {limit - 1}")
        else:
            names[int(key)] = entry["content"]
    ids: dict[str, int] = {}
    for index in range(ranks, limit):
        name = names.get(index, f"<|reserved_token_{index}|>")
        if name in ids:
            problems.append(f"ids {ids[name]} and {index} are both called {name!r}")
        ids[name] = index
    if problems:
        raise UserError(listing(f"{source} does not fit {RANKS_FILE}:", problems))
    return ids


def model_settings(directory: Path) -> tuple[int, int]:
    """(vocab_size, end id) that the checkpoint's model is made for.

    Both from `config.json` (inside `text_config` where there is one). The end id is
    `eos_token_id`, else that of `generation_config.json`; the `eos_token` of
    tokenizer_config.json is not asked, for in this family it names another token than the one
    that ends a turn.
    """
    path = directory / "config.json"
    config = read_json(path)
    section = config.get("text_config", config)
    if not isinstance(section, dict):
        raise UserError(f"{path}: text_config must be an object.")
    vocab_size = section.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:
        raise UserError(f"{path}: vocab_size is {vocab_size!r}; a positive integer is required.")
    stated = section.get("eos_token_id", config.get("eos_token_id"))
    generation_path = directory / "generation_config.json"
    generated = None
    if generation_path.is_file():
        generated = read_json(generation_path).get("eos_token_id")
    end_id = generated if stated is None else stated
    if type(end_id) is not int or not 0 <= end_id < vocab_size:
        raise UserError(
            f"{path}: eos_token_id is {end_id!r}; one id below vocab_size {vocab_size} is required "
            "(here or in generation_config.json): the token that ends a turn."
        )
    allowed = generated if isinstance(generated, list) else [generated]
    if generated is not None and end_id not in allowed:
        raise UserError(
            f"{path} says eos_token_id {end_id}, generation_config.json says {generated}. "
            "They must agree: correct the one that is not the end of a turn."
        )
    return vocab_size, end_id
