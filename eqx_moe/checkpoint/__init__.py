"""Checkpoints on disk: safetensors in and out, and the name tables that say which tensors make up which leaves.

Nothing here knows a family of models: `load_leaves` and `save_leaves` take shapes or arrays by leaf path, and name
tables.
"""

from eqx_moe.checkpoint.names import Name as Name
from eqx_moe.checkpoint.names import Skipped as Skipped
from eqx_moe.checkpoint.names import leaf_paths as leaf_paths
from eqx_moe.checkpoint.names import plan as plan
from eqx_moe.checkpoint.names import replace_leaves as replace_leaves
from eqx_moe.checkpoint.raw import read_array as read_array
from eqx_moe.checkpoint.reader import load_leaves as load_leaves
from eqx_moe.checkpoint.shards import open_weights as open_weights
from eqx_moe.checkpoint.writer import save_leaves as save_leaves
