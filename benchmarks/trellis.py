"""What the trellis leaves of a normal source, beside its like with a random table, k-means and the bound.

    python benchmarks/trellis.py [--values 32768]

The source is white and standard normal; the bound is Shannon's ``4 ** -bits``. Codebooks of k-means are learned on
another sample. The random table holds the same quantiles in an order drawn at random, as in QTIP (arXiv 2406.11235).
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _run import Report


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=2**15)
    arguments = parser.parse_args()
    from hf_ext.kernels.trellis import trellis_tables

    report = Report("trellis", vars(arguments))
    source = torch.randn(arguments.values, generator=torch.Generator().manual_seed(1))
    for bits in (1, 2, 3, 4):
        errors = {"k-means, as many weights a code as 8 bits allow": _kmeans_error(source, bits)}
        for state_bits in (8, 10, 12):
            table = trellis_tables(state_bits)[bits - 1]
            order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
            errors[f"trellis of {state_bits} bits, random table"] = _trellis_error(source, bits, table[order])
            errors[f"trellis of {state_bits} bits"] = _trellis_error(source, bits, table)
        for code, error in errors.items():
            report.row(code=code, bits=bits, squared_error=round(error, 5), of_bound=round(error * 4.0**bits, 3))
    report.save()


def _trellis_error(source: Tensor, bits: int, table: Tensor) -> float:
    from hf_ext.kernels.trellis import states_of
    from hf_ext.kernels.trellis_cpu import viterbi_compiled

    codes = viterbi_compiled(source, torch.ones_like(source), bits, table)
    if codes is None:
        raise SystemExit("This benchmark needs the compiled search; no C++ compiler was found.")
    states = states_of(codes[None], bits, len(table).bit_length() - 1)[0]
    return float((source - table[states]).square().mean())


def _kmeans_error(source: Tensor, bits: int) -> float:
    from hf_ext.quant.codebook import kmeans, nearest

    size = max(size for size in (1, 2, 4) if size * bits <= 8)
    sample = torch.randn(2**14, size, generator=torch.Generator().manual_seed(2))
    table = kmeans(sample, torch.ones_like(sample), 2 ** (size * bits), 0, 20)
    vectors = source.view(-1, size)
    return float(nearest(vectors, torch.ones_like(vectors), table)[1].mean()) / size


if __name__ == "__main__":
    main()
