"""What a compiler says about a step, beside the plan of it."""

from dataclasses import asdict, dataclass
from typing import Any

from kimi_jax.planning.hlo import Collective, summary


@dataclass(frozen=True)
class CompiledStep:
    """A compiled step, per device, bytes.

    Attributes:
        target: what it was compiled for.
        arguments: base, adapters, optimizer state and batch.
        outputs: state and metrics; `aliased` of them stand in the arguments' place.
        aliased: see outputs.
        temporaries: everything else, at the step's largest moment.
        seconds: of lowering and of compiling.
        exchanges: collectives of the program.
        implementation: which kernels were compiled, in words.
    """

    target: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    seconds: tuple[float, float]
    exchanges: tuple[Collective, ...]
    implementation: str = ""

    @property
    def total(self) -> int:
        """Bytes of one device while the step runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes; collectives added up by kind."""
        content = asdict(self)
        del content["exchanges"]
        return content | {"total": self.total, "collectives": summary(list(self.exchanges))}
