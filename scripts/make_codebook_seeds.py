#!/usr/bin/env python3
"""Writes fuzz/corpus/codebook: small codebooks of a tiny random model, one of each type.

    make_codebook_seeds.py BUILD_FOLDER

BUILD_FOLDER/tiny holds the models that ctest makes (make_tiny_models.py).
"""
import pathlib
import subprocess
import sys

SEEDS = pathlib.Path(__file__).resolve().parent.parent / "fuzz" / "corpus" / "codebook"
KINDS = {"f16": ["--type", "f16"], "int8": ["--type", "int8", "--exponent", "0.5", "--shrink", "0.05"], "exact": ["--exact-rope", "--exponent", "0"]}


def main():
    build = pathlib.Path(sys.argv[1])
    SEEDS.mkdir(parents=True, exist_ok=True)
    for name, options in KINDS.items():
        subprocess.run([build / "quarry", "calibrate", "-q", "-t", "1", "-m", build / "tiny" / "llama-mha-f32.gguf", "--tokens", "0", "--random", "60",
                        "--centroids", "5", "-o", SEEDS / name, *options], check=True)


if __name__ == "__main__":
    main()
