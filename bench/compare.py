#!/usr/bin/env python3
"""quarry and llama.cpp side by side on this machine: runs alternate, and every ratio stands beside its spread and its floor.

llama.cpp is built for this processor from the source that scripts/fetch-llama.sh fetches, once, into the cache, and runs in the setting
(flash attention, type of its cache, micro-batch) that a first look at the machine finds quickest. Both programs get the same GGUF, the
same threads and the same tests. Lines of one group share their runs: each program fills a depth once per round."""
import argparse
import collections
import json
import os
import pathlib
import statistics
import sys
import time

import programs

# A ratio is quarry's speed over llama.cpp's; floors and aims are for processors with AVX-512 VNNI and for those with AVX2 only.
Line = collections.namedtuple("Line", "name test policy unit avx512 avx2", defaults=("tokens/s", None, None))
# measure(quarry) and measure(llama) return {test: [samples]}, quarry's tests with their policy
Group = collections.namedtuple("Group", "name rounds quarry llama lines")

SETTINGS = ("-fa 1", "-fa 0", "-fa 1 -ctk q8_0 -ctv q8_0", "-fa 1 -ub 2048")
DEFAULT = "ivfpq"
BOTH = (DEFAULT, "full")
LOWER_IS_BETTER = ("ms", "MiB")


def decode_group(depth, rounds, floors):
    return Group(f"depth{depth}", rounds, lambda q: q.bench(gens=[32], depth=depth, repetitions=3)[0],
                 lambda l: l.bench(gens=[32], depth=depth, repetitions=3),
                 [Line(f"tg32 at {depth:,}", ("tg", 32, depth, 1), DEFAULT, "tokens/s", *floors)])


def groups():
    """In the order of the table. rounds: at most so many, where the peer takes minutes to fill the depth."""
    prompt = ("pp", 512, 0, 1)
    yield Group("start", None, lambda q: {("start", 10, 0, 1, DEFAULT): [q.first_token() for _ in range(3)]},
                lambda l: {("start", 10, 0, 1): [l.first_token() for _ in range(3)]},
                [Line("load, first token of 10", ("start", 10, 0, 1), DEFAULT, "ms", (1.0, 2.0), (1.0, 2.0))])
    yield Group("depth0", None, lambda q: q.bench([512], [64], repetitions=3, policies=BOTH)[0], lambda l: l.bench([512], [64], repetitions=3),
                [Line("pp512 at 0", prompt, DEFAULT, "tokens/s", (1.5, 3.0), (1.0, 1.5)),
                 Line("pp512 at 0", prompt, "full"),
                 Line("tg64 at 0", ("tg", 64, 0, 1), DEFAULT, "tokens/s", (1.2, 1.6), (1.0, 1.3))])
    yield Group("read", 2, lambda q: q.bench(reads=[7700])[0], lambda l: l.bench([7700]),
                [Line("reading 7,700", ("read", 7700, 0, 1), DEFAULT, "tokens/s", (2.0, 3.5), (1.3, 2.5))])
    yield Group("depth4096", None, lambda q: q.bench([512], depth=4096, repetitions=2)[0],
                lambda l: l.bench([512], depth=4096, repetitions=2),
                [Line("pp512 at 4,096", ("pp", 512, 4096, 1), DEFAULT, "tokens/s", (2.0, 3.5), (1.5, 3.0))])
    yield Group("depth7600", None, lambda q: q.bench([512], [32], 7600, questions=[16], repetitions=3, policies=BOTH)[0],
                lambda l: l.bench([512, 16], [32], 7600, repetitions=3),
                [Line("pp512 at 7,600", ("pp", 512, 7600, 1), DEFAULT, "tokens/s", (2.0, 3.5), (1.5, 3.0)),
                 Line("first token, question of 16 at 7,600", ("ttft", 16, 7600, 1), DEFAULT, "ms"),
                 Line("tg32 at 7,600", ("tg", 32, 7600, 1), "full", "tokens/s", (1.8, 2.2), (3.0, 5.0)),
                 Line("tg32 at 7,600", ("tg", 32, 7600, 1), DEFAULT, "tokens/s", (3.5, 5.0), (6.0, 10.0))])
    yield decode_group(16384, 2, [(6.0, 9.0), (8.0, 14.0)])
    yield Group("batch8", 2, lambda q: q.bench(gens=[32], depth=4096, parallel=8, repetitions=3)[0], lambda l: l.batched(4096, 32, 8)[0],
                [Line("tg32 x 8 at 4,096", ("tg", 32, 4096, 8), DEFAULT, "tokens/s", (6.0, 14.0), (6.0, 12.0))])
    yield Group("memory", 1, lambda q: {("peak", 7600, 0, 1, policy): [q.memory(7600, policy)] for policy in BOTH},
                lambda l: {("peak", 7600, 0, 1): [l.memory(7600)]},
                [Line("memory at 7,600", ("peak", 7600, 0, 1), "full", "MiB", (1.0, 1.0), (1.0, 1.0)),
                 Line("memory at 7,600, with the index", ("peak", 7600, 0, 1), DEFAULT, "MiB")])
    yield decode_group(32768, 1, [(8.0, 14.0), (10.0, 20.0)])


