"""An example as text, with the loss weight of each token visible."""

from rich.text import Text

from kimi_jax.data.chat import Example
from kimi_jax.data.tokenizer import Tokenizer

_LEFT, _RIGHT = "⟦", "⟧"  # rare in text, so that they do not pass for part of it


def preview(example: Example, tokenizer: Tokenizer) -> Text:
    """Every token of `example` in order, and a line that counts them.

    Each token that is trained stands in ⟦ ⟧ (followed by ×weight if that is not 1) and in green;
    the others are dim, alternately underlined to show where one ends. Control tokens are bold
    and shown by name, line ends as ↵, bytes that are no whole character as \\xNN.
    """
    text = Text()
    for index, (token, weight) in enumerate(
        zip(example.tokens.tolist(), example.loss_weights.tolist(), strict=True)
    ):
        shown = _shown(tokenizer.token_bytes(token))
        style = "bold " if tokenizer.is_control(token) else ""
        if weight:
            factor = "" if weight == 1 else f"×{weight:g}"
            text.append(f"{_LEFT}{shown}{_RIGHT}{factor}", style=f"{style}green")
        else:
            text.append(shown, style=f"{style}dim{' underline' if index % 2 else ''}")
    text.append(f"\n{len(example)} tokens, {example.trained} trained (in {_LEFT} {_RIGHT})")
    return text


def _shown(token: bytes) -> str:
    text = token.decode("utf-8", errors="backslashreplace")
    return text.replace("\r", "␍").replace("\n", "↵\n")
