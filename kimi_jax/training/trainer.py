"""The primitives of fine-tuning: forward_backward, optim_step, sample, save, export.

`Trainer` owns the model's two trees of values and changes the adapters; what is called when is the
caller's: a loop of one's own, or `kimi_jax.training.loop`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Array

from kimi_jax.config import RunConfig
from kimi_jax.config_file import load_config
from kimi_jax.data.chat import Chat, Reply
from kimi_jax.errors import UserError
from kimi_jax.lora import init_adapters, plan_adapters
from kimi_jax.model.decode import Sampling
from kimi_jax.model.transformer import Transformer
from kimi_jax.parallel import processes
from kimi_jax.parallel.ranks import REPLICATED
from kimi_jax.training import run_dir
from kimi_jax.training.answers import Prompt, answer
from kimi_jax.training.batch import check_batch, check_length, check_rows
from kimi_jax.training.checkpoint import Checkpoints
from kimi_jax.training.data import RunData, read_data
from kimi_jax.training.exporting import export_on_first
from kimi_jax.training.lock import hold
from kimi_jax.training.loss import mean_loss
from kimi_jax.training.optimizer import learning_rates
from kimi_jax.training.own_rate import check_rate
from kimi_jax.training.placing import place
from kimi_jax.training.programs import Programs
from kimi_jax.training.step import Gradients, StepMetrics, init_state
from kimi_jax.training.structure import model_of
from kimi_jax.weights.checkpoint import open_checkpoint, resolve_checkpoint
from kimi_jax.weights.export import AdapterFormat, ExportFormat, MergeFormat
from kimi_jax.weights.export_peft import peft_parameters
from kimi_jax.weights.load import load_base
from kimi_jax.weights.merge_report import MergeReport
from kimi_jax.weights.reader import fingerprint


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
        self.checkpoint = open_checkpoint(resolve_checkpoint(self.config.model.checkpoint))
        self.plan = plan_adapters(self.config.lora, self.checkpoint.table)
        check_length(self.config.train.sequence_length, self.checkpoint.config)
        self.ranks = place(self.config, self.checkpoint)
        self.model_def = model_of(self.config, self.checkpoint.config, self.ranks, self.plan)
        self._programs = Programs(self.model_def, self.config.train)
        self.reset()

    def reset(self) -> None:
        """Fresh adapters and a fresh optimizer, as at the beginning; what was compiled stays."""
        specs = self.model_def.adapter_specs
        adapters = init_adapters(
            self.plan, self.config.run.seed, lambda path, v: self.ranks.put(v, specs[path])
        )
        self.state = init_state(adapters, self._programs.optimizer, self.ranks)
        self._accumulated: Gradients | None = None
        self._saved_step: int | None = None

    @cached_property
    def base(self) -> dict[str, Any]:
        """Weights of the base by path, imported when they are first used (see `import_base`)."""
        return load_base(self.checkpoint, ranks=self.ranks)

    def import_base(self, progress: Callable[[int, int], None]) -> None:
        """Imports the base; `progress` is called with bytes imported so far and bytes in all."""
        self.base = load_base(self.checkpoint, progress, self.ranks)

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

    @cached_property
    def data(self) -> RunData:
        """The rows of `data.train` and `data.eval`, and batches of them; what was found is printed."""
        return read_data(self.config, self.chat)

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Adds the gradients of one micro-batch to those since the last `optim_step`.

        Args:
            batch: `tokens` int32 [B, T], `loss_weights` float32 [B, T] (the weight of predicting the
                token at that place), and if rows hold several documents `positions` and `segment_ids`,
                int32 [B, T].

        Returns:
            `loss_sum`, `weight_sum` and their quotient `loss`, in nats a unit of weight.
        """
        gradients = self._programs.gradients(self.state.adapters, self.base, self._put(batch))
        if self._accumulated is None:
            self._accumulated = gradients
        else:
            self._accumulated = self._programs.add(self._accumulated, gradients)
        return mean_loss(gradients.terms.loss_sum, gradients.terms.weight_sum)

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients of the mean loss over everything since the last `optim_step`, by PEFT's names.

        Routed experts have one array each. A factor that experts share is one parameter and has one
        gradient, under the name without the expert's number.
        """
        gradients = self._since_last_step()
        weight = float(gradients.terms.weight_sum)
        means = {path: processes.to_host(g) / weight for path, g in gradients.sums.items()}
        return peft_parameters(self.plan, self.checkpoint.config, means, repeat_shared=False)

    def optim_step(self, learning_rate: float | None = None) -> dict[str, float | int]:
        """One update from the gradients since the last: divided by their weight, clipped, AdamW.

        Args:
            learning_rate: of this update, for a schedule of one's own; the configuration's if not given.

        Returns:
            `step` (updates made), `loss`, `grad_norm` (before clipping), `learning_rate`.

        Raises:
            UserError: nothing was accumulated, or the loss or gradient is not finite (nothing changes).
        """
        gradients = self._since_last_step()
        if learning_rate is None:
            rate = self.learning_rate()
            self.state, metrics = self._programs.update(self.state, gradients)
        else:
            rate = check_rate(learning_rate)
            self.state, metrics = self._programs.update_at(self.state, gradients, np.float32(rate))
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

    def train_step(
        self, batch: Mapping[str, np.ndarray], after: StepMetrics | None = None
    ) -> StepMetrics:
        """A whole step in one program: batch arrays are [micro-batches, B, T]. See `forward_backward`.

        It may still be running when this returns. If `after`, of the step before, turns out not to be
        finite, this step is not either, and changes nothing.
        """
        placed = self.ranks.put_batch(batch)
        # An array also where nothing is to be awaited: one program for both.
        sound = self.ranks.put(np.bool_(True), REPLICATED) if after is None else after.finite
        self.state, metrics = self._programs.train_step(self.state, self.base, placed, sound)
        return metrics

    def evaluate(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Loss over batches without changing anything; the same keys as `forward_backward`."""
        loss_sum = weight_sum = 0.0
        for batch in batches:
            terms = self._programs.loss(self.state.adapters, self.base, self._put(batch))
            loss_sum += float(terms.loss_sum)
            weight_sum += float(terms.weight_sum)
        return mean_loss(loss_sum, weight_sum)

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
        fingerprint = self.base_fingerprint
        processes.on_first(lambda: run_dir.prepare(directory, self.config, fingerprint))
        with ExitStack() as stack:
            processes.on_first(lambda: stack.enter_context(hold(directory)))
            keep = self.config.train.keep_checkpoints
            kept = stack.enter_context(Checkpoints(directory, keep))
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

    @overload
    def export(self, out_dir: str | Path, format: AdapterFormat = "peft") -> Path: ...

    @overload
    def export(self, out_dir: str | Path, format: MergeFormat) -> MergeReport: ...

    def export(self, out_dir: str | Path, format: ExportFormat = "peft") -> Path | MergeReport:
        """Writes the adapters, or the base merged with them; see `python -m kimi_jax.export`.

        Returns the directory; of a merged base, a report with `directory`, and what of the adapters
        survived rounding: for each of `projections` its `survival`.
        """
        return export_on_first(out_dir, self.checkpoint, self.plan, self.state.adapters, format)

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

    def _put(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """A caller's micro-batch on the devices, [1, B, T]."""
        arrays = self.check_batch(batch)
        check_rows(arrays["tokens"].shape[0], self.config.mesh)
        return self.ranks.put_batch({key: value[None] for key, value in arrays.items()})

    def _since_last_step(self) -> Gradients:
        if self._accumulated is None:
            raise UserError("no gradients since the last optim_step: call forward_backward first")
        if float(self._accumulated.terms.weight_sum) == 0:
            raise UserError(
                "every loss weight since the last optim_step is 0: nothing to learn from"
            )
        return self._accumulated
