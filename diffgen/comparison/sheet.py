"""Draw grid.png: schedulers down, budgets across, a block for each prompt and guidance, all from the first seed."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffgen.images.read import read_image, read_kind
from diffgen.images.sheet import fit_text

from .results import Results

SMALLEST = 96  # pictures below this side are enlarged by a whole factor, pixel by pixel
LARGEST = 256
MARGIN, LABEL, HEAD = 6, 190, 26


def sheet(results: Results, folder: Path) -> Image.Image:
    """The labelled pictures of the first seed; `folder` is where their images/ are."""
    axes = results.axes
    seed, budgets = axes.seeds[0], axes.budgets
    blocks = [(p, g) for p in axes.prompts for g in axes.guidance]
    cells = {cell.place: cell for cell in results.cells if cell.seed == seed}
    entries = [(entry.label, entry.grid) for entry in axes.entries]
    width, height = _size(results, folder)
    block = HEAD * 2 + len(entries) * (height + HEAD)
    picture = Image.new(
        "RGB", (LABEL + len(budgets) * (width + MARGIN) + MARGIN, MARGIN + len(blocks) * block), "white"
    )
    draw, font, small = ImageDraw.Draw(picture), _font(15), _font(12)
    for n, (prompt, guidance) in enumerate(blocks):
        top = MARGIN + n * block
        title = f"{prompt}   guidance {guidance:g}" if prompt else results.model.name
        draw.text(
            (MARGIN, top), fit_text(draw, f"{title}   seed {seed}", font, picture.width - 2 * MARGIN), "black", font
        )
        for column, budget in enumerate(budgets):
            x = LABEL + column * (width + MARGIN)
            draw.text((x, top + HEAD), f"{budget} evaluations", "black", small)
        for row, (label, grid) in enumerate(entries):
            y = top + 2 * HEAD + row * (height + HEAD)
            draw.text((MARGIN, y), fit_text(draw, label, font, LABEL - 2 * MARGIN), "black", font)
            draw.text((MARGIN, y + 20), fit_text(draw, grid, small, LABEL - 2 * MARGIN), "dimgray", small)
            for column, budget in enumerate(budgets):
                x = LABEL + column * (width + MARGIN)
                cell = cells.get((label, grid, budget, prompt, guidance))
                if cell and cell.image:
                    image = read_image(folder / cell.image)
                    picture.paste(image.resize((width, height), _filter(image, width)), (x, y))
                    error = "stochastic" if cell.stochastic else _short(cell.error)
                    draw.text((x, y + height + 2), error, "dimgray", small)
                else:
                    draw.rectangle((x, y, x + width - 1, y + height - 1), outline="gray")
                    draw.line((x, y, x + width - 1, y + height - 1), fill="lightgray")
                    draw.text((x + 4, y + 4), cell.status if cell else "missing", "black", small)
    return picture


def _size(results: Results, folder: Path) -> tuple[int, int]:
    """The width and height at which the pictures are shown."""
    name = next((cell.image for cell in results.cells if cell.image), None)
    if name is None:
        return SMALLEST, SMALLEST
    width, height, _ = read_kind(folder / name)
    factor = -(-SMALLEST // max(width, height)) if max(width, height) < SMALLEST else 1
    shrink = min(1.0, LARGEST / (max(width, height) * factor))
    return max(1, round(width * factor * shrink)), max(1, round(height * factor * shrink))


def _filter(image: Image.Image, width: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if width >= image.width else Image.Resampling.LANCZOS


def _short(error: float | None) -> str:
    return "" if error is None else f"error {error:.3g}"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
