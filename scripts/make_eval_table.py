#!/usr/bin/env python3
"""Writes tests/data/eval_table.json: what eval kld prints of every policy on a tiny random model.

    make_eval_table.py BUILD_FOLDER [--compare]

tests/test_eval_table.py holds every later build and instruction set against it, so run this when a policy is added or is meant to give other figures, and say in
the commit why. --compare prints instead by how much each instruction set of this machine differs: what TOLERANCES were chosen from.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "data" / "eval_table.json"
MODEL = "llama-f32.gguf"
# Instruction sets in ascending order, as in src/base/cpu.c.
LEVELS = ["scalar", "avx2", "avx512", "avx512vnni", "avx512bf16"]
# Policies that cannot run without more than their name: hashing as much as published takes sanitizers minutes; a2ats needs a codebook, which is made first, of other text.
SPECS = {"magicpig": "magicpig:bits=6,tables=40", "a2ats": "a2ats:codebook=codebook,budget=0.1"}
FURTHER = ["ivfpq:budget=0.1", "ivfpq:tail=0"]

# Largest difference: relative part, absolute part. About three times what --compare finds between instruction sets (KLD 1.9 %, dNLL 0.017, top-1 0.042,
# perplexity 1.7 %, mass 0.0004, recall 0.0026: k-means that falls otherwise; what is read is the same); the model is random, so its predictions hang on roundings more than a real one's.
TOLERANCES = {
    "kld": (0.06, 1e-6),
    "dnll": (0, 0.05),
    "top1": (0, 0.12),
    "perplexity": (0.05, 0),
    "mass": (0, 0.0015),
    "recall": (0, 0.008),
    "rows": (0.005, 0),
    "index": (0.005, 0),
    "tables": (0.005, 0),
    "tail": (0.005, 0),
}


def text():
    """Sentences that are all different, about 3,000 tokens."""
    who = ["The miller", "Her sister", "An old sailor", "The gardener", "Our teacher", "A traveller", "The captain"]
    did = ["walked down to", "wrote a letter about", "had long forgotten", "could not stop talking of", "sat quietly near"]
    what = ["the river", "the church on the hill", "the winter market", "a house with green doors"]
    return "".join(f"{who[i % 7]} {did[i % 5]} {what[i // 5 % 4]}." + ("\n" if i % 6 == 5 else " ") for i in range(140))


def names(quarry):
    listed = json.loads(subprocess.run([quarry, "info", "--attn", "--json"], check=True, capture_output=True).stdout)
    return [policy["name"] for policy in listed["policies"] if policy["name"] != "full"]


def measure(quarry, model, isa=None):
    """The output of eval kld, as printed."""
    quarry, model = pathlib.Path(quarry).resolve(), pathlib.Path(model).resolve()
    specs = [SPECS.get(name, name) for name in names(quarry)]
    flags = [word for spec in specs + FURTHER for word in ("--attn", spec)]
    with tempfile.TemporaryDirectory() as folder:
        for name, words in (("text", text()), ("other", " ".join(reversed(text().split())))):
            (pathlib.Path(folder) / name).write_text(words, encoding="utf-8")
        environment = dict(os.environ, **({"QUARRY_ISA": isa} if isa else {}))
        run = dict(cwd=folder, env=environment, capture_output=True, text=True)
        calibrate = [quarry, "calibrate", "-m", model, "-f", "other", "-o", "codebook", "--tokens", "600", "--random", "100", "--centroids", "64"]
        command = [quarry, "eval", "kld", "-q", "--json", "--task", "both", "--audit", "-m", model, "-d", "700", "-n", "32", "--samples", "3", "--needles", "4"]
        for step in (calibrate, command + flags + ["-f", "text"]):
            result = subprocess.run(step, **run)
            if result.returncode:
                raise RuntimeError(result.stderr.strip())
    return json.loads(result.stdout)


def rows(printed):
    """{"prose ivfpq": {"kld": …}}"""
    table = {}
    for r in printed["results"]:
        reading = r["reading"]
        row = dict(kld=r["kld"]["mean"], dnll=r["dnll"]["mean"], top1=r["top1_agreement"], perplexity=r["perplexity"], mass=r["mass"], recall=r["recall"],
                   rows=reading["rows_share"], index=reading["index_share"], tables=reading["tables_share"], tail=reading["tail_share"])
        table[f"{r['task']} {r['attn']}"] = {key: value if value is None else float(f"{value:.6g}") for key, value in row.items()}
    return table


def difference(key, stored, here):
    """(difference, allowed); None is equal to None only."""
    if stored is None or here is None:
        return (0, 0) if stored is here else (float("inf"), 0)
    relative, absolute = TOLERANCES[key]
    return abs(here - stored), relative * abs(stored) + absolute


def levels(printed):
    """Those up to the one this machine has."""
    return LEVELS[: LEVELS.index(printed["isa"]) + 1] if printed["isa"] in LEVELS else [printed["isa"]]


def main():
    build = pathlib.Path(sys.argv[1])
    quarry, model = build / "quarry", build / "tiny" / MODEL
    printed = measure(quarry, model)
    if "--compare" in sys.argv:
        base, worst = rows(measure(quarry, model, "scalar")), {}
        for isa in levels(printed):
            for name, row in rows(measure(quarry, model, isa)).items():
                for key, value in row.items():
                    d, _ = difference(key, base[name][key], value)
                    relative = d / abs(base[name][key]) if base[name][key] else d
                    worst.setdefault(key, []).append((relative if TOLERANCES[key][0] else d, isa, name))
        for key, found in worst.items():
            print(key, "relative" if TOLERANCES[key][0] else "absolute", *max(found))
        return
    stored = {"model": printed["model"]["digest"], "line": printed["line"], "isa": printed["isa"], "rows": rows(printed)}
    TABLE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
