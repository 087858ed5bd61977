#!/usr/bin/env python3
"""The program's surface, without a model: test_cli.py BUILD_FOLDER"""
import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUARRY = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build") / "quarry"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "QUARRY_MODEL"}
FLAG = re.compile(r"(?<![\w-])--?[a-z][\w-]*")


def quarry(*arguments, **options):
    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.run([QUARRY, *arguments], stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60, text=True, **options)


def commands():
    lines = quarry("--help").stdout.splitlines()
    return [line.split("  ")[1] for line in lines if re.match(r"  [a-z]", line)]


def help_flags(command):
    """The flags of --help: those at the start of its option lines."""
    flags = set()
    for line in quarry(*command.split(), "--help").stdout.splitlines():
        if re.match(r"  -", line):
            flags |= set(FLAG.findall(re.split(r" [A-Z]|  +(?=\w)", line.strip())[0]))
    return flags


class Cli(unittest.TestCase):
    def assert_fails(self, result, code, *words):
        """One clear line of the error (usage errors add where help is), nothing on standard output."""
        lines = result.stderr.splitlines()
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertEqual(result.stdout, "")
        self.assertTrue(lines and lines[0].startswith("quarry: "), result.stderr)
        self.assertEqual(len(lines), 2 if code == 2 else 1, result.stderr)
        for word in words:
            self.assertIn(word, lines[0])

    def test_help_lists_the_commands_and_each_explains_itself(self):
        self.assertLessEqual({"ask", "run", "info", "tokenize", "bench"}, set(commands()))
        for command in commands():
            result = quarry(*command.split(), "--help")
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            self.assertIn(f"Usage: quarry {command} ", result.stdout)
            self.assertIn("-h, --help", result.stdout)
            self.assertTrue(all(len(line) <= 100 and line == line.rstrip() for line in result.stdout.splitlines()), result.stdout)

    def test_a_family_of_commands_lists_its_own(self):
        result = quarry("eval", "--help")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(re.findall(r"^  ([a-z ]+?)  ", result.stdout, re.M), [command for command in commands() if command.startswith("eval ")])

    def test_manual_page_and_help_name_the_same_flags(self):
        page = (ROOT / "docs/quarry.1").read_text().replace("\\-", "-")
        sections = dict(re.findall(r'^\.SS "?quarry ([a-z ]+?)"?\n(.*?)(?=^\.S[SH]|\Z)', page, re.M | re.S))
        shared = {}
        for name, body in re.findall(r'^\.SS "?([A-Z][a-z ]+ options)"?\n(.*?)(?=^\.S[SH]|\Z)', page, re.M | re.S):
            shared[name] = body
        tagged = re.compile(r"^\.TP\n(.*)$", re.M)
        for command in commands():
            body = sections[command] + "".join(text for name, text in shared.items() if name in sections[command])
            flags = {flag for line in tagged.findall(body) for flag in FLAG.findall(re.sub(r"\\f[A-Z]|\.B[RI]* ", " ", line))}
            self.assertEqual(flags | {"-h", "--help"}, help_flags(command), command)

    def test_version(self):
        self.assertRegex(quarry("--version").stdout, r"^quarry \d+\.\d+\.\d+\n$")

    def test_mistyped_command_names_the_nearest(self):
        self.assert_fails(quarry("aks"), 2, "'aks'", "'quarry ask'")
        self.assert_fails(quarry("tokenise"), 2, "'quarry tokenize'")
        self.assert_fails(quarry("eval", "needel"), 2, "'quarry eval needle'")
        self.assert_fails(quarry("evl", "kld"), 2, "'quarry eval kld'")
        self.assert_fails(quarry("ruler"), 2, "'quarry eval ruler'")
        for words in (("eval",), ("eval", "xyzzyxyzzy")):
            self.assert_fails(quarry(*words), 2, "'quarry eval'", "kld", "needle", "report")
            self.assertIn("Try 'quarry eval --help'", quarry(*words).stderr)
        self.assert_fails(quarry(), 2, "no command")
        self.assertNotIn("did you mean", quarry("xyzzyxyzzy").stderr)

    def test_mistyped_flag_names_the_nearest(self):
        self.assert_fails(quarry("ask", "--thread", "2", "q"), 2, "'--thread'", "'--threads'")
        self.assert_fails(quarry("ask", "--tpo-k=2", "q"), 2, "'--top-k'")
        self.assert_fails(quarry("run", "--modle", "x"), 2, "'--model'")
        for flag in ("--xyzzyxyzzy", "-x"):
            self.assertNotIn("did you mean", quarry("ask", flag).stderr)

    def test_values_are_checked(self):
        self.assert_fails(quarry("ask", "-n"), 2, "-n needs a value")
        self.assert_fails(quarry("ask", "-n", "ten", "q"), 2, "-n", "'ten' is not a whole number")
        self.assert_fails(quarry("ask", "--temp=warm", "q"), 2, "--temp", "'warm' is not a number")
        self.assert_fails(quarry("ask", "--temp", "nan", "q"), 2, "'nan' is not a number")
        self.assert_fails(quarry("ask", "--top-p", "1.5", "q"), 2, "outside 0 to 1")
        self.assert_fails(quarry("ask", "-n", "99999999999999999999", "q"), 2, "not a whole number")
        self.assert_fails(quarry("ask", "--ignore-eos=yes", "q"), 2, "--ignore-eos takes no value")
        for command, flag in (("eval needle", "--depths"), ("eval ruler", "--lengths"), ("bench", "-d")):
            self.assert_fails(quarry(*command.split(), flag, "12,x", "-f", "no"), 2, f'{flag}: "12,x"', "numbers from", "commas")

    def test_what_is_missing_is_said(self):
        self.assert_fails(quarry("ask"), 2, "no question")
        self.assert_fails(quarry("ask", "two", "questions"), 2, "one question expected")
        self.assert_fails(quarry("ask", " \n"), 1, "the question is empty")
        self.assert_fails(quarry("ask", "q"), 2, "no model", "-m", "QUARRY_MODEL")
        self.assert_fails(quarry("ask", "-m", "no/such.gguf", "q"), 1, "no/such.gguf")
        self.assert_fails(quarry("ask", "-m", __file__, "q"), 1, __file__)
        self.assert_fails(quarry("run", "-p", "a", "b"), 2, "given twice")
        self.assert_fails(quarry("run"), 1, "the text is empty")

    def test_documents_that_cannot_be_read_are_named(self):
        with tempfile.TemporaryDirectory() as folder:
            empty = os.path.join(folder, "empty.txt")
            pathlib.Path(empty).write_text(" \n")
            self.assert_fails(quarry("ask", "--doc", "no/such.txt", "q"), 1, "no/such.txt", "No such file")
            self.assert_fails(quarry("ask", "--doc", folder, "q"), 1, folder, "directory")
            self.assert_fails(quarry("ask", "--doc", empty, "q"), 1, empty, "empty")
            self.assert_fails(quarry("ask", "--doc", "-", "q"), 1, "standard input", "empty")
            self.assert_fails(quarry("ask", "--doc", "-", "--doc", "-", "q", input="text", stdin=None), 2, "once")

    def test_policies_are_listed(self):
        self.assertIn("ivfpq", quarry("info", "--attn").stdout)
        policies = json.loads(quarry("info", "--attn", "--json").stdout)["policies"]
        self.assertEqual(policies[0]["name"], "ivfpq")
        self.assertLessEqual({"full", "window"}, {policy["name"] for policy in policies})
        budget = [option for option in policies[0]["options"] if option["name"] == "budget"]
        self.assertEqual(len(budget), 1)
        self.assertGreater(float(budget[0]["default"]), 0)

    def test_a_full_disk_is_an_error(self):
        with open("/dev/full", "w") as full:
            result = subprocess.run([QUARRY, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        self.assertEqual(result.returncode, 1)
        self.assertIn("No space left", result.stderr)

    def test_a_reader_that_went_away_ends_it_quietly(self):
        for ignore in (False, True):  # the signal's default, or the error of write
            read_end, write_end = os.pipe()
            os.close(read_end)
            action = signal.SIG_IGN if ignore else signal.SIG_DFL
            result = subprocess.run([QUARRY, "--help"], stdout=write_end, stderr=subprocess.PIPE, timeout=60, restore_signals=False,
                                    preexec_fn=lambda: signal.signal(signal.SIGPIPE, action))
            os.close(write_end)
            self.assertEqual(result.stderr, b"")
            self.assertEqual(result.returncode, 141 if ignore else -signal.SIGPIPE)

    def test_a_terminal_as_input_is_not_waited_for(self):
        controller, terminal = pty.openpty()
        try:
            self.assert_fails(quarry("run", "-m", "x", stdin=terminal), 2, "standard input is a terminal")
            self.assert_fails(quarry("ask", "--doc", "-", "q", stdin=terminal), 2, "standard input is a terminal")
        finally:
            os.close(controller)
            os.close(terminal)

    def test_an_interrupt_while_waiting_for_input_ends_it(self):
        process = subprocess.Popen([QUARRY, "run", "-m", "x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # Input is taken once it has started to read, by when the handler is installed: more than a pipe holds, written whole.
        process.stdin.write(b"x" * (1 << 20))
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(timeout=60), 130)
        self.assertEqual(process.stderr.read(), b"quarry: interrupted\n")
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
