#!/usr/bin/env python3
"""Where the time of a decode step goes: kernels, waiting, copies, the operating system, the rest.

    bench/share.py -b build -m MODEL.gguf [-d DEPTH] [-a POLICY] [-t THREADS] [-n TOKENS] [-r REPETITIONS] [--top N]

Runs `quarry bench` under `perf record` and sorts the samples by symbol. A symbol belongs to the source file whose object in the build folder defines it:
src/math is kernels, src/base/threads.c is waiting and claiming, the other rooms are the forward pass around them. Only samples of the timed decode steps
count: bench tells how long they took, and they are the last thing it does. What a thread sleeps gives no samples; it is what is missing of all threads' time."""
import argparse
import collections
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

FREQUENCY = 999
FAMILIES = [("matmul", "matrix products"), ("blocks", "matrix products"), ("attention", "attention"), ("retrieval", "retrieval"), ("vector", "vectors")]
ORDER = ["matrix products", "attention", "retrieval", "vectors", "waiting and claiming", "asleep", "forward pass", "copies", "system", "other"]
KERNELS = {name for _, name in FAMILIES}


def class_of_file(path):
    room, _, file = path.partition("/")
    if room == "math":
        return next((name for prefix, name in FAMILIES if file.startswith(prefix)), "other")
    if path == "base/threads.c":
        return "waiting and claiming"
    return "forward pass" if room in ("model", "attn", "kv", "gen", "base", "vq") else "other"


def symbol_classes(build):
    """symbol -> class, from the objects; of a name in several files the kernel wins."""
    classes = {}
    root = build / "CMakeFiles/quarry_objects.dir/src"
    for path in sorted(root.rglob("*.o")):
        name = class_of_file(str(path.relative_to(root)).removesuffix(".o"))
        table = subprocess.run(["nm", "--defined-only", path], text=True, capture_output=True, check=True).stdout
        for line in table.splitlines():
            fields = line.split()
            if fields[1] in "tT" and (fields[2] not in classes or name in KERNELS):
                classes[fields[2]] = name
    if not classes:
        sys.exit(f"share.py: {root} has no objects; build quarry first and name the folder with -b")
    return classes


def classify(symbol, dso, classes):
    base = re.sub(r"\.(part|constprop|isra|cold)\b.*", "", symbol)
    if "kernel" in dso or dso.startswith("[k"):
        return "system"
    if base in classes and "quarry" in dso:
        return classes[base]
    if re.search(r"mem(cpy|move|set)", base):
        return "copies"
    return "waiting and claiming" if "yield" in base else "other"


def record(options, data):
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(FREQUENCY), "-o", str(data), str(options.build / "quarry"), "bench", "-q",
               "-m", options.model, "-p", "0", "-n", str(options.n), "-d", str(options.depth), "-r", str(options.repetitions),
               "-t", str(options.threads), "--attn", options.attn, "-o", "json"]
    run = subprocess.run(command, text=True, capture_output=True)
    if run.returncode != 0:
        sys.exit(f"share.py: {' '.join(command)}\n{run.stderr.strip()}")
    return json.loads(run.stdout)[-1]


def samples(data):
    """(thread, seconds, symbol, object) of each sample, in order of time."""
    text = subprocess.run(["perf", "script", "-i", str(data), "-F", "tid,time,ip,sym,dso"], text=True, capture_output=True, check=True).stdout
    pattern = re.compile(r"^\s*(\d+)\s+([\d.]+):\s+[0-9a-f]+\s+(.*?)\s+\((.*)\)\s*$")
    found = [match.groups() for match in map(pattern.match, text.splitlines()) if match]
    return sorted(((int(tid), float(time), symbol, dso) for tid, time, symbol, dso in found), key=lambda sample: sample[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-b", "--build", type=pathlib.Path, default=pathlib.Path("build"), help="build folder (default: build)")
    parser.add_argument("-m", "--model", required=True, help="model in GGUF format")
    parser.add_argument("-d", "--depth", type=int, default=0, help="tokens in the cache before (default: 0)")
    parser.add_argument("-a", "--attn", default="full", help="retrieval policy (default: full)")
    parser.add_argument("-t", "--threads", type=int, default=0, help="threads (default: one per core)")
    parser.add_argument("-n", type=int, default=64, help="tokens per repetition (default: 64)")
    parser.add_argument("-r", "--repetitions", type=int, default=40, help="repetitions (default: 40)")
    parser.add_argument("--top", type=int, default=0, help="also list so many symbols outside kernels")
    options = parser.parse_args()
    if not shutil.which("perf"):
        sys.exit("share.py: perf is missing; on Debian: apt-get install linux-perf (Ubuntu: linux-tools-generic)")
    classes = symbol_classes(options.build)
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "perf.data"
        result = record(options, data)
        found = samples(data)
    if not found:
        sys.exit("share.py: perf took no samples; /proc/sys/kernel/perf_event_paranoid must be 2 or less")
    seconds = sum(result["n_gen"] / rate for rate in result["samples_ts"])
    end = max(time for _, time, symbol, dso in found if classify(symbol, dso, classes) in KERNELS)
    timed = [sample for sample in found if end - seconds < sample[1] <= end]
    main_thread = found[0][0]
    counts, symbols = collections.Counter(), collections.Counter()
    by_main = collections.Counter()
    for tid, _, symbol, dso in timed:
        name = classify(symbol, dso, classes)
        counts[name] += 1
        by_main[name] += tid == main_thread
        if name not in KERNELS:
            symbols[(name, symbol, "caller" if tid == main_thread else "workers")] += 1
    threads = result["n_threads"]
    total = max(FREQUENCY * seconds * threads, len(timed))
    counts["asleep"] = total - len(timed)
    print(f"{result['model']} {result['quantization']}, {result['isa']}, {threads} threads, {result['attn']}, depth {result['n_depth']}, "
          f"{result['avg_ts']:.1f} ± {result['stddev_ts']:.1f} tokens/s, {len(timed)} samples\n")
    print("| time in | share | of it, the calling thread |\n| :-- | --: | --: |")
    for name in ORDER:
        if counts[name]:
            print(f"| {name} | {100 * counts[name] / total:.1f} % | {100 * by_main[name] / total:.1f} % |")
    outside = total - sum(counts[name] for name in KERNELS)
    print(f"| **outside kernels** | **{100 * outside / total:.1f} %** | |")
    if options.top:
        print("\n| outside kernels | symbol | threads | share |\n| :-- | :-- | :-- | --: |")
        for (name, symbol, who), count in symbols.most_common(options.top):
            print(f"| {name} | {symbol} | {who} | {100 * count / total:.2f} % |")


if __name__ == "__main__":
    main()
