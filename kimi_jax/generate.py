"""`python -m kimi_jax.generate --checkpoint DIR [--adapter DIR | --run DIR] --prompt TEXT …`: samples."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from kimi_jax.command import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, loads model and adapter, and prints the answers."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_jax.generate",
        description="Answers prompts with a checkpoint, with or without an adapter.",
    )
    parser.add_argument("--checkpoint", help="HF directory, or `demo`; with --run it is the run's")
    parser.add_argument("--adapter", help="PEFT directory in any layout that export writes")
    parser.add_argument(
        "--run", help="run directory: its base, and the adapter of its newest checkpoint"
    )
    parser.add_argument(
        "--prompt", action="append", required=True, help="a user's text; may be repeated"
    )
    parser.add_argument("--system", help="system message before every prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of activations")
    parser.add_argument("--latent-norm-eps", type=float, help="as model.latent_norm_eps of the run")
    parser.add_argument(
        "--expert", type=int, default=1, metavar="N", help="devices that share the model"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) == (options.run is None):
        parser.error("give --checkpoint or --run, one of the two")
    if options.run is not None and options.adapter is not None:
        parser.error("--run brings its own adapter; leave --adapter away")
    if options.run is not None and options.latent_norm_eps is not None:
        parser.error("--run brings its own eps; leave --latent-norm-eps away")

    from kimi_jax.model.decode import Sampling, check_request
    from kimi_jax.training.answers import answer, render
    from kimi_jax.training.assemble import load_parts, load_run

    if options.run is not None:
        parts = load_run(options.run, options.dtype, {"expert": options.expert})
    else:
        given = {"dtype": options.dtype, "latent_norm_eps": options.latent_norm_eps}
        chosen = {name: value for name, value in given.items() if value is not None}
        mesh = {"expert": options.expert}
        parts = load_parts(options.checkpoint, options.adapter, **chosen, mesh=mesh)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    prompts = render(
        [
            [{"role": "system", "content": options.system}] * (options.system is not None)
            + [{"role": "user", "content": prompt}]
            for prompt in options.prompt
        ],
        parts.chat,
    )
    # Before the base is read: it may be large.
    check_request(parts.checkpoint.config, prompts, options.max_new_tokens, sampling)
    answers = answer(
        parts.model_def,
        parts.base,
        parts.adapters,
        parts.chat,
        prompts,
        options.max_new_tokens,
        sampling,
    )
    for prompt, reply in zip(options.prompt, answers, strict=True):
        if options.json:
            print(json.dumps({"prompt": prompt, **asdict(reply)}, ensure_ascii=False))
            continue
        if reply.reasoning:
            print(f"(reasoning) {reply.reasoning}")
        print(reply.content)


if __name__ == "__main__":
    run_command(main)