# ---- from samples to a row ----

def ratio(line, ours, theirs):
    return theirs / ours if line.unit in LOWER_IS_BETTER else ours / theirs


def summary(line, ours, theirs, isa):
    """ours, theirs: the samples of each round. The ratio is that of the medians over all rounds; its spread that of the rounds' own
    ratios, each of two runs that followed one another."""
    flat = [sample for samples in ours for sample in samples], [sample for samples in theirs for sample in samples]
    ratios = [ratio(line, statistics.median(a), statistics.median(b)) for a, b in zip(ours, theirs)]
    floor, aim = (line.avx512 if "avx512" in isa else line.avx2) or (None, None)
    return {"line": line.name, "policy": line.policy, "unit": line.unit, "quarry": ours, "llama": theirs, "ratio": ratio(line, *map(statistics.median, flat)),
            "ratios": ratios, "floor": floor, "aim": aim}


def spread(rounds):
    samples = [sample for samples in rounds for sample in samples]
    return f"{statistics.median(samples):.1f} ({min(samples):.1f}-{max(samples):.1f})"


def verdict(row):
    if row["floor"] is None:
        return ""
    return "BELOW" if row["ratio"] < row["floor"] else "floor" if row["ratio"] < row["aim"] else "aim"


def markdown(row):
    number = lambda value: "" if value is None else f"{value:g}"
    ratios = f"{row['ratio']:.2f} ({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
    cells = [row["line"], row["policy"], row["unit"], spread(row["quarry"]), spread(row["llama"]), ratios, number(row["floor"]), number(row["aim"])]
    return "| " + " | ".join([*cells, verdict(row)]) + " |"


HEADER = "| line | policy | unit | quarry | llama.cpp | ratio | floor | aim | reached |\n|---|---|---|---|---|---|---|---|---|"


def depth_costs(rows):
    """What a depth adds to the milliseconds of a token of the default policy, where the rows tell: (depth, ms)."""
    tokens = {row["line"]: statistics.median(sum(row["quarry"], [])) for row in rows if row["policy"] == DEFAULT and row["line"].startswith("tg")}
    for depth in (7600, 32768):
        if "tg64 at 0" in tokens and f"tg32 at {depth:,}" in tokens:
            yield depth, 1000 / tokens[f"tg32 at {depth:,}"] - 1000 / tokens["tg64 at 0"]


# ---- measuring ----

