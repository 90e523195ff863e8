"""Who sends which pair (token, expert) where: the arithmetic of an all-to-all."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Departures(NamedTuple):
    """The pairs of one device in the order in which they leave: by the device they go to, then as they came.

    Those that go nowhere come last.
    """

    #: The pair that leaves at each place of the queue.
    order: Int[Array, " pairs"]
    #: For each device, where its part of the queue starts and how many are in it.
    starts: Int[Array, " devices"]
    counts: Int[Array, " devices"]


def departures(to: Int[Array, " pairs"], devices: int) -> Departures:
    """The queue of pairs of which pair i goes to the device `to[i]`; `devices` is nowhere."""
    counts = jnp.sum(to[:, None] == jnp.arange(devices), axis=0, dtype=jnp.int32)
    return Departures(jnp.argsort(to, stable=True), jnp.cumsum(counts) - counts, counts)


def seats(queue: Departures, places: int) -> tuple[Int[Array, "devices places"], Bool[Array, "devices places"]]:
    """Buffers with as many places for each device: the pair at each place, and whether there is one.

    Of those who go to one device, the first get the places. Where none sits, the pair is any.
    """
    place = jnp.arange(places)
    taken = place < queue.counts[:, None]
    at = jnp.minimum(queue.starts[:, None] + place, queue.order.shape[0] - 1)
    return queue.order[at], taken


def seat_of(
    queue: Departures, to: Int[Array, " pairs"], places: int
) -> tuple[Int[Array, " pairs"], Bool[Array, " pairs"]]:
    """The inverse of `seats`: for each pair its place, counted through all buffers, and whether it has one."""
    devices = queue.counts.shape[0]
    device = jnp.minimum(to, devices - 1)
    rank = jnp.argsort(queue.order) - queue.starts[device]
    seated = (to < devices) & (rank < places)
    return jnp.where(seated, device * places + rank, 0), seated


class Ragged(NamedTuple):
    """The four arguments of `jax.lax.ragged_all_to_all` after the two arrays, on one device."""

    input_offsets: Int[Array, " devices"]
    send_sizes: Int[Array, " devices"]
    output_offsets: Int[Array, " devices"]
    recv_sizes: Int[Array, " devices"]


def ragged(counts: Int[Array, "devices devices"], me: Int[Array, ""] | int) -> tuple[Ragged, Ragged]:
    """There, and back again, for the device `me`, if device s has `counts[s, d]` rows for device d.

    Every device sends from one queue sorted by receiver, and keeps what arrives sorted by sender. Back again, every row
    returns to where it left.
    """
    left = jnp.cumsum(counts, axis=1) - counts  # [s, d]: where in the queue of s the rows for d start.
    arrived = jnp.cumsum(counts, axis=0) - counts  # [s, d]: where on d the rows from s start.
    there = Ragged(left[me], counts[me], arrived[me], counts[:, me])
    return there, Ragged(arrived[:, me], counts[:, me], left[:, me], counts[me])
