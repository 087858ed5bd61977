"""The programs that compare.py measures: how they are built and run, and what their results mean.

A run returns {test: [samples]}. A test is a tuple, the same for both programs: (kind, tokens, depth, sequences), for quarry with the
policy behind it; kinds are those of `quarry bench`. Samples are tokens per second, but where a line says otherwise."""
import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEN_TOKENS = "The keeper of the lighthouse walked along the shore."
PEER_TARGETS = ("llama-bench", "llama-batched-bench")

Finished = collections.namedtuple("Finished", "output seconds peak_bytes")


class Failure(Exception):
    pass


def run(command):
    """Runs a program to its end: its standard output, wall time, and most memory held at once."""
    command = [str(part) for part in command]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process:
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - start
        if process.returncode != 0:
            errors.seek(0)
            raise Failure(f"failed ({process.returncode}): {' '.join(command)}\n{errors.read().strip()[-2000:]}")
    return Finished(output, seconds, usage.ru_maxrss * 1024)


def compile_peer(source, build, n_threads, flags):
    if not all((build / "bin" / target).exists() for target in PEER_TARGETS):
        print("building llama.cpp's benchmarks (once, some minutes)", file=sys.stderr)
        off = [f"-D{name}=OFF" for name in ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER")]
        flags = [f"-DCMAKE_{language}_FLAGS={flags}" for language in ("C", "CXX")]
        run(["cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *off, *flags])
        run(["cmake", "--build", build, "--parallel", n_threads, "--target", *PEER_TARGETS])
    return build / "bin"


def build_peer(n_threads, model):
    """Builds llama.cpp for this machine, once, beside its source in the cache; returns the folder of its programs."""
    fetched = subprocess.run([ROOT / "scripts/fetch-llama.sh"], text=True, stdout=subprocess.PIPE, check=False)
    if fetched.returncode != 0:
        raise Failure("scripts/fetch-llama.sh could not fetch llama.cpp's source")
    source = pathlib.Path(fetched.stdout.strip())
    programs = compile_peer(source, source.with_name(source.name + "-build"), n_threads, "")
    probe = subprocess.run([programs / "llama-bench", "-m", model, "-p", "16", "-n", "0", "-r", "1"], capture_output=True, check=False)
    if probe.returncode not in (-signal.SIGILL, -signal.SIGSEGV) or "amx_tile" not in pathlib.Path("/proc/cpuinfo").read_text(encoding="ascii"):
        return programs
    print("llama.cpp crashes in this machine's AMX, which a virtual machine may name and not run: taking a build without it", file=sys.stderr)
    return compile_peer(source, source.with_name(source.name + "-build-noamx"), n_threads, "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16")


# ---- what they print ----

def parse_quarry(text):
    """`quarry bench -o json`; ttft in milliseconds."""
    tests = {}
    for t in json.loads(text):
        samples = [ns / 1e6 for ns in t["samples_ns"]] if t["test"] == "ttft" else t["samples_ts"]
        tests[t["test"], t["n_prompt"] or t["n_gen"], t["n_depth"], t["n_parallel"], t["attn"]] = samples
    return tests


def parse_llama_bench(text):
    """`llama-bench -o json`. What answers a question is its pp: after the question's tokens the first token of the answer is known. Hence
    every pp is given as ttft, in milliseconds, too; and one at depth 0 is a document read."""
    tests = {}
    for t in json.loads(text):
        if t["n_prompt"] and t["n_gen"]:
            continue
        kind, n, depth = ("pp", t["n_prompt"], t["n_depth"]) if t["n_prompt"] else ("tg", t["n_gen"], t["n_depth"])
        tests[kind, n, depth, 1] = t["samples_ts"]
        if kind == "pp":
            tests["ttft", n, depth, 1] = [ns / 1e6 for ns in t["samples_ns"]]
        if kind == "pp" and depth == 0:
            tests["read", n, 0, 1] = t["samples_ts"]
    return tests


def parse_llama_batched(text):
    """`llama-batched-bench --output-format jsonl`."""
    tests = {}
    for line in text.split("\n"):
        if line.startswith("{"):
            t = json.loads(line)
            tests["tg", t["tg"], t["pp"], t["pl"]] = [t["speed_tg"]]
    return tests


# ---- one run of each ----

class Quarry:
    def __init__(self, program, model, n_threads):
        self.program, self.common = program, ["-m", model, "-t", n_threads]
        self.isa = ""

    def bench(self, prompts=(), gens=(), depth=0, parallel=1, reads=(), questions=(), policies=("ivfpq",), repetitions=1):
        lists = {"-p": prompts, "-n": gens, "--read": reads, "--ttft": questions}
        flags = [part for flag, numbers in lists.items() for part in (flag, ",".join(map(str, numbers)) or "0")]
        command = [self.program, "bench", "-q", *self.common, *flags, "-d", depth, "-np", parallel, "-r", repetitions, "-o", "json"]
        finished = run([*command, "--attn", ",".join(policies)])
        self.isa = json.loads(finished.output)[0]["isa"]
        return parse_quarry(finished.output), finished

    def memory(self, depth, policy):
        """The most memory held while a token is decoded after the depth."""
        return self.bench(gens=[1], depth=depth, policies=[policy])[1].peak_bytes / 2**20

    def first_token(self):
        return run([self.program, "run", "-q", *self.common, "-n", 1, "-p", TEN_TOKENS]).seconds * 1000


class Llama:
    def __init__(self, folder, model, n_threads):
        self.folder, self.common = pathlib.Path(folder), ["-m", model, "-t", n_threads]
        self.setting = ["-fa", 1]

    def bench(self, prompts=(), gens=(), depth=0, repetitions=1):
        lists = {"-p": prompts, "-n": gens}
        flags = [part for flag, numbers in lists.items() for part in (flag, ",".join(map(str, numbers)) or "0")]
        command = [self.folder / "llama-bench", *self.common, *self.setting, *flags, "-d", depth, "-r", repetitions, "-o", "json"]
        return parse_llama_bench(run(command).output)

    def batched(self, depth, n_gen, parallel):
        """The sequences' prompts are not shared, as quarry's are not."""
        finished = run([self.folder / "llama-batched-bench", *self.common, *self.setting, "-npp", depth, "-ntg", n_gen, "-npl", parallel,
                        "-c", parallel * (depth + n_gen + 256), "--output-format", "jsonl"])
        return parse_llama_batched(finished.output), finished

    def memory(self, depth):
        """Not llama-bench's, which keeps a second copy of the cache at the depth."""
        return self.batched(depth, 1, 1)[1].peak_bytes / 2**20

    def first_token(self):
        """The quickest of llama.cpp's programs from start to first token: llama-simple, which runs four threads on any machine, takes longer."""
        command = [self.folder / "llama-bench", *self.common, *self.setting, "-p", 10, "-n", 0, "-r", 1, "--no-warmup", "-o", "json"]
        return run(command).seconds * 1000

    def choose_setting(self, depth, settings):
        """Keeps the setting in which prefill and decode at a depth are quickest, by the product of both; returns what each gave."""
        speeds = {}
        for setting in settings:
            self.setting = setting.split()
            tests = self.bench(prompts=[256], gens=[16], depth=depth, repetitions=2)
            speeds[setting] = (max(tests["pp", 256, depth, 1]), max(tests["tg", 16, depth, 1]))
        self.setting = max(speeds, key=lambda name: speeds[name][0] * speeds[name][1]).split()
        return speeds
