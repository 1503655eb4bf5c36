"""What a batch of sequences remembers between calls: recurrent states and keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posttrain.model.configuration import MiniMaxText01Config


class HybridCache:
    """States of lightning layers and keys/values of softmax layers for B sequences, rows side by side.

    Attributes:
        lengths: tokens each row has taken in so far, on the host.
        states: per lightning layer, [B, H, V, K], fp32 whatever the model is cast to (fp64 in an fp64 model).
        keys, values: per softmax layer, [B, key/value heads, capacity, head_dim] in the model's type.
    """

    def __init__(
        self, config: MiniMaxText01Config, batch_size: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """An empty cache that holds up to `capacity` tokens a row."""
        self.lengths = [0] * batch_size
        self.capacity = capacity
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        state_shape = (batch_size, config.num_attention_heads, config.head_dim, config.head_dim)
        kv_shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.states: dict[int, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for layer, kind in enumerate(config.attn_type_list):
            if kind == 0:
                self.states[layer] = torch.zeros(state_shape, dtype=state_dtype, device=device)
            else:
                self.keys[layer] = torch.zeros(kv_shape, dtype=dtype, device=device)
                self.values[layer] = torch.zeros(kv_shape, dtype=dtype, device=device)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    def check_room(self, lengths: Sequence[int]) -> None:
        """ValueError where a row would overflow by taking in so many more tokens, one number a row."""
        longest = max((have + new for have, new in zip(self.lengths, lengths, strict=True)), default=0)
        if longest > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row, asked for {longest}")

    def advance(self, lengths: Sequence[int]) -> None:
        """Count tokens just taken in, one number a row."""
        self.lengths = [have + new for have, new in zip(self.lengths, lengths, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order (a row may come several times)."""
        self.lengths = [self.lengths[row] for row in rows]
        for table in (self.states, self.keys, self.values):
            for layer, tensor in table.items():
                table[layer] = tensor[torch.tensor(rows, device=tensor.device, dtype=torch.int64)]
