"""`python data/make/playground_runs.py`: two runs that part ways, what the playground shows where nothing can train."""

import json

from entropy_lib.explore.playground import PREPARED, QUICK, training_playground
from entropy_lib.training.recipe import get_recipe


def main() -> None:
    playground = training_playground(recipe=get_recipe("smoke", steps=100, **{**QUICK, "entropy_every": 1}))
    playground.learning_rate = 0.1
    for playground.variant in ("SM", "SM+LN+G"):
        playground.run()
        playground.wait()
        print(playground.words())
    PREPARED.write_text(json.dumps(playground.drawn, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
