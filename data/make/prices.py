"""`python data/make/prices.py`: write the unit prices from the measurements and printed tables.

Measured: for each operation the non-negative unit prices that fit its measured sizes best, relatively.

The paper's: the printed tables have 16 totals in GB and 16 in minutes, of which 12 and 12 differ, too few to price
every operation. So the old engine's prices keep their proportions inside five groups (GROUPS), and the tables set one
factor a group for bytes, and the minutes a GB of each group, LayerNorm and ReLU at GELU's: alone they would get none,
since the tables barely tell them from the linear layers. Only the group totals are the paper's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from entropy_lib.private_inference.architecture import Operation, operations
from entropy_lib.private_inference.costs import PRICE_FILES, printed_cells
from entropy_lib.private_inference.methods import METHODS, prices_name

GROUPS = {
    "attention": ("softmax", "scores", "mix"),
    "linear": ("linear",),
    "LayerNorm and ReLU": ("layernorm", "relu"),
    "GELU": ("gelu",),
    "embedding and vocabulary": ("embed", "vocabulary projection"),
}
DATA = Path(__file__).resolve().parent.parent


def fit_measured(record: dict) -> dict:
    """Unit prices (bytes, seconds) and rounds by operation from a record of `measure`."""
    samples = defaultdict(list)
    for entry in record["operations"].values():
        operation = Operation(entry["part"], entry["operation"], tuple(entry["shape"]))
        samples[operation.name].append((operation.units(), entry))
    fitted_prices = {"bytes": {}, "seconds": {}, "rounds": {}}
    for name, found in samples.items():
        units = list(found[0][0])
        counts = np.array([[unit[key] for key in units] for unit, _ in found], dtype=float)
        if len(found) < 2 or np.linalg.matrix_rank(counts / counts.max(0)) < 2:
            counts, units = counts[:, :1], units[:1]  # sizes that do not tell the units apart
        for quantity, measured in (("bytes", "bytes"), ("seconds", "cpu_seconds")):
            prices = _fit(counts, np.array([entry[measured] for _, entry in found]))
            fitted_prices[quantity][name] = {
                unit: float(f"{p:.5g}") for unit, p in zip(units, prices, strict=True) if p
            }
    plain, late = sorted(record["rounds"].values(), key=lambda run: run["delay"])
    for before, after in zip(plain["steps"], late["steps"], strict=True):
        fitted_prices["rounds"][before["operation"]] = round((after["seconds"] - before["seconds"]) / late["delay"])
    return fitted_prices


def fit_methods(records: dict[str, dict]) -> dict[str, dict]:
    """Method -> its prices: what it computes as a method before it costs what it costs there."""
    by_name, fitted_prices = {}, {"bytes": {}, "seconds": {}, "rounds": {}}
    for method, record in records.items():
        fitted = fit_measured(record)
        fitted_prices = {quantity: {**prices, **fitted[quantity]} for quantity, prices in fitted_prices.items()}
        by_name[method] = fitted_prices
    return by_name


def fit_paper(proportions: dict) -> dict:
    """Factors on `proportions` (bytes by operation and unit) that fit the printed GB, and minutes a GB, by group."""
    totals, gigabytes, minutes = [], [], []
    for _, _, architecture, length, printed in printed_cells():
        row = dict.fromkeys(GROUPS, 0.0)
        for operation in operations(architecture, length):
            group = _group(operation)
            units = operation.units()
            row[group] += sum(price * units[unit] for unit, price in proportions[operation.name].items()) / 1e9
        totals.append(list(row.values()))
        gigabytes.append(printed["communication_gb"])
        minutes.append(printed["latency_min"])
    factors = _fit(np.array(totals), np.array(gigabytes))
    counts = np.array(totals) * factors
    gelu, beside = (list(GROUPS).index(name) for name in ("GELU", "LayerNorm and ReLU"))
    counts[:, gelu] += counts[:, beside]
    counts[:, beside] = 0.0
    pace = _fit(counts, np.array(minutes))
    pace[beside] = pace[gelu]
    free = {"multiply": {"element": 0.0}}  # the tables print the same cost with a temperature and without
    fitted_prices = {"bytes": dict(free), "seconds": dict(free), "rounds": {}, "factors": {}}
    for (group, names), factor, rate in zip(GROUPS.items(), factors, pace, strict=True):
        fitted_prices["factors"][group] = {
            "of the old engine's bytes": round(factor, 4),
            "minutes a GB": round(rate, 4),
        }
        for name in names:
            for quantity, scale in (("bytes", factor), ("seconds", factor * rate * 60 / 1e9)):
                prices = proportions["linear" if name == "vocabulary projection" else name]
                fitted_prices[quantity][name] = {unit: float(f"{p * scale:.5g}") for unit, p in prices.items()}
    return fitted_prices


def fit_quartic(x: np.ndarray, wanted: np.ndarray, power: int = 1, scale=1.0) -> tuple[list[float], float]:
    """(q, h, k, m, c) such that (q·((x + h)² + k)² + m·x + c)^power is nearest to `wanted`, and its error.

    Of all polynomials of degree 4 it has the smallest largest |error|·scale on the points x: Lawson's method, least
    squares whose weights grow where the error is large.
    """
    root, weight, best, found = wanted ** (1 / power), np.ones_like(x), math.inf, None
    values = root
    for _ in range(500):
        slope = sum(values**j * root ** (power - 1 - j) for j in range(power)) * scale  # error of the power by its root
        polynomial = np.polynomial.Polynomial.fit(x, root, 4, w=np.sqrt(weight) * np.abs(slope))
        values = polynomial(x)
        error = np.abs(values**power - wanted) * scale
        if error.max() < best:
            best, found = error.max(), polynomial
        weight = weight * (error / error.max() + 0.01)
        weight /= weight.mean()
    c0, c1, c2, c3, q = found.convert().coef
    h = c3 / (4 * q)
    k = c2 / (2 * q) - 3 * h * h
    return [float(v) for v in (q, h, k, c1 - 4 * q * h * (h * h + k), c0 - q * (h * h + k) ** 2)], float(best)


def _group(operation: Operation) -> str:
    key = operation.part if operation.part == "vocabulary projection" else operation.name
    return next(group for group, names in GROUPS.items() if key in names)


def _fit(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Non-negative least squares of the relative error."""
    from scipy.optimize import nnls

    return nnls(counts / values[:, None], np.ones(len(values)))[0]


