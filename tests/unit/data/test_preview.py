import numpy as np

from kimi_jax.data.chat import Example
from kimi_jax.data.preview import preview


def test_weights_are_visible_without_colour(tokenizer):
    control = tokenizer.control
    text = [*tokenizer.encode("a\nb"), control["<|im_end|>"]]
    cut = tokenizer.encode("\u0416")  # two bytes, two tokens
    assert len(cut) == 2
    tokens = [control["<|im_user|>"], *text, *cut]
    weights = [0, 0, 0, 1, 1, 0.5, 1]
    example = Example(np.asarray(tokens, np.int32), np.asarray(weights, np.float32))
    shown = preview(example, tokenizer)
    assert shown.plain == (
        "<|im_user|>a↵\n⟦b⟧⟦<|im_end|>⟧⟦\\xd0⟧×0.5⟦\\x96⟧\n7 tokens, 4 trained (in ⟦ ⟧)"
    )
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert "bold" in styles["<|im_user|>"]
    assert "green" in styles["⟦b⟧"]
    assert "dim" in styles["a"]
