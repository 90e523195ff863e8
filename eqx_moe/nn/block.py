"""One layer of a decoder."""

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from eqx_moe.nn.attention import Attention, Rows
from eqx_moe.nn.cache import AnyCache
from eqx_moe.nn.mla import MLA
from eqx_moe.nn.mlp import MLP
from eqx_moe.nn.moe import LayerRouting, MoE
from eqx_moe.nn.norm import RMSNorm


class Block(eqx.Module):
    """Pre-norm residual block: attention, then a dense MLP or a mixture of experts."""

    attention_norm: RMSNorm
    attention: Attention | MLA
    ffn_norm: RMSNorm
    mlp: MLP | None
    moe: MoE | None

    def __check_init__(self):
        if (self.mlp is None) == (self.moe is None):
            raise ValueError("A block has either `mlp` or `moe`; got both or neither.")

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rows: Rows,
        tables: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]],
        cache: AnyCache | None = None,
        key: PRNGKeyArray | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Array, "batch out hidden"], AnyCache | None, LayerRouting | None]:
        """`tables` are those of `self.attention.rope`. `last_only`: the caller wants the last place of each row and no
        other, so that `out` may be 1; else it is `seq`."""
        attended, cache = self.attention(self.attention_norm(x), rows, tables, cache)
        x, mask = x + attended, rows.segments != 0
        if last_only and not (self.moe is not None and self.moe.execution.by_row):
            x, mask = x[:, -1:], mask[:, -1:]
        normed = self.ffn_norm(x)
        if self.moe is None:
            assert self.mlp is not None
            return x + self.mlp(normed), cache, None
        y, routing = self.moe(normed, mask, key)
        return x + y, cache, routing
