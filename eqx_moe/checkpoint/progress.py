"""Progress in bytes."""

from tqdm import tqdm


def progress(doing: str, size: int) -> tqdm:
    """A bar in bytes on stderr, where that is a terminal, and once it takes more than a second."""
    return tqdm(total=size, desc=doing, unit="B", unit_scale=True, delay=1, disable=None)
