#!/usr/bin/env python3
"""quarry calibrate on a tiny random model: test_calibrate.py BUILD_FOLDER, with the models in QUARRY_TINY_MODELS."""
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import unittest

QUARRY = pathlib.Path(sys.argv.pop(1)).resolve() / "quarry"
MODEL = sorted(pathlib.Path(os.environ["QUARRY_TINY_MODELS"]).glob("*llama*.gguf"))[0]
HEADER = 128


class Calibrate(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = pathlib.Path(self.folder.name)
        (self.path / "text").write_text(" ".join(f"{i * i} is the square of {i}." for i in range(400)))

    def tearDown(self):
        self.folder.cleanup()

    def run_it(self, name, *options, **more):
        return subprocess.run([QUARRY, "calibrate", "-m", MODEL, "-f", self.path / "text", "-o", self.path / name, "--tokens", "300",
                               "--random", "100", "--centroids", "16", *options], capture_output=True, text=True, **more)

    def make(self, name, *options):
        run = self.run_it(name, *options)
        self.assertEqual(run.returncode, 0, run.stderr)
        return (self.path / name).read_bytes()

    def test_the_number_of_threads_changes_nothing(self):
        self.assertEqual(self.make("one", "-t", "1"), self.make("two", "-t", "2"))

    def test_options_change_the_codebook(self):
        files = [self.make(*options) for options in (["a"], ["b", "--exact-rope"], ["c", "--exponent", "0"], ["d", "--seed", "2"], ["e", "--exponent", "0.5"],
                                                       ["f", "--exponent", "0.5", "--shrink", "1"], ["g", "--type", "int8"], ["h", "--distance", "64"])]
        self.assertEqual(len({file[HEADER:] for file in files}), 8)
        self.assertLess(len(files[6]), len(files[0]))

    def test_texts_share_the_tokens(self):
        (self.path / "other").write_text("one two three " * 400)
        (self.path / "short").write_text("short")
        two = self.make("two", "-f", self.path / "other")
        self.assertNotEqual(two, self.make("one"))
        run = self.run_it("three", "-f", self.path / "short", "-f", self.path / "other")  # what the short one lacks falls to the last
        self.assertIn("from 300 tokens of text", run.stdout)

    def test_uuids_alone_do_without_text(self):
        run = subprocess.run([QUARRY, "calibrate", "-m", MODEL, "-o", self.path / "book", "--tokens", "0", "--random", "100", "--centroids", "9"],
                             capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("from 0 tokens of text and 100 of UUIDs", run.stdout)

    def test_an_interrupted_run_is_taken_up(self):
        whole = self.make("whole")
        partial = self.path / "resumed.partial"
        for cut, damage in ((len(whole) - 5, None), (HEADER + 40, None), (60, None), (len(whole) - 5, HEADER + 7)):
            piece = bytearray(whole[:cut])
            if damage:
                piece[damage] ^= 1
            partial.write_bytes(piece)
            self.assertEqual(self.make("resumed"), whole)
            self.assertFalse(partial.exists())
        partial.write_bytes(self.make("other", "--seed", "3")[:-5])  # another's is not
        self.assertEqual(self.make("resumed"), whole)

    def test_a_full_disk_leaves_no_codebook(self):
        def limit():
            import signal
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        run = self.run_it("full", preexec_fn=limit)
        self.assertEqual(run.returncode, 1)
        self.assertIn("cannot write", run.stderr)
        self.assertFalse((self.path / "full").exists())

    def test_the_policy_takes_the_codebook_and_refuses_another_model(self):
        self.make("book")
        spec = f"a2ats:codebook={self.path / 'book'}"
        common = ["run", "-p", "1 is the square", "-n", "2", "--attn", spec, "-m"]
        run = subprocess.run([QUARRY, *common, MODEL], capture_output=True, text=True, errors="replace")
        self.assertEqual(run.returncode, 0, run.stderr)
        for other in MODEL.parent.glob("*.gguf"):
            if other != MODEL:
                run = subprocess.run([QUARRY, *common, other], capture_output=True, text=True, errors="replace")
                self.assertEqual(run.returncode, 1)
                self.assertIn("another model", run.stderr)
                break

    def test_bad_arguments(self):
        self.assertIn("too few", self.run_it("x", "--centroids", "60000").stderr)
        self.assertIn("f16 or int8", self.run_it("x", "--type", "f32").stderr)
        self.assertEqual(subprocess.run([QUARRY, "calibrate", "-m", MODEL], capture_output=True).returncode, 2)
        self.assertEqual(subprocess.run([QUARRY, "calibrate", "-m", MODEL, "-o", self.path / "x"], capture_output=True).returncode, 2)


unittest.main()
