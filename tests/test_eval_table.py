#!/usr/bin/env python3
"""Every policy's figures on a tiny random model (QUARRY_TINY_MODELS) beside the stored ones, and the page made of them: test_eval_table.py BUILD_FOLDER"""
import copy
import html.parser
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))
import make_eval_table as table

QUARRY = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build") / "quarry"
MODEL = pathlib.Path(os.environ["QUARRY_TINY_MODELS"]) / table.MODEL
AGAIN = "; if it is meant to, run scripts/make_eval_table.py BUILD_FOLDER"


def differences(stored, here):
    """Lines, one per figure that is further from the stored one than it may be."""
    for name in sorted(stored.keys() | here.keys()):
        if name not in stored or name not in here:
            yield f"{name}: {'is not in the stored table' if name in here else 'is only in the stored table'}{AGAIN}"
            continue
        for key, value in stored[name].items():
            d, allowed = table.difference(key, value, here[name][key])
            if d > allowed:
                yield f"{name}: {key} was {value}, is {here[name][key]}{AGAIN}"


class Balance(html.parser.HTMLParser):
    """Fails on a tag that is closed out of order, and finds what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.counts = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.fetched += [(tag, key) for key, _ in attributes if key in ("src", "href", "xlink:href", "srcset", "data", "action")]
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


class EvalTable(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stored = json.loads(table.TABLE.read_text(encoding="utf-8"))
        cls.printed = table.measure(QUARRY, MODEL)

    def test_every_policy_measures_as_stored(self):
        self.assertEqual(self.printed["model"]["digest"], self.stored["model"], "the tiny model is another one")
        self.assertEqual(list(differences(self.stored["rows"], table.rows(self.printed))), [])

    def test_lower_instruction_sets_measure_as_stored(self):
        isa = table.levels(self.printed)[0]
        self.assertEqual(list(differences(self.stored["rows"], table.rows(table.measure(QUARRY, MODEL, isa)))), [])

    def test_the_comparison_finds_what_it_should(self):
        for key, factor in (("kld", 1.1), ("mass", 0.99), ("rows", 1.01)):
            changed = copy.deepcopy(self.stored["rows"])
            changed["prose ivfpq"][key] *= factor
            self.assertEqual(len(list(differences(self.stored["rows"], changed))), 1, key)
        missing = {name: row for name, row in self.stored["rows"].items() if name != "prose window"}
        self.assertEqual(len(list(differences(missing, self.stored["rows"]))), 1)
        self.assertEqual(len(list(differences(self.stored["rows"], missing))), 1)

    def test_the_page_is_well_formed_and_fetches_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            printed, page = pathlib.Path(folder) / "kld.json", pathlib.Path(folder) / "report.html"
            printed.write_text(json.dumps(self.printed), encoding="utf-8")
            subprocess.run([QUARRY, "eval", "report", printed, "-o", page], check=True, timeout=60)
            self.assertEqual(sorted(os.listdir(folder)), ["kld.json", "report.html"])
            balance = Balance()
            balance.feed(page.read_text(encoding="utf-8"))
            self.assertEqual((balance.open, balance.fetched), ([], []))
            self.assertEqual((balance.counts["svg"], balance.counts["table"]), (2, 2))  # full attention has no right answer to keep

    def test_a_stopped_measurement_says_whose_journal_it_found(self):
        with tempfile.TemporaryDirectory() as folder:
            text, journal = pathlib.Path(folder) / "text", pathlib.Path(folder) / "journal"
            text.write_text(table.text(), encoding="utf-8")

            def kld(depth):
                return subprocess.run([QUARRY, "eval", "kld", "-q", "-m", MODEL, "-d", depth, "-n", "2", "--samples", "1", "--journal", journal, "-f", text],
                                      capture_output=True, text=True, timeout=60)

            first, again, other = kld("200"), kld("200"), kld("201")
            self.assertEqual((first.returncode, again.returncode, other.returncode), (0, 0, 1), other.stderr)
            self.assertEqual(first.stdout, again.stdout)
            self.assertIn("journal of another measurement", other.stderr)
            self.assertEqual(len(other.stderr.splitlines()), 1)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
