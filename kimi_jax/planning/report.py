"""Everything that `python -m kimi_jax.plan` says, as tables or as JSON."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kimi_jax.config import RunConfig
from kimi_jax.planning.compiled import CompiledStep
from kimi_jax.planning.memory import MemoryPlan, plan, read_architecture
from kimi_jax.planning.options import Option, options
from kimi_jax.planning.picture import save
from kimi_jax.planning.view import print_compiled, print_plan


@dataclass(frozen=True)
class Report:
    """A plan, the same run on other devices, and what the compiler says, if it was asked."""

    plan: MemoryPlan
    elsewhere: tuple[Option, ...]
    compiled: CompiledStep | None = None

    def beside(self, compiled: CompiledStep) -> "Report":
        """With the compiler's report."""
        return replace(self, compiled=compiled)

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes; sizes are bytes."""
        content = self.plan.to_json()
        content["elsewhere"] = [option.to_json() for option in self.elsewhere]
        if self.compiled is not None:
            content["compiled"] = self.compiled.to_json()
        return content

    def save_picture(self, path: Path) -> None:
        """Writes the bars of the memory."""
        save(self.plan, path)

    def print(self, console: Console, as_json: bool = False) -> None:
        """To a console, or one JSON object to standard output."""
        if as_json:
            print(json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1))
            return
        print_plan(self.plan, self.elsewhere, console)
        if self.compiled is not None:
            print_compiled(self.compiled, self.plan, console)


def make_report(config: RunConfig, device: str) -> Report:
    """The plan of a run on a kind of device, and on others.

    Raises:
        UserError: see `kimi_jax.planning.plan`.
    """
    return Report(plan(config, device), options(config, read_architecture(config)))
