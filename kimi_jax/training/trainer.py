"""The primitives of fine-tuning: forward_backward, optim_step, sample, save, export.

`Trainer` owns the model's two trees of values and changes the adapters; what is called when is the
caller's: a loop of one's own, or `kimi_jax.training.loop`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kimi_jax.config import RunConfig
from kimi_jax.config_file import load_config
from kimi_jax.data.chat import Chat, Reply
from kimi_jax.errors import UserError
from kimi_jax.lora import init_adapters, plan_adapters
from kimi_jax.model.decode import Sampling
from kimi_jax.model.transformer import ModelDef, ModelSettings, Transformer
from kimi_jax.training import run_dir
from kimi_jax.training.answers import Prompt, answer
from kimi_jax.training.batch import check_batch, check_length
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.lock import hold
from kimi_jax.training.loss import loss_terms
from kimi_jax.training.optimizer import learning_rates, make_optimizer
from kimi_jax.training.step import (
    Gradients,
    StepMetrics,
    init_state,
    make_gradients,
    make_train_step,
    make_update,
)
from kimi_jax.weights.checkpoint import open_checkpoint, resolve_checkpoint
from kimi_jax.weights.export import ExportFormat, export_adapter
from kimi_jax.weights.export_peft import peft_parameters
from kimi_jax.weights.load import load_base
from kimi_jax.weights.reader import fingerprint

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Trainer:
    """A base model, its adapters, and the state of their optimizer."""

    def __init__(self, config: str | Path | Mapping[str, Any] | RunConfig) -> None:
        """Reads the configuration, matches the checkpoint, and makes fresh adapters.

        Args:
            config: a YAML file's path, a nested dictionary, or a `RunConfig`.

        Raises:
            UserError: anything wrong in configuration or checkpoint, before a weight is read.
        """
        self.config = load_config(config)
        model = self.config.model
        self.checkpoint = open_checkpoint(resolve_checkpoint(model.checkpoint))
        self.plan = plan_adapters(self.config.lora, self.checkpoint.table)
        check_length(self.config.train.sequence_length, self.checkpoint.config)
        self.model_def = ModelDef(
            self.checkpoint.config,
            self.plan,
            ModelSettings(DTYPES[model.dtype], model.latent_norm_eps, self.config.train.recompute),
        )
        self._optimizer = make_optimizer(self.config.train)
        self.state = init_state(init_adapters(self.plan, self.config.run.seed), self._optimizer)
        self._accumulated: Gradients | None = None
        self._saved_step: int | None = None

    @cached_property
    def base(self) -> dict[str, Any]:
        """Weights of the base by path, imported when they are first used (see `import_base`)."""
        return load_base(self.checkpoint)

    def import_base(self, progress: Callable[[int, int], None]) -> None:
        """Imports the base; `progress` is called with bytes imported so far and bytes in all."""
        self.base = load_base(self.checkpoint, progress)

    @property
    def step(self) -> int:
        """Updates made so far."""
        return int(self.state.step)

    @property
    def model(self) -> Transformer:
        """The model with the adapters as they are now."""
        return self.model_def.bind(self.base, self.state.adapters)

    @cached_property
    def chat(self) -> Chat:
        """Tokenizer and template of the checkpoint."""
        return Chat.from_checkpoint(self.checkpoint.directory)

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Adds the gradients of one micro-batch to those since the last `optim_step`.

        Args:
            batch: `tokens` int32 [B, T], `loss_weights` float32 [B, T] (the weight of predicting the
                token at that place), and if rows hold several documents `positions` and `segment_ids`,
                int32 [B, T].

        Returns:
            `loss_sum`, `weight_sum` and their quotient `loss`, in nats a unit of weight.
        """
        arrays = self.check_batch(batch)
        gradients = self._gradients(self.state.adapters, self.base, arrays)
        if self._accumulated is None:
            self._accumulated = gradients
        else:
            self._accumulated = self._add(self._accumulated, gradients)
        return _loss(gradients.terms.loss_sum, gradients.terms.weight_sum)

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients of the mean loss over everything since the last `optim_step`, by PEFT's names.

        Routed experts have one array each. A factor that experts share is one parameter and has one
        gradient, under the name without the expert's number.
        """
        gradients = self._since_last_step()
        means = {path: g / gradients.terms.weight_sum for path, g in gradients.sums.items()}
        return peft_parameters(self.plan, self.checkpoint.config, means, repeat_shared=False)

    def optim_step(self) -> dict[str, float | int]:
        """One update from the gradients since the last: divided by their weight, clipped, AdamW.

        Returns:
            `step` (updates made), `loss`, `grad_norm` (before clipping), `learning_rate`.

        Raises:
            UserError: nothing was accumulated, or the loss or gradient is not finite (nothing changes).
        """
        gradients = self._since_last_step()
        rate = self.learning_rate()
        self.state, metrics = self._update(self.state, gradients)
        self._accumulated = None
        if not bool(metrics.finite):
            raise UserError(
                f"loss {float(metrics.loss)} or gradient norm {float(metrics.grad_norm)} is not finite; "
                "the adapters are as they were before"
            )
        return {
            "step": self.step,
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": rate,
        }

    def train_step(self, batch: Mapping[str, np.ndarray]) -> StepMetrics:
        """A whole step in one program: batch arrays are [micro-batches, B, T]. See `forward_backward`."""
        self.state, metrics = self._train_step(self.state, self.base, dict(batch))
        return metrics

    def evaluate(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Loss over batches without changing anything; the same keys as `forward_backward`."""
        loss_sum = weight_sum = 0.0
        for batch in batches:
            terms = self._loss(self.state.adapters, self.base, self.check_batch(batch))
            loss_sum += float(terms.loss_sum)
            weight_sum += float(terms.weight_sum)
        return _loss(loss_sum, weight_sum)

    def sample(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers of the model with its present adapters, without their reasoning (see `replies`).

        Args:
            prompts: each a user's text, a list of chat messages, or the tokens of a rendered prompt.
            max_new_tokens: at most so many for each.
            temperature: 0 takes the likeliest token.
            top_p: part of the distribution that is drawn from.
            seed: of the draws.
        """
        sampling = Sampling(temperature, top_p, seed)
        return [reply.content for reply in self.replies(prompts, max_new_tokens, sampling)]

    def replies(
        self, prompts: Sequence[Prompt], max_new_tokens: int, sampling: Sampling
    ) -> list[Reply]:
        """The same, each with its reasoning and its content."""
        return answer(
            self.model_def,
            self.base,
            self.state.adapters,
            self.chat,
            prompts,
            max_new_tokens,
            sampling,
        )

    def save(self) -> Path:
        """Saves adapters and optimizer into the run directory, which `Trainer.restore` reads.

        Raises:
            UserError: the directory holds something else, a run of another configuration or base, a
                checkpoint of this step or a later one (of other adapters), or is in use.
        """
        directory = Path(self.config.run.dir)
        run_dir.prepare(directory, self.config, self.base_fingerprint)
        with hold(directory), Checkpoints(directory, self.config.train.keep_checkpoints) as kept:
            if not self._saved_step == self.step == kept.latest:
                kept.save(self.state, {})
        self._saved_step = self.step
        return directory

    def restore(self, checkpoints: Checkpoints | None = None) -> dict[str, Any]:
        """Goes on from the newest checkpoint of the run directory; returns the data position in it.

        Raises:
            UserError: no run directory, one of another configuration or base, or no checkpoint in it.
        """
        if checkpoints is None:
            directory = Path(self.config.run.dir)
            run_dir.check(directory, self.config, self.base_fingerprint)
            with Checkpoints(directory, read_only=True) as opened:
                return self.restore(opened)
        self._accumulated = None
        self.state, data_state = checkpoints.restore(self.state)
        self._saved_step = self.step
        return data_state

    def export(self, out_dir: str | Path, format: ExportFormat = "peft") -> Path:
        """Writes the adapters, or the base merged with them; see `python -m kimi_jax.export`."""
        return export_adapter(
            Path(out_dir), self.checkpoint, self.plan, self.state.adapters, format
        )

    @cached_property
    def base_fingerprint(self) -> str:
        """Which base this is; see `kimi_jax.weights.reader.fingerprint`."""
        return fingerprint(self.checkpoint.directory)

    def learning_rate(self) -> float:
        """Of the next update."""
        return float(np.asarray(learning_rates(self.config.train)(self.step)))

    def check_batch(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The batch's arrays with places filled in; see `kimi_jax.training.batch.check_batch`."""
        return check_batch(batch, self.checkpoint.config)

    @cached_property
    def _gradients(self) -> Any:
        return jax.jit(make_gradients(self.model_def, self.config.train.loss_chunk))

    @cached_property
    def _update(self) -> Any:
        return jax.jit(make_update(self._optimizer), donate_argnums=0)

    @cached_property
    def _train_step(self) -> Any:
        return make_train_step(self.model_def, self._optimizer, self.config.train.loss_chunk)

    @cached_property
    def _loss(self) -> Any:
        chunk = self.config.train.loss_chunk

        def loss(adapters: Any, base: Any, batch: Any) -> Any:
            return loss_terms(self.model_def.bind(base, adapters), batch, chunk)

        return jax.jit(loss)

    @cached_property
    def _add(self) -> Any:
        return jax.jit(lambda total, one: jax.tree.map(jnp.add, total, one), donate_argnums=0)

    def _since_last_step(self) -> Gradients:
        if self._accumulated is None:
            raise UserError("no gradients since the last optim_step: call forward_backward first")
        if float(self._accumulated.terms.weight_sum) == 0:
            raise UserError(
                "every loss weight since the last optim_step is 0: nothing to learn from"
            )
        return self._accumulated


def _loss(loss_sum: Array | float, weight_sum: Array | float) -> dict[str, float]:
    total, weight = float(loss_sum), float(weight_sum)
    return {
        "loss_sum": total,
        "weight_sum": weight,
        "loss": total / weight if weight else float("nan"),
    }
