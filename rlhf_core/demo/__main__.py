"""`python -m rlhf_core.demo --seed N --out DIR`: write the demo world's data files."""

import argparse
from pathlib import Path

from rlhf_core.demo.write import write_demo_data


def main() -> None:
    """Read the arguments, write the files, say what was written."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_core.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other data of the same kind")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    arguments = parser.parse_args()
    counts = write_demo_data(arguments.seed, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.glob("*.jsonl"))
    rows = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"simulated data of seed {arguments.seed} in {arguments.out}: {rows}; {size:,} bytes")


if __name__ == "__main__":
    main()
