"""Pictures of the attention of lanes over the patches of sample images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from mpt_jax.experiments.report import figures, lane_job, page
from mpt_jax.experiments.report.confusion import shortened
from mpt_jax.experiments.report.figures import Panel
from mpt_jax.experiments.report.lane_job import SeenImage

MOST_LANES = 6  # of a picture, the lane of the image's task first
MOST_LAYERS = 12
SIZE = 84  # pixels of a cell
OPACITY = 0.6
COLORS = matplotlib.colormaps["inferno"]
LEAD = (
    "Each picture shows an image as the model gets it and, for each lane (row) and layer (column), "
    "how far the lane's class token attends to each patch through the summaries of the lane's "
    "selectors: the attention on a summary (mean over heads) times the weight of the patch in it, "
    "summed over summaries. Brighter patches have more; each cell has its own scale, from 0 to its "
    "largest value. The first row is the lane of the image's own task."
)
SHARES = (
    "Share of the class token's attention that reaches patches, in percent, mean over the images "
    "above. The rest is on the image's class token (through summaries), the lane's class token and "
    "its keys."
)


def sections(model_dir: Path, count: int) -> list[str]:
    """Returns pictures of sample images of a job with lanes, and a table of the attention on
    patches by lane and layer. Arguments and errors are those of `lane_job.seen_images`."""
    lanes, images = lane_job.seen_images(model_dir, count)
    blocks = [page.paragraph(LEAD)]
    if len(lanes) > MOST_LANES:
        blocks.append(page.paragraph(f"Pictures show {MOST_LANES} of the {len(lanes)} lanes."))
    blocks += [page.figure([_picture(lanes, image)], _caption(image), {}) for image in images]
    name = "Attention on patches"
    rows = _share_rows(lanes, np.stack([image.attention for image in images]))
    return [*blocks, page.heading(name), page.paragraph(SHARES), page.table(rows, name)]


def _caption(image: SeenImage) -> str:
    what = f"Image {image.number:,} of {image.run} ({image.split})"
    true, predicted = (
        ", ".join(names) or "none of its classes" for names in (image.classes, image.predicted)
    )
    return f"{what}: {true}. Its lane predicts {predicted}."


def _picture(lanes: Sequence[str], image: SeenImage) -> str:
    own = lanes.index(image.run)
    chosen = [own, *(row for row in range(len(lanes)) if row != own)][:MOST_LANES]
    depth = image.attention.shape[1]
    shown = np.unique(np.linspace(0, depth - 1, min(depth, MOST_LAYERS)).round().astype(int))
    plain = _resized(image.pixels, Image.Resampling.LANCZOS)
    rows = [
        [plain, *(overlay(plain, image.attention[row, layer, 1:]) for layer in shown)]
        for row in chosen
    ]
    columns = ["image", *(f"layer {layer + 1}" for layer in shown)]
    alt = f"Attention of {len(chosen)} lanes over patches in {len(shown)} layers. {_caption(image)}"
    names = [shortened(lanes[row]) for row in chosen]
    return figures.pictures(Panel("", "", "", alt), names, columns, np.array(rows))


def overlay(
    plain: UInt8[np.ndarray, "S S 3"], patches: Float[np.ndarray, " I"]
) -> UInt8[np.ndarray, "S S 3"]:
    """Returns a gray image under the colors of its patches, from 0 to the largest value.

    Args:
        plain: The image.
        patches: The value of each patch, in the order of their rows.
    """
    across = math.isqrt(len(patches))
    shares = patches.reshape(across, across) / max(float(patches.max()), 1e-30)
    colors = (255 * COLORS(shares)[..., :3]).round().astype(np.uint8)
    colors = _resized(colors, Image.Resampling.NEAREST, len(plain))
    gray = plain @ np.array([0.299, 0.587, 0.114])
    return (OPACITY * colors + (1 - OPACITY) * gray[..., None]).round().astype(np.uint8)


def _resized(
    pixels: UInt8[np.ndarray, "h w 3"], how: Image.Resampling, size: int = SIZE
) -> UInt8[np.ndarray, "S S 3"]:
    return np.asarray(Image.fromarray(pixels).resize((size, size), how))


def _share_rows(
    lanes: Sequence[str], attention: Float[np.ndarray, "B K layers I"]
) -> list[list[str]]:
    shares = 100 * attention[..., 1:].sum(-1).mean(0)
    rows = [["", *(f"layer {layer + 1}" for layer in range(shares.shape[1]))]]
    return rows + [
        [lane, *(f"{share:.1f}" for share in of_lane)]
        for lane, of_lane in zip(lanes, shares, strict=True)
    ]
