"""Unpack the demo's model and dialogues into a folder: ``prepare_demo.py FOLDER``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    from qz3_widgets.training.demo_assets import prepare

    try:
        prepare(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