def measure(group, rounds, quarry, llama, note):
    """The rows of a group: rounds of a run of each program, in turn."""
    ours, theirs = collections.defaultdict(list), collections.defaultdict(list)
    rounds = min(rounds, group.rounds or rounds)
    for i in range(rounds):
        for side, subject, into in ((group.quarry, quarry, ours), (group.llama, llama, theirs)):
            note(f"{group.name}, round {i + 1} of {rounds}: {type(subject).__name__.lower()}")
            for test, samples in side(subject).items():
                into[test].append(samples)
    for line in group.lines:
        if (*line.test, line.policy) not in ours or line.test not in theirs:
            raise programs.Failure(f"no result for {line.name}, {line.policy}")
        yield summary(line, ours[(*line.test, line.policy)], theirs[line.test], quarry.isa)


def processor():
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    field = lambda name: next((l.split(":", 1)[1].strip() for l in text.split("\n") if l.startswith(name)), "unknown")
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16")
    return field("model name"), [name for name in wanted if name in field("flags").split()]


def print_head(arguments, quarry, llama, note):
    name, isa = processor()
    print(f"{name}, {arguments.threads} threads, {' '.join(isa) or 'no AVX2'}; quarry's kernels: {quarry.isa}; {pathlib.Path(arguments.model).name}\n")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"NOTE: load average {load:.1f} before the first run: other programs take part of the processor, which hits programs unequally\n")
    if arguments.setting is not None:
        llama.setting = arguments.setting.split()
    else:
        note("llama.cpp's settings")
        speeds = llama.choose_setting(4096, SETTINGS)
        print("llama.cpp, pp256 and tg16 at 4,096: " + "; ".join(f"`{s}` {pp:.0f}, {tg:.1f}" for s, (pp, tg) in speeds.items()))
    print(f"llama.cpp's setting: `{' '.join(map(str, llama.setting))}`. Median (min-max) of {arguments.rounds} alternating rounds or, where filling "
          "the depth takes minutes, fewer; ratios: quarry's speed over llama.cpp's (min-max of the rounds)\n")


def parse_arguments(arguments=None):
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [group.name for group in groups()]
    parse.add_argument("-m", "--model", required=True, help="GGUF file")
    parse.add_argument("--quarry", default=programs.ROOT / "build/quarry", help="the program (default: build/quarry)")
    parse.add_argument("--peer", help="folder of a llama-bench and llama-batched-bench that are already built")
    parse.add_argument("--setting", help="llama.cpp's flags, e.g. '-fa 1' (default: the quickest of a few)")
    parse.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parse.add_argument("-r", "--rounds", type=int, default=3, help="how often the programs alternate (default: 3)")
    parse.add_argument("-l", "--lines", help=f"only these groups of lines, by the beginnings of their names: {','.join(names)}")
    parse.add_argument("--json", help="write all samples to this file")
    result = parse.parse_args(arguments)
    if result.rounds < 1:
        parse.error("--rounds should be at least 1")
    result.groups = [g for g in groups() if result.lines is None or g.name.startswith(tuple(result.lines.split(",")))]
    if not result.groups:
        parse.error(f"--lines: '{result.lines}' begins none of {', '.join(names)}")
    return result


def main():
    arguments = parse_arguments()
    start = time.monotonic()
    note = lambda text: print(f"[{(time.monotonic() - start) / 60:5.1f} min] {text}", file=sys.stderr, flush=True)
    quarry = programs.Quarry(arguments.quarry, arguments.model, arguments.threads)
    llama = programs.Llama(arguments.peer or programs.build_peer(arguments.threads, arguments.model), arguments.model, arguments.threads)
    rows = []
    quarry.bench(gens=[1])  # tells the kernels, before minutes are spent
    print_head(arguments, quarry, llama, note)
    print(HEADER, flush=True)
    for group in arguments.groups:
        for row in measure(group, arguments.rounds, quarry, llama, note):
            rows.append(row)
            print(markdown(row), flush=True)
        if arguments.json:
            pathlib.Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print()
    for depth, ms in depth_costs(rows):
        print(f"With the default policy depth {depth:,} adds {ms:.2f} ms to a token.")


if __name__ == "__main__":
    try:
        main()
    except programs.Failure as failure:
        sys.exit(f"compare.py: {failure}")
