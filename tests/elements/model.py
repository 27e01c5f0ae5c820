"""SmolLM2 with the elements' bank, converted and assembled on first use, in the cache folder.

python tests/elements/model.py      # makes it where it is not there, and says where it is
"""

from __future__ import annotations

import pathlib
import sys

from mlx_hiermem.apps.demo import tour

NAME = "smollm2-135m-elements"
BANK = pathlib.Path(__file__).parent / "bank"


def model_folder() -> pathlib.Path:
    return tour.model_folder(NAME)


def prepare() -> pathlib.Path:
    """Makes the model where that has not been done; returns its folder."""
    return tour.prepare(lambda line: print(line, file=sys.stderr), NAME, BANK)


if __name__ == "__main__":
    print(prepare())
