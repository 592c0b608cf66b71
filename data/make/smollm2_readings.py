"""`python data/make/smollm2_readings.py`: how SmolLM2-135M, once notebook 03 has downloaded it, reads six texts."""

import json
from pathlib import Path

from entropy_lib.explore.reading import COARSE, packed, read_attention
from entropy_lib.explore.smollm2 import READINGS, load_smollm2

TEXTS = {
    "code": """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)


mean([1, 2, 3])
""",
    "prose": (
        "The river had risen in the night, and by morning the bridge was gone. Nobody in the village could "
        "remember such a flood. The baker, whose ovens stood on the other bank, looked across the brown "
        "water and went home again."
    ),
    "repetition": (
        "The cat sat. The dog ran. The bird sang. The cat sat. The dog ran. The bird sang. The cat sat. The "
        "dog ran. The bird sang. The cat sat. The dog ran. The bird"
    ),
    "brackets": "pairs = [(1, 2), (3, 4), [5, (6, 7)], {8: [9, (10, 11)]}, ((12,), [13])]",
    "a pronoun": (
        "Anna lent Peter the book because he had asked her for it twice. When he gave it back to her a week "
        "later, its cover was torn, and she asked him what he had done with it."
    ),
    "a name to come": (
        "Tom and Lucy were waiting at the station. Lucy had bought two tickets the day before, one for him "
        "and one for herself. When the train came in, Tom lifted the heavy bag and handed it up to"
    ),
}


def write_readings(path: Path = READINGS, max_tokens: int = 64) -> None:
    """Readings by name, each with its text, packed in one byte a weight; see `reading.packed`."""
    model, tokenizer = load_smollm2()
    readings = {}
    for name, text in TEXTS.items():
        reading = read_attention(model, tokenizer, text, max_tokens)
        readings[name] = {"text": text, "reading": packed(reading, COARSE)}
        print(f"{name}: {len(reading.tokens)} of {reading.total} tokens")
    path.write_text(json.dumps(readings, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    write_readings()
