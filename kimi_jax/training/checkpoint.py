"""Checkpoints of a run: adapters, optimizer state and data position, saved asynchronously by Orbax.

A checkpoint is written beside its final name and renamed when it is whole, so a run that is killed
while saving goes on from the one before. The base is never saved. Every process adds what its devices
hold, so all of them save and restore together; a checkpoint belongs to no mesh.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding

from kimi_jax.errors import MissingFileError, UserError
from kimi_jax.training.run_dir import CHECKPOINTS
from kimi_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run directory. Close it, or use it as a context, to end pending saves."""

    def __init__(self, run_dir: Path, keep: int | None = None, read_only: bool = False) -> None:
        """Opens the checkpoints of `run_dir`.

        Args:
            run_dir: the run directory.
            keep: the newest so many are kept; None: all.
            read_only: nothing is made, saved or removed. The directory must hold checkpoints.

        Raises:
            MissingFileError: `read_only`, and nothing was ever saved.
        """
        if read_only and not (run_dir / CHECKPOINTS).is_dir():
            raise _none_saved(run_dir / CHECKPOINTS)
        # A reader must not tidy up: the run may be saving at this moment.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=not read_only, create=not read_only
        )
        self._directory = run_dir / CHECKPOINTS
        self._manager = ocp.CheckpointManager(self._directory.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """Updates made at the newest whole checkpoint, if there is one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Saves in the background; returns when the values are copied and may be donated.

        Raises:
            UserError: there is a checkpoint of this step or of a later one.
        """
        step = int(state.step)
        if self.latest is not None and self.latest >= step:
            raise UserError(
                f"{self._directory}: holds a checkpoint of step {self.latest}, and step {step} was to be "
                "saved: restore() goes on from there; or set run.dir to a new directory"
            )
        optimizer = {"opt_state": state.opt_state, "step": state.step}
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                adapters=ocp.args.StandardSave(state.adapters),
                optimizer=ocp.args.StandardSave(optimizer),
                data=ocp.args.JsonSave(data_state),
            ),
        )
        assert saved, f"step {step} was not saved"

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint: a state like `like`, and the data position.

        Args:
            like: structure, shapes and places, whatever devices the checkpoint was saved from.
        """
        optimizer = {"opt_state": like.opt_state, "step": like.step}
        restored = self._restore(
            adapters=_restore_like(like.adapters),
            optimizer=_restore_like(optimizer),
            data=ocp.args.JsonRestore(),
        )
        return TrainState(restored.adapters, **restored.optimizer), restored.data

    def restore_adapters(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        shardings: Mapping[str, Sharding] | None = None,
    ) -> dict[str, jax.Array]:
        """The adapters alone of the newest checkpoint, fp32, by path.

        Args:
            shapes: of each factor.
            shardings: where each goes, whatever devices it was saved from; None: the first device.
        """
        first = SingleDeviceSharding(jax.local_devices()[0])
        like = {
            path: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=first if shardings is None else shardings[path]
            )
            for path, shape in shapes.items()
        }
        return self._restore(adapters=_restore_like(like)).adapters

    def _restore(self, **items: Any) -> Any:
        if self.latest is None:
            raise _none_saved(self._directory)
        try:
            return self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # not the files' fault
        except Exception as error:  # of many kinds, from Orbax and TensorStore
            raise UserError(
                f"{self._directory / str(self.latest)}: this checkpoint cannot be read: {error}\n"
                "Its files are damaged or incomplete, or another version wrote them (run.json has the "
                "versions). To go on from the checkpoint before it, move the directory away."
            ) from error

    def wait(self) -> None:
        """Returns when every save is whole on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending saves and lets go of the directory."""
        self._manager.close()


def _none_saved(directory: Path) -> MissingFileError:
    return MissingFileError(
        f"{directory}: no checkpoint has been saved yet; train.checkpoint_every says when"
    )


def _restore_like(tree: Any) -> ocp.args.StandardRestore:
    return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
