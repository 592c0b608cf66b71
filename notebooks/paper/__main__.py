"""`python notebooks/paper COMMAND`, each with --help of its own:

experiments  train the runs of a table; what is on record is skipped
tables       print the paper's tables beside the recorded runs, as Markdown
frontier     perplexity against bytes between two parties, of every model on record
conversion   convert SmolLM2-135M, one removal at a time, and fine-tune it
abilities    train, and ask what is left beside perplexity
arithmetic   train on sums and code, with the penalty on answers, on everything or on nothing
"""

import sys
from importlib import import_module
from pathlib import Path

COMMANDS = ("experiments", "tables", "frontier", "conversion", "abilities", "arithmetic")


def main() -> int:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        sys.path[0] = str(Path(__file__).resolve().parents[1])
        return import_module(f"paper.{command}").main(arguments)
    print(__doc__)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
