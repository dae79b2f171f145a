"""Every benchmark, one after the other, into benchmarks/results: hours on two cores.

Run: python benchmarks/all.py [--data DIR] [--work DIR] [--peer DIR] [--list]

Without ``--data`` only those run that need no outside text. DIR holds ``wikitext2/wiki.test.part1.raw``, plain books
in ``books/*.txt`` and the recall tasks of SirLLM in ``dialogue/*.jsonl``. ``--work`` keeps what interrupted runs need
to go on, ``--peer`` names a folder with pytorch_optimizer 4.1.0.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ALONE = (
    "trellis.py",
    "cla.py size",
    "cla.py speed",
    "cla_scratch.py --work {work}/cla_scratch",
    "buckets.py quality --work {work}/buckets",
    "buckets.py speed",
    "buckets.py overhead",
    "buckets.py control --work {work}/buckets",
    "buckets_compile.py",
    "fadam.py step",
    "fadam.py convergence",
    "fadam.py convergence --layers 1 --length 32 --batch 16 --steps 1200 --learning-rates 1.5e-3 3e-3 6e-3 1.2e-2 "
    "--beta2s 0.95 0.99 --suffix _one_layer --vary",
    "fadam.py updates --layers 1 --length 32 --batch 16 --steps 1200 --suffix _one_layer",
    "fadam.py spike",
    "spo.py --work {work}/spo",
    "adpo.py --work {work}/adpo",
    "adpo_style.py --work {work}/adpo_style",
    "preference.py",
    "reallm_block.py",
    "reallm_speed.py",
)
WITH_DATA = (
    "sirllm.py stream --text {wikitext} --states {work}/sirllm",
    "sirllm.py speed --text {wikitext} --states {work}/sirllm",
    "sirllm.py grocery --data {data}/dialogue/grocery.jsonl",
    "sirllm.py reply --data {data}/dialogue/dailydialog.jsonl --decay 0.7",
    "sirllm.py games --data {games} --decay 0.9",
    "caches.py bytes --data {wikitext}",
    "caches.py speed --data {wikitext} --tokens 4096",
    "caches.py quality --data {wikitext}",
    "caches.py quality --data {wikitext} --prompt 2048 --keys 0",
    "caches.py quality --data {wikitext} --prompt 4096 --keys 0 --windows 4",
    "caches.py plot",
    "caches_cla.py --data {wikitext} --train {books}",
    "cla_conversion.py --train {books} --test {wikitext} --work {work}/cla",
    "cla_heal.py --train {books} pydoc --test {wikitext} --work {work}/cla_heal --consumers 6 --sampled-seeds 11 12 "
    "--learning-rate 1e-3 --tokens 98304",
    "cla_heal.py --train {books} pydoc --test {wikitext} --work {work}/cla_heal_more --consumers 10 15 "
    "--sampled-seeds 11 12 --learning-rate 1e-3 --tokens 16384 --suffix _more_layers",
    "cla_heal.py --train {wikitext} --test {wikitext} --work {work}/cla_heal_own --consumers 6 --text-tokens 98304 "
    "--learning-rate 1e-3 --tokens 98304 --suffix _own_domain",
    "reallm_layers.py --calibration {data}/books --text {wikitext}",
    "reallm.py --calibration {data}/books --text {wikitext} pydoc {data}/gsm8k/test300.jsonl --work {work}/reallm",
    "reallm.py --calibration {data}/books --text {wikitext} pydoc {data}/gsm8k/test300.jsonl --calibration-windows 16 "
    "--calibration-length 512 --own-windows 32 --own-seed 12 --own-batch 64 --report reallm_quality "
    "--only float32 reallm-4 reallm-3 reallm-2 --work {work}/reallm_quality",
    "reallm_heal.py --base {work}/reallm_quality/reallm-3 {work}/reallm_quality/reallm-2 --train {data}/books "
    "--text {wikitext} pydoc {data}/gsm8k/test300.jsonl --steps 320 --work {work}/reallm_heal",
)
WITH_PEER = ("fadam.py parity --peer {peer}",)


def commands(options: argparse.Namespace) -> list[list[str]]:
    """The arguments of every benchmark that can run with these options."""
    chosen = ALONE + (WITH_DATA if options.data else ()) + (WITH_PEER if options.peer else ())
    data = options.data or Path()
    one = {
        "work": options.work,
        "data": data,
        "peer": options.peer,
        "wikitext": data / "wikitext2/wiki.test.part1.raw",
    }
    many = {
        "{books}": sorted(data.glob("books/*.txt")),
        "{games}": sorted(data.glob("dialogue/rock_paper_scissors_*.jsonl")),
    }
    return [[str(part) for word in line.split() for part in many.get(word) or [word.format(**one)]] for line in chosen]


def main() -> int:
    """Run them all; a failure is told at the end and stops nothing else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    options = parser.parse_args()
    here = Path(__file__).parent
    failed = []
    for command in commands(options):
        print("benchmarks/" + " ".join(command), flush=True)
        if not options.list and subprocess.run([sys.executable, here / command[0], *command[1:]]).returncode != 0:
            failed.append(" ".join(command))
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
