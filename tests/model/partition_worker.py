"""One of several gloo ranks that load a checkpoint under ZeRO-3: `python partition_worker.py CHECKPOINT RESULT DTYPE`.

Writes RESULT-RANK.json: bytes read, and the names of parameters whose gathered values are not the checkpoint's, bit for bit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch

from posttrain.model.loading import load_config
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.model.sharded_loading import load_partitioned


def main() -> None:
    folder, result, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = int(os.environ["RANK"])
    config = load_config(folder)
    torch.manual_seed(rank)
    # The type by the settings: DeepSpeed 0.19 takes `dtype` for bf16 on a processor without fp16.
    bf16 = {"enabled": dtype == torch.bfloat16}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": bf16}
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = MiniMaxText01ForCausalLM(config)
    read = load_partitioned(model, folder)
    expected = torch.load(folder / "expected.pt")
    wrong = []
    for name, parameter in model.named_parameters():
        partition = parameter.ds_tensor.numel()
        assert partition <= -(-parameter.ds_numel // int(os.environ["WORLD_SIZE"])), name
        with deepspeed.zero.GatheredParameters([parameter]):
            if not parameter.detach().equal(expected[name].to(dtype)):
                wrong.append(name)
    gathered = next(iter(model.parameters()))
    refused = ""
    with deepspeed.zero.GatheredParameters([gathered]):
        try:
            load_partitioned(model, folder)
        except ValueError as error:
            refused = str(error)
    Path(f"{result}-{rank}.json").write_text(json.dumps({"read": read, "wrong": wrong, "refused": refused}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
