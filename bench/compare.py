#!/usr/bin/env python3
"""quarry and llama.cpp side by side on this machine: the runs alternate, and the spread is printed beside every median.

llama-bench is built for this processor from the source that scripts/fetch-llama.sh fetches, once, into the cache; it runs with
flash attention. Both programs get the same GGUF, threads, and tests (prompt tokens, generated tokens, tokens already in the
cache)."""
import argparse
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# name, prompt tokens, generated tokens, depth, repetitions within a run, quarry's retrieval policies
Line = collections.namedtuple("Line", "name n_prompt n_gen depth repetitions policies")


def lines(depths):
    yield Line("prefill 512 at 0", 512, 0, 0, 2, ["full"])
    yield Line("decode 64 at 0", 0, 64, 0, 2, ["full"])
    for depth in depths:
        yield Line(f"decode 32 at {depth:,}", 0, 32, depth, 1, ["ivfpq", "full"])


def run(command, quiet=False):
    result = subprocess.run([str(part) for part in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None)
    if result.returncode != 0:
        sys.exit(f"compare.py: failed ({result.returncode}): {' '.join(map(str, command))}\n{(result.stderr or '').strip()[-2000:]}")
    return result.stdout


def build_peer(n_threads):
    """Returns the path of a llama-bench built for this machine."""
    source = pathlib.Path(run([ROOT / "scripts/fetch-llama.sh"]).strip())
    build = source.with_name(source.name + "-build")
    program = build / "bin/llama-bench"
    if not program.exists():
        print("building llama-bench (once, some minutes)", file=sys.stderr)
        off = [f"-D{name}=OFF" for name in ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER")]
        run(["cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *off], quiet=True)
        run(["cmake", "--build", build, "--target", "llama-bench", "--parallel", n_threads], quiet=True)
    return program


def measure(program, line, options, arguments):
    """One run of a program: for each policy (llama-bench has none: "") the tokens per second of its repetitions."""
    command = [program, *options, "-m", arguments.model, "-t", arguments.threads, "-p", line.n_prompt, "-n", line.n_gen, "-d", line.depth]
    result = json.loads(run([*command, "-r", line.repetitions, "-o", "json"], quiet=True))
    tests = [t for t in result if (t["n_prompt"], t["n_gen"], t["n_depth"]) == (line.n_prompt, line.n_gen, line.depth)]
    if not tests:
        sys.exit(f"compare.py: {program} printed no result for {line.name}")
    return {t.get("attn", ""): t.get("samples_ts") or [t["avg_ts"]] for t in tests}


def processor():
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    field = lambda name: next((l.split(":", 1)[1].strip() for l in text.split("\n") if l.startswith(name)), "unknown")
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16")
    return field("model name"), [name for name in wanted if name in field("flags").split()]


def spread(samples):
    return f"{statistics.median(samples):.1f} ({min(samples):.1f}-{max(samples):.1f})"


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("-m", "--model", required=True, help="GGUF file")
    parse.add_argument("--quarry", default=ROOT / "build/quarry", help="the program (default: build/quarry)")
    parse.add_argument("--peer", help="a llama-bench that is already built")
    parse.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parse.add_argument("-r", "--rounds", type=int, default=3, help="how often the programs alternate (default: 3)")
    parse.add_argument("-d", "--depth", type=int, action="append", help="depths for decoding (default: 7600)")
    arguments = parse.parse_args()
    peer = arguments.peer or build_peer(arguments.threads)

    name, isa = processor()
    print(f"{name}, {arguments.threads} threads, {' '.join(isa) or 'no AVX2'}; {pathlib.Path(arguments.model).name}")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"NOTE: load average {load:.1f} before the first run: other programs take part of the processor, which hits programs unequally")
    print(f"tokens/s: median (min-max) of {arguments.rounds} alternating rounds\n")
    print("| test | policy | quarry | llama.cpp -fa 1 | ratio |\n|---|---|---|---|---|")
    for line in lines(arguments.depth or [7600]):
        ours, theirs = collections.defaultdict(list), []
        for _ in range(arguments.rounds):
            for policy, samples in measure(arguments.quarry, line, ["bench", "--attn", ",".join(line.policies)], arguments).items():
                ours[policy] += samples
            theirs += measure(peer, line, ["-fa", "1"], arguments)[""]
        for policy, samples in ours.items():
            ratio = statistics.median(samples) / statistics.median(theirs)
            print(f"| {line.name} | {policy} | {spread(samples)} | {spread(theirs)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
