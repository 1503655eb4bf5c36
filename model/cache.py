"""What a batch of sequences remembers between calls: recurrent states and keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from posttrain.data.layout import SequenceLayout
from posttrain.model.configuration import MiniMaxText01Config


class HybridCache:
    """States of lightning layers and keys/values of softmax layers for B sequences, rows side by side.

    Also what transformers' `generate` needs of `past_key_values`. A recurrent state cannot be rolled back, so `crop`, and
    with it assisted decoding, is refused.

    Attributes:
        lengths: tokens each row has taken in so far, padding left out, on the host.
        columns: columns of padded batches taken in so far, padding included: what `generate` counts in.
        states: per lightning layer, [B, H, V, K], fp32 whatever the model is cast to (fp64 in an fp64 model).
        keys, values: per softmax layer, [B, key/value heads, capacity, head_dim] in the model's type.
    """

    is_compileable = False
    is_croppable = False

    def __init__(
        self,
        config: MiniMaxText01Config,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        grows: bool = False,
    ) -> None:
        """An empty cache that holds up to `capacity` tokens a row; with `grows`, more when more come."""
        self.lengths = [0] * batch_size
        self._step: SequenceLayout | None = None
        self.columns = 0
        self.capacity = capacity
        self.grows = grows
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

    def step_layout(self, device: torch.device) -> SequenceLayout:
        """One new token for every row; remembered, with the index tensors it makes."""
        if self._step is None or self._step.num_documents != self.batch_size or self._step.device != device:
            self._step = SequenceLayout.from_lengths([1] * self.batch_size, device)
        return self._step

    def make_room(self, lengths: Sequence[int]) -> None:
        """Grow for so many more tokens, one number a row; ValueError where a row of a cache that does not grow overflows."""
        longest = max((have + new for have, new in zip(self.lengths, lengths, strict=True)), default=0)
        if longest <= self.capacity:
            return
        if not self.grows:
            raise ValueError(f"the cache holds {self.capacity} tokens a row, asked for {longest}")
        more = max(longest, 2 * self.capacity) - self.capacity
        for table in (self.keys, self.values):
            for layer, tensor in table.items():
                table[layer] = F.pad(tensor, (0, 0, 0, more))
        self.capacity += more

    def advance(self, lengths: Sequence[int]) -> None:
        """Count tokens just taken in, one number a row."""
        self.lengths = [have + new for have, new in zip(self.lengths, lengths, strict=True)]
        self.columns += max(lengths, default=0)

    def count_padding(self, columns: int) -> None:
        """Count columns of a padded batch beyond its longest row."""
        self.columns += columns

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order (a row may come several times)."""
        self.lengths = [self.lengths[row] for row in rows]
        for table in (self.states, self.keys, self.values):
            for layer, tensor in table.items():
                table[layer] = tensor[torch.tensor(rows, device=tensor.device, dtype=torch.int64)]

    # Under transformers' names

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns taken in so far, the same for every layer."""
        return self.columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows that beams [B] continue."""
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        self.select([row for row in range(self.batch_size) for _ in range(repeats)])

    def crop(self, *_: int) -> None:
        """ValueError: a recurrent state does not go back."""
        raise ValueError("a HybridCache cannot be cropped: lightning layers keep a sum over all tokens; take a new cache")

    def activate_past_recording(self) -> None:
        """ValueError: there is no rolling back, which assisted decoding needs."""
        self.crop()
