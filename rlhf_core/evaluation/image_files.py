"""Images that matplotlib draws: whether one can be drawn, before anything is computed for it."""

from __future__ import annotations

from pathlib import Path

from rlhf_core.infra.errors import ConfigError


def check_image(path: Path, place: str) -> None:
    """Raise `ConfigError` where matplotlib isn't installed, or writes no files whose name ends so; `place` is the option."""
    try:
        import matplotlib.figure  # noqa: F401  # what draws needs both
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ConfigError(
            "drawing needs matplotlib, which isn't installed", place=place, fix="pip install 'rlhf-core[plot]'"
        ) from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        fix = f"use a path that ends in .png or .svg ({', '.join(sorted(kinds))})"
        raise ConfigError("matplotlib can't write this image format", place=place, got=str(path), fix=fix)
