"""Programs that turn checkpoints into other checkpoints and prove it: `python -m convert.names SRC`, from a checkout.

Nothing in `eqx_moe` imports this, and the wheel leaves it out.
"""
