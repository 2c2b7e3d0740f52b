"""Which part of the step an operation belongs to, and whether it computes, recomputes or goes back.

First by `jax.named_scope`s of these names, innermost first; then by the names of kernels that are jitted
by themselves; then by the model's functions that the compiler's stack frames name.
"""

import re

from tools.step_bench.program import Frame, Origin

ATTENTION, PROJECTIONS = "attention kernels", "attention's projections"
ROUTER, MOVEMENT = "router", "movement"
EXPERTS, EXPERT_LORA, LORA = "experts", "expert LoRA", "other LoRA"
DENSE, HEAD = "dense and shared", "cross-entropy, head"
OPTIMIZER, EXCHANGES = "optimizer", "exchanges' stand-ins"
REST = "rest: "
REST_ATTENTION, REST_EXPERTS = REST + "attention", REST + "experts"
REST_DENSE, REST_NORMS = REST + "dense and shared", REST + "norms, residual"
REST_STACKS, REST_EMBEDDING = REST + "stacks, sums", REST + "embedding"
UNKNOWN, IDLE = "not attributed", "idle"
EXPOSED, HOST = "exchanges, nothing beside", "copies to and from the host, nothing beside"
PARTS = (
    ATTENTION, PROJECTIONS, ROUTER, MOVEMENT, EXPERTS, EXPERT_LORA, LORA, DENSE, HEAD, OPTIMIZER,
    EXCHANGES, REST_ATTENTION, REST_EXPERTS, REST_DENSE, REST_NORMS, REST_STACKS, REST_EMBEDDING,
    UNKNOWN, EXPOSED, HOST, IDLE,
)  # fmt: skip
FORWARD, RECOMPUTED, BACKWARD, ONCE = "forward", "recomputed", "backward", ""
PHASES = (FORWARD, RECOMPUTED, BACKWARD, ONCE)

# Places whose matrix products and other kernels are told apart.
_PRODUCTS = {"attention": PROJECTIONS, "swiglu": DENSE, "experts": EXPERTS}
_OTHERS = {"attention": REST_ATTENTION, "swiglu": REST_DENSE, "experts": REST_EXPERTS}
SCOPES = {
    "attention_kernel": ATTENTION,
    "attention": "attention",
    "router": ROUTER,
    "movement": MOVEMENT,
    "experts": "experts",
    "adapter": "adapter",
    "swiglu": "swiglu",
    "cross_entropy": HEAD,
    "optimizer": OPTIMIZER,
    "exchange": EXCHANGES,
    "norm": REST_NORMS,
    "residual": REST_NORMS,
    "embedding": REST_EMBEDDING,
}
_KERNELS = (
    (re.compile(r"attention|fmha|sdpa"), ATTENTION),
    (re.compile(r"factor|grouped_project|^project$"), EXPERT_LORA),
    (re.compile(r"grouped_|^multiply"), "experts"),
    (re.compile(r"scatter_rows|sum_rows|gather_rows|dispatch|combine"), MOVEMENT),
)
# Innermost frame first, each tried against these in order: a file's or a function's name.
_FUNCTIONS = (
    (r"Ranks\.(gather|scatter_sum|return_rows|sum)|whole_weight", EXCHANGES),
    (r"^(Layer\.|Norm\.)|Transformer\.hidden$", REST_NORMS),
    (r"^rotate", REST_ATTENTION),
    (r"^Experts\.", "experts"),
    (r"^Router\.|^MixtureOfExperts\.", ROUTER),
    (r"^SwiGlu\.", "swiglu"),
    (r"^LatentAttention\.", "attention"),
    (r"^(cross_entropy|linear_cross_entropy|loss_terms|next_token_weights)", HEAD),
    (r"^make_update|^make_gradients\.<locals>\.gradients$", OPTIMIZER),
    (r"^(look_up|Transformer\._embed)", REST_EMBEDDING),
    (r"^scan_stack|^make_gradients", REST_STACKS),
)
_FILES = (
    ("mla_attention", ATTENTION),
    ("linear_cross_entropy", HEAD),
    ("token_movement", MOVEMENT),
    ("grouped_matmul", "experts"),
    # What is written by hand there hides the functions below it: kernels that move rows were named above.
    ("parallel/experts.py", "experts"),
    ("optax", OPTIMIZER),
)
_COMPILED_FUNCTIONS = tuple((re.compile(pattern), part) for pattern, part in _FUNCTIONS)
_WRAPPER = re.compile(r"^(?:(?:transpose|jvp|vmap|jit|pjit|remat|checkpoint)\()*([^()]*)\)*$")
# Kernels written by hand, and cuDNN's attention.
_OWN = re.compile(r"mosaic|fmha|sdpa")
# Within a GPU: a result put into its stack, or taken out of it, beside what is computed.
_COPY = re.compile(r"memcpy_?d(2|to)d", re.IGNORECASE)
_GEMM = re.compile(r"gemm|nvjet|xmma|cutlass|cublas|(?:^|_)dot(?:_|$)", re.IGNORECASE)


