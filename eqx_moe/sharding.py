"""Meshes of devices: the names of their axes."""

from jax.sharding import AxisType, Mesh

#: Devices along `data` hold different rows of a batch, along `expert` different experts, along `tensor` different parts
#: of each matrix.
AXES = ("data", "expert", "tensor")
DATA, EXPERT, TENSOR = AXES


def check_mesh(mesh: Mesh) -> Mesh:
    """The same devices and axes, with axes of the type Auto. Raises `ValueError` for an axis that is not of `AXES`.

    An axis that a mesh lacks counts as one of size 1.
    """
    unknown = sorted(set(mesh.axis_names) - set(AXES), key=str)
    if unknown:
        raise ValueError(
            f"`mesh` must have axes among {AXES}; got {unknown} among its {len(mesh.axis_names)} axes "
            f"{mesh.axis_names}. Name them otherwise, as in `jax.make_mesh(shape, {AXES})`."
        )
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