def main() -> None:
    """Old prices: its own for what it multiplies; linear layers, whose bytes are the same in both, from today's."""
    names = {method: prices_name(method) for method in METHODS}
    old, *records = (
        json.loads((DATA / "private_inference" / f"measured-{name}.json").read_text())
        for name in ("spu-0.9.2b0-cheetah", *names.values())
    )
    records = dict(zip(METHODS, records, strict=True))
    fitted = fit_methods(records)
    new = fitted["as given"]
    older = {quantity: dict(prices) for quantity, prices in new.items()}
    shared = ("linear", "embed", "scores", "mix")
    older = {quantity: {n: p for n, p in prices.items() if n in shared} for quantity, prices in older.items()}
    for entry in old["operations"].values():
        price = entry["bytes"] / math.prod(entry["shape"])
        older["bytes"][entry["operation"]] = {"element": float(f"{price:.5g}")}
    by_name = {
        names[method]: {
            "source": f"measured: {record['command']}; {record['engine']}, {record['machine']}",
            "method": method, **fitted[method],
        }
        for method, record in records.items()
    }  # fmt: skip
    by_name |= {
        "spu-0.9.2b0-cheetah": {
            "source": f"measured: {old['engine']}, nonlinear operations at T=128; linear ones as on 0.9.5, whose bytes "
            "are the same (QKᵀ and AV checked); bytes only",
            **older, "seconds": {}, "rounds": {},
        },
        "paper": {
            "source": "fitted to Tables 3, 4, 7 and 8 of arXiv:2501.03489v2: one factor a group on the prices of "
            "spu-0.9.2b0-cheetah, and minutes a GB for each group; minutes include the paper's network",
            **fit_paper(older["bytes"]),
        },
    }  # fmt: skip
    PRICE_FILES.mkdir(parents=True, exist_ok=True)
    for name, fitted_prices in by_name.items():
        fitted_prices["includes_network"] = name == "paper"
        text = json.dumps(fitted_prices, indent=1, ensure_ascii=False)
        (PRICE_FILES / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
