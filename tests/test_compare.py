#!/usr/bin/env python3
"""bench/compare.py, on programs that only pretend: what it asks them for, how it pairs their results, and what it makes of them."""
import contextlib
import io
import json
import pathlib
import re
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import compare  # noqa: E402
import programs  # noqa: E402

PRETEND = """#!%s
import json, os, sys
flags = dict(zip(sys.argv, sys.argv[1:]))
with open(__file__ + ".log", "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
numbers = lambda flag: [int(n) for n in flags.get(flag, "0").split(",") if n != "0"]
depth, results = int(flags.get("-d", 0)), []
def add(kind, n, depth, policy, rate):
    results.append({"test": kind, "n_prompt": 0 if kind == "tg" else n, "n_gen": n if kind == "tg" else 0, "n_depth": depth, "isa": "%s",
                    "n_parallel": int(flags.get("-np", 1)), "attn": policy, "samples_ts": [rate], "samples_ns": [1e9 * n / rate]})
for policy in flags.get("--attn", "none").split(","):
    rate = %d * (2 if policy == "full" else 1)
    for kind, flag in (("pp", "-p"), ("tg", "-n"), ("read", "--read"), ("ttft", "--ttft")):
        for n in numbers(flag):
            add(kind, n, 0 if kind == "read" else depth, policy, rate)
print(json.dumps(results))
"""


class Compare(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def pretend(self, name, isa, rate):
        path = pathlib.Path(self.folder.name) / name
        path.write_text(PRETEND % (sys.executable, isa, rate))
        path.chmod(0o755)
        return path

    def table(self, isa, *arguments):
        quarry, llama = self.pretend("quarry", isa, 200), self.pretend("llama-bench", isa, 100)
        out, err, argv = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["compare.py", "-m", "none.gguf", "--quarry", str(quarry), "--peer", self.folder.name, *arguments]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                compare.main()
        finally:
            sys.argv = argv
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.getvalue().splitlines() if line.startswith("|")]
        return out.getvalue(), rows[2:], (quarry.with_suffix(".log").read_text().splitlines(), llama.with_suffix(".log").read_text().splitlines())

    def test_speeds_and_times_of_a_group_become_ratios_beside_their_floors(self):
        _, rows, (ours, theirs) = self.table("avx512vnni", "--setting", "-fa 1", "-r", "2", "-l", "depth7600")
        found = [(row[0], row[1], row[5], row[6], row[7], row[8]) for row in rows]
        self.assertEqual(found, [("pp512 at 7,600", "ivfpq", "2.00 (2.00-2.00)", "2", "3.5", "floor"),
                                 ("first token, question of 16 at 7,600", "ivfpq", "2.00 (2.00-2.00)", "", "", ""),
                                 ("tg32 at 7,600", "full", "4.00 (4.00-4.00)", "1.8", "2.2", "aim"),
                                 ("tg32 at 7,600", "ivfpq", "2.00 (2.00-2.00)", "3.5", "5", "BELOW")])
        self.assertEqual(rows[1][3:5], ["80.0 (80.0-80.0)", "160.0 (160.0-160.0)"])
        self.assertEqual(sum("-d 7600" in line for line in ours), 2)
        self.assertEqual(sum("-d 7600" in line and "-fa 1" in line for line in theirs), 2)

    def test_floors_are_those_of_the_kernels(self):
        self.assertEqual([row[6:] for row in self.table("avx2", "--setting", "", "-r", "1", "-l", "depth16")[1]], [["8", "14", "BELOW"]])

    def test_the_quickest_setting_is_the_peers(self):
        text, _, (_, theirs) = self.table("avx2", "-r", "1", "-l", "read")
        for setting in compare.SETTINGS:
            self.assertTrue(any(setting in line and "-d 4096" in line for line in theirs), setting)
        self.assertIn(f"setting: `{compare.SETTINGS[0]}`", text)
        self.assertIn(compare.SETTINGS[0], theirs[-1])

    def test_what_a_depth_costs_is_told(self):
        text = self.table("avx2", "--setting", "", "-r", "1", "-l", "depth0,depth7600")[0]
        self.assertIn("depth 7,600 adds 0.00 ms to a token", text)

    def test_samples_are_kept(self):
        path = pathlib.Path(self.folder.name) / "samples.json"
        self.table("avx2", "--setting", "", "-r", "3", "-l", "read", "--json", str(path))
        row, = json.loads(path.read_text())
        self.assertEqual((row["quarry"], row["llama"], row["ratios"]), ([[200]] * 2, [[100]] * 2, [2, 2]))

    def test_a_ratio_is_of_medians_and_its_spread_of_rounds(self):
        line = compare.Line("tg", ("tg", 1, 0, 1), "full", "tokens/s", (1.5, 3.0), (1.0, 2.0))
        row = compare.summary(line, [[10, 11, 12], [30, 31, 29]], [[10], [10]], "avx512vnni")
        self.assertEqual((row["ratio"], row["ratios"], row["floor"]), (2.05, [1.1, 3.0], 1.5))
        time = compare.summary(line._replace(unit="ms"), [[10]], [[30]], "avx2")
        self.assertEqual((time["ratio"], time["floor"], compare.verdict(time)), (3.0, 1.0, "aim"))

    def test_batches_of_the_peer_are_read(self):
        text = '\n{"pp": 4096, "tg": 32, "pl": 8, "speed_tg": 101.5, "speed_pp": 1}\nend\n'
        self.assertEqual(programs.parse_llama_batched(text), {("tg", 32, 4096, 8): [101.5]})

    def test_a_program_that_fails_is_named_with_its_last_words(self):
        with self.assertRaisesRegex(programs.Failure, r"failed \(3\): sh .*\nlast words"):
            programs.run(["sh", "-c", "echo last words >&2; exit 3"])

    def test_memory_and_time_are_those_of_the_program(self):
        hold = programs.run([sys.executable, "-c", "import time; x = b'x' * (200 << 20); time.sleep(0.2)"])
        self.assertGreater(hold.peak_bytes, 200 << 20)
        self.assertGreaterEqual(hold.seconds, 0.2)

    def test_every_line_has_a_result_in_its_group(self):
        """The groups' lambdas and lines are written apart; a test that pretends to be both programs must satisfy all of them."""
        class Quarry(programs.Quarry):
            memory = lambda self, depth, policy: 1.0
            first_token = lambda self: 1.0

        class Llama(programs.Llama):
            memory = lambda self, depth: 1.0
            first_token = lambda self: 1.0
            batched = lambda self, depth, n_gen, parallel: ({("tg", n_gen, depth, parallel): [1.0]}, None)

        quarry = Quarry(self.pretend("quarry", "avx2", 2), "none.gguf", 1)
        self.pretend("llama-bench", "avx2", 1)
        llama = Llama(self.folder.name, "none.gguf", 1)
        rows = [row for group in compare.groups() for row in compare.measure(group, 1, quarry, llama, lambda text: None)]
        self.assertEqual(len(rows), sum(len(group.lines) for group in compare.groups()))
        for row in rows:
            self.assertRegex(compare.markdown(row), re.compile(r"^\| [^|]+(\|[^|]*){8}\|$"))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
