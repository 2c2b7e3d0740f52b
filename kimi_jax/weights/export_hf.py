"""The base with its adapters merged in, as an HF checkpoint of the same shards.

`merged-int4` keeps every name, shape and dtype, and with them headers, index and config.json, byte
for byte; `merged-bf16` replaces each packed expert by a bf16 `.weight`. A tensor without an adapter,
or with one that is zero, passes through as bytes. Shards are streamed: no more than a few tensors
are in memory at a time.
"""

import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import isfinite
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Array
from rich.console import Console

from kimi_jax.errors import UserError
from kimi_jax.lora import AdapterPlan
from kimi_jax.weights.checkpoint import Checkpoint
from kimi_jax.weights.export_peft import check_finite
from kimi_jax.weights.hf_files import other_files, write_unquantised_json
from kimi_jax.weights.merge import Survival
from kimi_jax.weights.merge_report import MergeReport, ProjectionReport, print_report
from kimi_jax.weights.merge_shards import Done, Job, MergeSource, Shard, plan_shards
from kimi_jax.weights.output import check_output, new_directory, raw_bytes

MergeFormat = Literal["merged-int4", "merged-bf16"]
WORKERS = 64  # at most; as many results may wait to be written


def write_merged(
    out_dir: Path,
    checkpoint: Checkpoint,
    plan: AdapterPlan,
    adapters: Mapping[str, Array | np.ndarray],
    format: MergeFormat,
    console: Console | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Writes a whole checkpoint: W + alpha / rank · B · A in fp32, rounded to the format of each weight.

    Prints how much of the intended change survived rounding, and a warning where it was little.

    Args:
        out_dir: new or empty, outside the checkpoint's directory; it appears whole or not at all.
        checkpoint: the base, matched with its config.
        plan: what is adapted.
        adapters: stacked factors by the paths of `adapter_shapes(plan)`, finite.
        format: `merged-int4` for a base with packed experts: touched ones are quantised again by
            Moonshot's rule. `merged-bf16`: no quantisation is left.
        console: where the report goes; standard output if not given.
        progress: called with bytes written so far and bytes in all.

    Raises:
        UserError: an output directory in use or inside the checkpoint's, too little room, a format that
            the base cannot have, an adapter that is not finite or of which rounding left nothing.
    """
    _check(out_dir, checkpoint, adapters, format)
    unpack = format == "merged-bf16" and checkpoint.config.packed_experts
    source = MergeSource(checkpoint, plan, _on_host(adapters), unpack)
    shards = plan_shards(source)
    copied, left_out = other_files(checkpoint)
    sizes = {file: file.stat().st_size for file in copied}
    total = sum(shard.size for shard in shards) + sum(sizes.values())
    found: dict[str, Survival] = {}
    changed = Counter[str]()
    with new_directory(out_dir, total) as folder:
        for file in copied:
            target = folder / file.relative_to(checkpoint.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        if unpack:
            write_unquantised_json(checkpoint, shards, folder)
        written = sum(sizes.values())
        with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
            for done in _write(shards, folder, pool):
                written += sum(array.nbytes for _, array in done.writes)
                if progress is not None:
                    progress(min(written, total), total)
                if done.survival is None:
                    continue
                _check_survival(done)
                changed[done.path] += 1
                found[done.path] = found.get(done.path, Survival()).plus(done.survival)
        report = MergeReport(
            check_output(out_dir), format, total, _projections(plan, found, changed), left_out
        )
        if report.is_lost:
            raise UserError(
                f"{out_dir}: rounding to {format} leaves nothing of this adapter's change; the export "
                "would be the base. Nothing was written. Export the unmerged adapter (--format peft)."
            )
    print_report(report, console)
    return report


def _check(
    out_dir: Path,
    checkpoint: Checkpoint,
    adapters: Mapping[str, Array | np.ndarray],
    format: MergeFormat,
) -> None:
    """Everything that can be refused before work begins."""
    out = check_output(out_dir)
    if out.is_relative_to(checkpoint.directory.resolve()):
        raise UserError(
            f"{out_dir}: lies inside the base's directory {checkpoint.directory}; name one outside it"
        )
    if format == "merged-int4" and not checkpoint.config.packed_experts:
        raise UserError(
            f"merged-int4: the experts of {checkpoint.directory} are not packed int4; "
            "use merged-bf16, which keeps them as they are stored"
        )
    check_finite(adapters)


def _check_survival(done: Done) -> None:
    assert done.survival is not None
    if not (isfinite(done.survival.intended) and isfinite(done.survival.realised)):
        raise UserError(
            f"{done.path}: the adapter's change is too large for the weight's format (infinity after "
            "rounding). Did the run diverge? Export an earlier checkpoint of it."
        )


def _on_host(adapters: Mapping[str, Array | np.ndarray]) -> dict[str, np.ndarray]:
    return {path: np.asarray(value, np.float32) for path, value in adapters.items()}


def _write(shards: Iterable[Shard], folder: Path, pool: ThreadPoolExecutor) -> Iterator[Done]:
    """Writes the shards one after the other; tensors are computed a few ahead, in threads."""
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.head)
            for done in _in_order(pool, shard.jobs()):
                for offset, array in done.writes:
                    file.seek(offset)
                    file.write(raw_bytes(array).data)
                yield done
            file.flush()
            os.fsync(file.fileno())


def _in_order(pool: ThreadPoolExecutor, jobs: Iterable[Job]) -> Iterator[Done]:
    waiting: deque[Future[Done]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _projections(
    plan: AdapterPlan, found: Mapping[str, Survival], changed: Mapping[str, int]
) -> tuple[ProjectionReport, ...]:
    rows = []
    for path, adapter in plan.items():
        weight = adapter.weight
        experts = weight.shape[0] if weight.role == "routed" else 1
        rows.append(
            ProjectionReport(
                path, changed.get(path, 0), weight.layers * experts, found.get(path, Survival())
            )
        )
    return tuple(rows)
