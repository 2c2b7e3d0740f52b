"""An `Inspection` as tables for people."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from kimi_jax.model.config import ModelConfig
from kimi_jax.weights.inspection import Files, Inspection, Share, TokenizerFacts
from kimi_jax.weights.nibbles import NibbleReport

BAR_WIDTH = 40


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Prints all sections, the verdict about packed experts last among the weights'."""
    headline = f"{inspection.directory}: every tensor is as config.json implies"
    console.print(headline, markup=False, soft_wrap=True)
    console.print(_architecture(inspection.config))
    console.print(_contents(inspection))
    console.print(_parameters(inspection.roles, inspection.total))
    if inspection.nibbles is None:
        console.print("Routed experts are not packed: there are no nibbles to look at.")
    else:
        console.print(_histogram(inspection.nibbles))
        console.print(_nibble_summary(inspection.nibbles))
        style = "green" if inspection.nibbles.packing == "offset_binary" else "bold red"
        console.print(f"Packed experts: {inspection.nibbles.verdict}.", style=style, soft_wrap=True)
    if inspection.tokenizer is None:
        console.print("No tiktoken.model here: nothing to say about the tokenizer.")
    else:
        console.print(_tokenizer(inspection.tokenizer))


def _architecture(config: ModelConfig) -> Table:
    yarn = config.yarn
    rows = {
        "layers": f"{config.num_hidden_layers}, the first {config.first_k_dense_replace} dense",
        "hidden_size, heads": f"{config.hidden_size}, {config.num_attention_heads}",
        "routed experts": f"{config.n_routed_experts}, top-k {config.num_experts_per_tok}",
        "shared experts": str(config.n_shared_experts),
        "routed_scaling_factor": f"{config.routed_scaling_factor:g}",
        "norm_topk_prob": str(config.norm_topk_prob).lower(),
        "rms_norm_eps": f"{config.rms_norm_eps:g}",
        "rope_theta": f"{config.rope_theta:g}",
        "YaRN": "none"
        if yarn is None
        else f"factor {yarn.factor:g}, beta_fast {yarn.beta_fast:g}, beta_slow {yarn.beta_slow:g}, "
        f"original context {yarn.original_max_position_embeddings}",
        "softmax scale": f"{config.softmax_scale:.7g}",
        "max_position_embeddings": str(config.max_position_embeddings),
        "q_lora_rank": "null (plain q_proj)"
        if config.q_lora_rank is None
        else str(config.q_lora_rank),
        "routed experts stored as": "packed int4, groups of 32"
        if config.packed_experts
        else "bf16",
        "eos token ids": ", ".join(map(str, config.eos_token_ids)),
        "vocab_size": str(config.vocab_size),
    }
    return _two_columns("Architecture, from config.json", rows)


def _contents(inspection: Inspection) -> Table:
    files = inspection.files
    rows = {
        "shards": f"{files.shards}, {files.bytes:,} bytes on disk",
        "tensors": f"{inspection.tensors:,} as required",
        "bytes of tensors": f"{files.tensor_bytes:,}{_index_total(files)}",
    }
    for reason, count in inspection.left_aside.items():
        rows[f"left aside: {reason}"] = f"{count:,} tensors"
    if files.not_in_index:
        rows["shards that the index does not name"] = ", ".join(files.not_in_index)
    rows["dtype of router weights"] = _counts(inspection.router_dtypes)
    rows["dtype of correction biases"] = _counts(inspection.correction_bias_dtypes)
    return _two_columns("Files", rows)


def _index_total(files: Files) -> str:
    if files.index_total_size in (None, files.tensor_bytes):
        return ""
    return f"; the index says {files.index_total_size:,}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{dtype} ({count})" for dtype, count in counts.items()) or "none"


def _parameters(roles: Mapping[str, Share], total: Share) -> Table:
    view = Table(title="Parameters", title_justify="left")
    view.add_column("role")
    for name in ("parameters", "active a token", "bytes in memory"):
        view.add_column(name, justify="right")
    for role, share in roles.items():
        view.add_row(role, f"{share.parameters:,}", f"{share.active:,}", f"{share.bytes:,}")
    view.add_section()
    view.add_row("all", f"{total.parameters:,}", f"{total.active:,}", f"{total.bytes:,}")
    return view


def _histogram(report: NibbleReport) -> Table:
    view = Table(title=f"Codes of {len(report.tensors)} packed tensors", title_justify="left")
    view.add_column("code", justify="right")
    view.add_column("share", justify="right")
    view.add_column("")
    counts = report.histogram
    largest, total = max(counts.values()), sum(counts.values())
    for code, count in counts.items():
        view.add_row(
            str(code), f"{count / total:.3%}", "█" * round(BAR_WIDTH * count / largest), style="dim"
        )
    return view


def _nibble_summary(report: NibbleReport) -> str:
    return (
        f"Code -8: {report.share_of_lowest:.3%}; groups that reach 7: "
        f"{report.share_of_full_groups:.2%}; scales {report.smallest_scale:.3g} to "
        f"{report.largest_scale:.3g}."
    )


def _tokenizer(facts: TokenizerFacts) -> Table:
    rows = {
        "ranks, ids in all": f"{facts.ranks:,}, {facts.vocab_size:,}",
        "ends a turn": f"{facts.end_token} = {facts.end_id}",
        "<think> and </think> are one id each": "yes" if facts.think_is_one_id else "no",
        "named control tokens": ", ".join(f"{name} {i}" for name, i in facts.control.items()),
    }
    rows |= {f"ids of {text!r}": " ".join(map(str, ids)) for text, ids in facts.probes.items()}
    return _two_columns("Tokenizer", rows)


def _two_columns(title: str, rows: Mapping[str, str]) -> Table:
    view = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        # Names of tokens and files may hold what looks like markup.
        view.add_row(*(text.replace("[", r"\[") for text in (name, value)))
    return view
