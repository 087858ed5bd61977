#!/usr/bin/env python3
"""Writes fuzz/corpus/piece: small stored contexts of tiny random models.

    make_piece_seeds.py BUILD_FOLDER

BUILD_FOLDER/tiny holds the models that ctest makes (make_tiny_models.py).
"""
import pathlib
import shutil
import subprocess
import sys
import tempfile

SEEDS = pathlib.Path(__file__).resolve().parent.parent / "fuzz" / "corpus" / "piece"
KINDS = {"llama": ("llama-f32.gguf", 14), "gemma": ("gemma3-f32.gguf", 14)}


def main():
    build = pathlib.Path(sys.argv[1])
    SEEDS.mkdir(parents=True, exist_ok=True)
    for name, (model, sentences) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            text = pathlib.Path(folder) / "a.txt"
            text.write_text("".join(f"The {a} is by the sea. " for a in "house road hill door lamp boat net bell gull rope sail crab pier buoy".split()[:sentences]))
            subprocess.run([build / "quarry", "context", "create", "-q", "-t", "1", "-m", build / "tiny" / model, "--attn", "ivfpq:segment=128", "--store", folder, "--doc", text], check=True)
            shutil.copyfile(next(pathlib.Path(folder).glob("*.piece")), SEEDS / name)


if __name__ == "__main__":
    main()
