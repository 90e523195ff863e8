"""Multi-head latent attention."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from eqx_moe.nn.attention import Rows
from eqx_moe.nn.cache import AnyCache, LatentCache, empty
from eqx_moe.nn.linear import Linear
from eqx_moe.nn.norm import RMSNorm
from eqx_moe.nn.rope import AbstractRope, rotate
from eqx_moe.sharding import rows_sharding


class MLA(eqx.Module):
    """Multi-head latent attention: DeepSeek-V2 (2024) section 2.1; reference: `DeepseekV3Attention` of transformers
    5.23, `models/deepseek_v3/modeling_deepseek_v3.py`.

    `kv_a` gives for each token a latent of `rank` numbers, from which `kv_b` makes the keys and values of all heads,
    and one rotated key that all heads share. A head's query and key are a part without position, `nope` wide, and a
    rotated one. Queries come from `q`, out of the hidden state or out of a latent of their own (`q_a`).

    The cache holds latents and rotated keys. Few queries read them as they are: `kv_b` is multiplied into the queries
    and into the result instead (section 2.1.2, "absorbed"), which is the same up to rounding.
    """

    q_a: Linear | None
    q_a_norm: RMSNorm | None
    q: Linear
    kv_a: Linear
    kv_a_norm: RMSNorm
    kv_b: Linear
    o: Linear
    heads: int = eqx.field(static=True)
    nope: int = eqx.field(static=True)
    value: int = eqx.field(static=True)
    rank: int = eqx.field(static=True)
    rope: AbstractRope = eqx.field(static=True)
    interleaved: bool = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        hidden: int,
        *,
        heads: int,
        nope: int,
        rotated: int,
        value: int,
        rank: int,
        q_rank: int | None,
        rope: AbstractRope,
        interleaved: bool,
        scale: float,
        bias: bool = False,
        norm_eps: float,
        std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ):
        """
        Args:
            nope, rotated: the widths of the two parts of a head's query and key.
            value: the width of a head's value.
            rank: the width of the latent of keys and values.
            q_rank: that of the queries' latent; None for queries straight from the hidden state.
            interleaved: which dimensions turn together, see `eqx_moe.nn.rope.rotate`.
            scale: what the products of queries and keys are multiplied with.
            bias: whether the maps to latents, and the one of the output, have biases.
        """
        q_a_key, q_key, kv_a_key, kv_b_key, o_key = jax.random.split(key, 5)
        width = heads * (nope + rotated)
        self.q_a = None if q_rank is None else Linear(hidden, q_rank, bias=bias, std=std, dtype=dtype, key=q_a_key)
        self.q_a_norm = None if q_rank is None else RMSNorm(q_rank, eps=norm_eps, dtype=dtype)
        self.q = Linear(hidden if q_rank is None else q_rank, width, std=std, dtype=dtype, key=q_key)
        self.kv_a = Linear(hidden, rank + rotated, bias=bias, std=std, dtype=dtype, key=kv_a_key)
        self.kv_a_norm = RMSNorm(rank, eps=norm_eps, dtype=dtype)
        self.kv_b = Linear(rank, heads * (nope + value), std=std, dtype=dtype, key=kv_b_key)
        self.o = Linear(heads * value, hidden, bias=bias, std=std, dtype=dtype, key=o_key)
        self.heads, self.nope, self.value, self.rank = heads, nope, value, rank
        self.rope, self.interleaved, self.scale = rope, interleaved, scale

    @property
    def head_sizes(self) -> Mapping[str, int]:
        """Linear map -> the size of the heads that its weight is made of."""
        return {"q": self.q.weight.shape[-2] // self.heads, "kv_b": self.nope + self.value, "o": self.value}

    def init_cache(self, batch: int, length: int, dtype: DTypeLike, mesh: Mesh | None) -> LatentCache:
        place = None if mesh is None else rows_sharding(mesh, batch)
        return LatentCache(empty((batch, length, self.kv_a.weight.shape[-2]), dtype, place))

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rows: Rows,
        tables: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]],
        cache: AnyCache | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], LatentCache | None]:
        """`tables` are those of `self.rope`. With a cache, writes the tokens' latents to it and reads all."""
        batch, seq, _ = x.shape
        if self.q_a is not None and self.q_a_norm is not None:
            q = self.q(self.q_a_norm(self.q_a(x)))
        else:
            q = self.q(x)
        q = q.reshape(batch, seq, self.heads, -1)
        q_nope, q_rotated = q[..., : self.nope], rotate(q[..., self.nope :], tables, self.interleaved)
        latents, k_rotated = jnp.split(self.kv_a(x), [self.rank], axis=-1)
        k_rotated = rotate(k_rotated[:, :, None], tables, self.interleaved)[:, :, 0]
        entries = jnp.concatenate([self.kv_a_norm(latents), k_rotated], axis=-1)
        absorbed = False
        if cache is not None:
            assert rows.start is not None and isinstance(cache, LatentCache)
            cache = cache.write(entries, rows.start)
            entries = cache.entries.astype(x.dtype)
            # Keys and values cost rank x (nope + value) a place and head; without them each query costs more.
            made, wider = self.rank * (self.nope + self.value), 2 * self.rank - self.nope - self.value
            absorbed = seq * wider <= made
        attend = self._absorbed if absorbed else self._expanded
        out = attend(q_nope, q_rotated, entries, rows)
        return self.o(out.reshape(batch, seq, self.heads * self.value)), cache

    def _expanded(self, q_nope, q_rotated, entries, rows: Rows) -> Float[Array, "batch seq heads value"]:
        """Every head's keys and values made from the latents."""
        latents, k_rotated = entries[..., : self.rank], entries[..., self.rank :]
        made = self.kv_b(latents).reshape(*latents.shape[:2], self.heads, self.nope + self.value)
        k_rotated = jnp.broadcast_to(k_rotated[:, :, None], (*made.shape[:3], k_rotated.shape[-1]))
        q = jnp.concatenate([q_nope, q_rotated], axis=-1).swapaxes(1, 2)
        k = jnp.concatenate([made[..., : self.nope], k_rotated], axis=-1).swapaxes(1, 2)
        return rows.attend(q, k, made[..., self.nope :].swapaxes(1, 2), scale=self.scale).swapaxes(1, 2)

    def _absorbed(self, q_nope, q_rotated, entries, rows: Rows) -> Float[Array, "batch seq heads value"]:
        """Queries as latents, of heads that share one key and value."""
        matrices = self.kv_b.weight.astype(q_nope.dtype).reshape(self.heads, self.nope + self.value, self.rank)
        q_latent = jnp.einsum("bshn,hnr->bshr", q_nope, matrices[:, : self.nope])
        q = jnp.concatenate([q_latent, q_rotated], axis=-1).swapaxes(1, 2)
        # The rotated keys pass for values too and are cut off again: so the cache is read where it lies.
        out = rows.attend(q, entries[:, None], entries[:, None], scale=self.scale)[..., : self.rank]
        return jnp.einsum("bhsr,hvr->bshv", out, matrices[:, self.nope :])
