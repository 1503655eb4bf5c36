"""Run as a program: greedy continuations of prompts by vLLM, whose workers are processes of their own. Imports no test.

Reads JSON {"arguments", "prompts", "tokens"} from standard input, writes JSON {"package", "answers"} to the file named first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """See the module."""
    asked = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    import posttrain.rollout.vllm.plugin as plugin

    llm = LLM(**asked["arguments"])
    sampling = SamplingParams(temperature=0.0, max_tokens=asked["tokens"], logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], sampling, use_tqdm=False)
    samples = [output.outputs[0] for output in outputs]
    answers = [
        (list(sample.token_ids), [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)])
        for sample in samples
    ]
    Path(sys.argv[1]).write_text(json.dumps({"package": plugin.__file__, "answers": answers}))


if __name__ == "__main__":  # workers are spawned, and import this file
    main()
