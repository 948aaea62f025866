"""What ``accelerate launch`` starts on every rank: train the run in ``--run-dir``."""

import argparse
from pathlib import Path


def parse() -> argparse.Namespace:
    """The two arguments; everything else stands in the run directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory with run.yaml and deepspeed.json")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    from qz3_widgets.training.main import main

    main(arguments.run_dir, resume=arguments.resume)