def phase(operation: str) -> str:
    """Of an operation by its path: what is differentiated stands under `jvp`, the rest is done once."""
    before, _, after = operation.partition("transpose(jvp")
    if not after:
        return FORWARD if "jvp(" in before else ONCE
    if "rematted_computation" in after:
        return RECOMPUTED
    if "transpose(" in after:
        return BACKWARD
    # A derivative that is written by hand computes its primal once more.
    return RECOMPUTED if "jvp(" in after else BACKWARD


def part(origin: Origin, kernel: str) -> str:
    """The part of the step that a kernel belongs to.

    Args:
        origin: of the instruction that launched it, or nothing if that is not known.
        kernel: its name.
    """
    product = bool(_GEMM.search(kernel)) or "cublas" in origin.target
    ways = (_by_scope(origin.operation), _by_kernel(origin, kernel), _by_frames(origin.frames))
    if _OWN.search(kernel) or _OWN.search(origin.target):
        ways = (
            ways[1],
            ways[0],
            ways[2],
        )  # a kernel written by hand says more than where it stands
    place = next((way for way in ways if way is not None), None)
    if place is None and _COPY.search(kernel):
        return REST_STACKS
    if place is None and phase(origin.operation) == ONCE and origin.operation.startswith("jit("):
        place = OPTIMIZER if "while" not in origin.operation else REST_STACKS
    if place is None and "dynamic_" in origin.operation:
        place = REST_STACKS
    if place is None:
        return UNKNOWN
    # Products with int4 weights are kernels of their own, whatever XLA calls its own.
    if place == "experts" and (product or _OWN.search(kernel)):
        return EXPERTS
    return (_PRODUCTS if product else _OTHERS).get(place, place)


def _by_scope(operation: str) -> str | None:
    adapter = False
    for piece in reversed(operation.split("/")):
        match = _WRAPPER.match(piece)
        place = SCOPES.get(match[1]) if match else None
        if place == "adapter":
            adapter = True
        elif place is not None:
            if adapter:
                return EXPERT_LORA if place == "experts" else LORA
            return place
    return LORA if adapter else None


def _by_kernel(origin: Origin, kernel: str) -> str | None:
    pieces = [_WRAPPER.match(piece) for piece in origin.operation.split("/")]
    named = [match[1] for match in pieces if match]
    written = [kernel] if _OWN.search(kernel) else []
    for name in (*written, *reversed(named)):
        for pattern, place in _KERNELS:
            if pattern.search(name):
                return place
    return None


def _by_frames(frames: tuple[Frame, ...]) -> str | None:
    for file, function in frames:
        for pattern, place in _COMPILED_FUNCTIONS:
            if pattern.search(function):
                return place
        for piece, place in _FILES:
            if piece in file.replace("\\", "/"):
                return place
    return None
