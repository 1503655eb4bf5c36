"""`posttrain serve` and `posttrain generate`."""

from __future__ import annotations

import ipaddress
import os
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from posttrain.config import UserError
from posttrain.config.machine_checks import installed_vllm

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint of any kind, and its tokenizer.", show_default=False)
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on. There is no password: mind who can reach it.")]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=2, help="Longest prompt and answer together; by default the model's longest position."),
]


class EngineName(StrEnum):
    """What `generate` runs on; auto is vLLM where it is installed."""

    auto = "auto"
    vllm = "vllm"
    embedded = "embedded"


def serve_command(
    context: typer.Context,
    checkpoint: Checkpoint,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="Model's name in requests; by default the folder's.")] = None,
    max_length: MaxLength = None,
) -> None:
    """Serve a checkpoint with vLLM's OpenAI-compatible server. Options not known here are vLLM's own."""
    from posttrain.rollout.vllm.serving import server_command, server_environment

    command = server_command(checkpoint, host=host, port=port, name=name, max_length=max_length, more=context.args)
    typer.echo(f"vLLM {installed_vllm()} serves {checkpoint} at http://{host}:{port}/v1 as soon as it is ready", err=True)
    if not _is_loopback(host):
        typer.echo(f"note: other machines can reach {host}, and there is no password (--api-key KEY sets one)", err=True)
    # In the place of this process, so that signals reach the server.
    os.execve(command[0], command, server_environment(dict(os.environ)))


def generate_command(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the user says.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise, at temperatures above 0.")] = 0,
    engine: Annotated[EngineName, typer.Option("--engine", help="auto: vLLM where it is installed.")] = EngineName.auto,
) -> None:
    """Print the model's answer to one prompt, for a quick look."""
    from posttrain.data.encode import encode_prompt
    from posttrain.data.tokenizer import load_tokenizer
    from posttrain.rollout.types import RolloutEngine, RolloutRequest, SamplingParams
    from posttrain.stages.sampling import answer_text

    tokenizer = load_tokenizer(checkpoint)
    ids = tuple(encode_prompt(tokenizer, [{"role": "user", "content": prompt}]))
    version = installed_vllm()
    made: RolloutEngine
    if engine == EngineName.vllm or (engine == EngineName.auto and version is not None):
        from posttrain.rollout.vllm.engine import VLLMEngine

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        typer.echo(f"engine: vLLM {version}", err=True)
        made = VLLMEngine(checkpoint, own_process=False, max_batch_size=1)
    else:
        from posttrain.model.loading import load_causal_lm
        from posttrain.rollout.embedded import EmbeddedEngine
        from posttrain.stages.devices import placed

        typer.echo("engine: embedded", err=True)
        made = EmbeddedEngine(placed(load_causal_lm(checkpoint)).eval())
    params = SamplingParams(max_new_tokens, temperature, stop_token_ids=(int(tokenizer.eos_token_id),), seed=seed)
    with closing(made):
        try:
            output = made.generate([RolloutRequest("prompt", ids, params)])[0]
        except ValueError as error:  # too long for the model
            raise UserError(str(error), where=str(checkpoint)) from None
    typer.echo(answer_text(tokenizer, output.token_ids))
    if output.finish_reason == "length":
        typer.echo(f"(cut after {len(output.token_ids)} tokens)", err=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
