"""Write the inputs of `make demo`: SmolLM2-135M-Instruct as a KerasHub preset, and kinds of text.

All come from installed packages; nothing is downloaded. An existing preset is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.demo.kinds import write_kinds
from tests.models.smollm2 import smollm2_preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    preset = folder / "smollm2"
    if not (preset / "metadata.json").exists():
        smollm2_preset(preset)
    for path in (preset, *write_kinds(folder / "texts")):
        print(f"ready: {path}")


if __name__ == "__main__":
    main()
