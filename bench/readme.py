"""Print tables of the raw files in bench/results/, or in another folder.

    python -m bench.readme                  # prints the tables of bench/results
    python -m bench.readme --print FOLDER   # prints the tables of another folder

The table in README.md and the page docs/reference/benchmarks.md are written by `python -m docs.generate`.
"""

import argparse
from pathlib import Path

from bench.tables import RESULTS, make_all_tables, read_records


def main() -> None:
    """Print one table for each raw file, with the newest record of each arm and metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--print", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the raw files (default: bench/results)"
    )
    print(make_all_tables(read_records(parser.parse_args().print)), end="")


if __name__ == "__main__":
    main()
