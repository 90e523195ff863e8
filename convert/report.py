"""The page that `convert.verify` writes."""

import pathlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

PAGE, PLOT = "verify.md", "verify.png"


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    name: str
    figure: str
    passed: bool

    def __str__(self) -> str:
        return f"{'agrees ' if self.passed else 'DIFFERS'}  {self.name}: {self.figure}"


@dataclass(frozen=True)
class Layer:
    """The largest errors of a layer's output, of the largest value: from their input to it, and from our own."""

    alone: float
    so_far: float


def write_report(
    out: pathlib.Path, source: pathlib.Path, checks: Sequence[Check], layers: Sequence[Layer], tolerance: float
) -> pathlib.Path:
    """Writes the page and its plot; returns the page's place."""
    _plot(out / PLOT, layers, tolerance)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("eqx_moe", "jax", "torch", "transformers"))
    worst = sorted(range(len(layers)), key=lambda i: -layers[i].alone)[:5]
    lines = [
        f"# {_plain(source.resolve().name)}: eqx_moe beside transformers",
        "",
        f"{'All agrees.' if all(check.passed for check in checks) else '**Not all agrees.**'} "
        f"Both compute in float32 on a CPU; errors are the largest difference over the largest value, "
        f"at most {tolerance:g}.",
        "",
        "| compared | found | |",
        "|---|---|---|",
        *(
            f"| {check.name} | {_plain(check.figure)} | {'agrees' if check.passed else '**differs**'} |"
            for check in checks
        ),
        "",
        f"![error per layer]({PLOT})",
        "",
        "A layer *alone* is given their input; *so far* is from the embedding on, with all errors before it.",
        "A token whose last chosen expert is all but equal to the next best may go to that one for the sake of a",
        "rounding: then its error is large in one layer, and the text may part there.",
        "",
        "| layer | alone | so far |",
        "|---|---|---|",
        *(f"| {i} | {layers[i].alone:.1e} | {layers[i].so_far:.1e} |" for i in worst),
        "",
        f"The {len(worst)} worst of {len(layers)} layers. {versions}; Python {platform.python_version()}.",
    ]
    page = out / PAGE
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _plain(text: str) -> str:
    """Text from a file's name, without what Markdown or HTML would read."""
    return "".join(c if c.isprintable() and c not in "|<>`[]" else "?" for c in text)


def _plot(file: pathlib.Path, layers: Sequence[Layer], tolerance: float) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    # On a logarithmic axis nothing is at nought: what is equal to the last bit stands on the lower edge.
    floor = 1e-9
    axes.semilogy([max(layer.so_far, floor) for layer in layers], marker="o", label="so far")
    axes.semilogy([max(layer.alone, floor) for layer in layers], marker=".", label="alone")
    axes.axhline(tolerance, color="grey", linestyle="--", label="tolerance")
    axes.set(xlabel="layer", ylabel="largest error / largest value", ylim=(floor / 2, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    figure.savefig(file, dpi=150)
