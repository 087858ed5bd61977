#!/usr/bin/env python3
"""The program with a model: test_cli_model.py BUILD_FOLDER

A tiny random one from the folder that the environment variable QUARRY_TINY_MODELS names, of which nothing is expected to make sense; what
makes sense is asked of the model that QUARRY_TEST_MODEL names."""
import json
import math
import os
import pathlib
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import unittest
from html import unescape as html_text

QUARRY = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build") / "quarry"
TINY_MODEL = os.path.join(os.environ.get("QUARRY_TINY_MODELS", ""), "llama-q4_1.gguf")
REAL_MODEL = os.environ.get("QUARRY_TEST_MODEL")
STORES = tempfile.TemporaryDirectory()  # every run has a store of its own there, but where a test is about stores
ENVIRONMENT = dict(os.environ, QUARRY_MODEL=TINY_MODEL, QUARRY_STORE=STORES.name)
CODE = "7316402"
FACT = f"One of the special magic numbers for lighthouse is: {CODE}. "
QUESTION = "What is the special magic number for lighthouse?"
DEMO_DOCUMENT = "/usr/share/common-licenses/GPL-3"
SANITIZED = b"__asan_init" in QUARRY.read_bytes() if QUARRY.exists() else False
HANGS = 600  # seconds that no command takes, however loaded the machine; ctest has a limit for all


def filler(n_sentences):
    """Sentences that differ: a small model falls into repeating those that do not."""
    r = random.Random(1)
    who = "the keeper|a fisherman|my aunt|the old doctor|nobody|the postman|a stray dog|our teacher|the mayor|a young sailor".split("|")
    did = "walked along the shore|mended the nets|read the newspaper|waited for the ferry|looked at the clouds|sold two baskets of herring|painted a door".split("|")
    when = "in the morning|before supper|on Sunday|when the rain stopped|without a word|as every year|after the storm".split("|")
    return "".join(f"{r.choice(who).capitalize()} {r.choice(did)} {r.choice(when)}. " for _ in range(n_sentences))


def quarry(*arguments, text=None, isa=None, store=None, **options):
    options.setdefault("stdout", subprocess.PIPE)
    environment = dict(ENVIRONMENT, QUARRY_STORE=store or tempfile.mkdtemp(dir=STORES.name))
    if isa:
        environment["QUARRY_ISA"] = isa
    if text is None:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([QUARRY, *arguments], input=text, stderr=subprocess.PIPE, env=environment, timeout=HANGS, text=True, **options)


@unittest.skipUnless(os.path.exists(TINY_MODEL), "QUARRY_TINY_MODELS does not name the folder of make_tiny_models.py")
class CliModel(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.document = os.path.join(cls.folder.name, "island.txt")
        cls.long_document = os.path.join(cls.folder.name, "long.txt")
        pathlib.Path(cls.document).write_text(filler(12) + FACT + filler(12))
        pathlib.Path(cls.long_document).write_text(filler(500))

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def ask(self, *arguments, **options):
        return quarry("ask", "--doc", self.document, *arguments, QUESTION, **options)

    def test_the_answer_is_on_standard_output_and_the_figures_beside_it(self):
        result = self.ask()
        self.assertEqual(result.returncode, 0, result.stderr)
        for word in ("read ", "answer ", "tokens/s", "full attention", "weights"):
            self.assertIn(word, result.stderr)
        quiet = self.ask("-q")
        self.assertEqual((quiet.stdout, quiet.stderr), (result.stdout, ""))

    def test_json_is_one_object_with_the_answer_and_the_figures(self):
        result = self.ask("--json")
        answer = json.loads(result.stdout)
        self.assertEqual(result.stderr, "")
        self.assertEqual(answer["attention"], "ivfpq")
        self.assertGreater(answer["read"]["tokens"], 100)
        self.assertGreater(answer["generated"]["tokens_per_second"], 0)
        self.assertGreater(answer["kv_read_per_token"]["full_attention_bytes"], 0)
        self.assertEqual(answer["model"]["architecture"], "llama")
        memory = answer["memory"]
        parts = ("weights", "kv", "index", "codebooks", "scratch", "vocabulary", "program")
        self.assertEqual(memory["together"], sum(memory[part] for part in parts))
        self.assertGreater(memory["kv"], 0)
        self.assertGreaterEqual(memory["peak_resident"], memory["resident"])
        self.assertEqual(answer["disk"]["model"], os.path.getsize(TINY_MODEL))

    def test_citations_name_document_and_lines(self):
        lines = pathlib.Path(self.document).read_text().replace(". ", ".\n")
        text = os.path.join(self.folder.name, "lines.txt")
        pathlib.Path(text).write_text(lines)
        found = json.loads(quarry("ask", "--json", "--cite=3", "--doc", text, QUESTION).stdout)["citations"]
        self.assertTrue(0 < len(found) <= 3)
        for c in found:
            self.assertEqual(c["document"], "lines.txt")
            self.assertEqual(c["text"], "\n".join(lines.split("\n")[c["first_line"] - 1 : c["last_line"]]))
            self.assertEqual(c["text"], lines.encode()[c["first_byte"] : c["end_byte"]].decode())
        listed = quarry("ask", "-q", "--cite=3", "--doc", text, QUESTION).stdout
        self.assertTrue(listed.startswith(quarry("ask", "-q", "--doc", text, QUESTION).stdout))
        for i, c in enumerate(found):
            self.assertRegex(listed, rf"\[{i + 1}\] lines\.txt, lines? {c['first_line']}\b")
        self.assertNotIn("citations", json.loads(self.ask("--json").stdout))

    def test_the_page_of_citations_escapes_what_it_shows(self):
        document, page = (os.path.join(self.folder.name, name) for name in ("<b>&.txt", "page.html"))
        hostile = b"<script>alert('1')</script> & \"quoted\".\r\n\x00\xff\xe2\x82\xac</div></body> end. " + filler(20).encode()
        pathlib.Path(document).write_bytes(hostile)
        result = quarry("ask", "-q", "--cite-html", page, "--doc", document, "<i>Why</i> & how?")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertNotIn("written from", result.stdout)
        html = pathlib.Path(page).read_text()
        for forbidden in ("<script", "<b>", "<i>", "\0", "http:", "https:", "src=", "url("):
            self.assertNotIn(forbidden, html)
        self.assertIn("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;quoted&quot;.", html)
        self.assertIn("<title>&lt;i&gt;Why&lt;/i&gt; &amp; how?</title>", html)
        self.assertEqual(html.count("</body>"), 1)
        self.assertEqual(set(re.findall(r'href="#([^"]+)"', html)) - set(re.findall(r'id="([^"]+)"', html)), set())
        self.assertIn('<mark id="passage-1"', html)
        shown = re.sub(r"<sup>.*?</sup>", "", re.search(r'<div class="text">(.*?)</div>', html, re.DOTALL)[1])
        expected = hostile.replace(b"\x00", b"\xff").decode(errors="replace").replace("\r\n", "\n")
        self.assertEqual(html_text(re.sub(r"</?mark[^>]*>", "", shown)), expected)
        self.assertEqual([name for name in os.listdir(self.folder.name) if name.startswith("page.html.")], [])

    def test_citations_that_cannot_be_are_refused(self):
        self.assertEqual(quarry("ask", "--cite", "What?").returncode, 2)
        self.assertEqual(self.ask("--cite=0").returncode, 2)
        result = self.ask("-n", "2", "--cite-html", os.path.join(self.folder.name, "none", "page.html"))
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, r"none/page\.html: .*No such file")

    def test_a_document_from_standard_input_answers_as_its_file(self):
        text, same_name = pathlib.Path(self.document).read_text(), os.path.join(self.folder.name, "standard input")
        pathlib.Path(same_name).write_text(text)
        piped = quarry("ask", "-q", "--doc", "-", QUESTION, text=text)
        self.assertEqual(piped.stdout, quarry("ask", "-q", "--doc", same_name, QUESTION).stdout)

    def test_of_several_documents_each_is_read_under_its_name(self):
        one = json.loads(self.ask("--json", "-n", "1").stdout)["read"]["tokens"]
        two = json.loads(self.ask("--json", "-n", "1", "--doc", self.document).stdout)["read"]["tokens"]
        self.assertGreater(two, 2 * one - 50)

    def test_any_bytes_are_a_document(self):
        garbage = os.path.join(self.folder.name, "garbage.bin")
        pathlib.Path(garbage).write_bytes(bytes(range(256)) * 4 + b"\xff\xfe\xf0\x9f" + b"<|im_end|>")
        answer = json.loads(quarry("ask", "--json", "-n", "8", "--doc", garbage, "What is this?").stdout)
        self.assertGreater(answer["read"]["tokens"], 200)

    def test_a_document_that_does_not_fit_is_refused_before_any_work(self):
        longer = os.path.join(self.folder.name, "longer.txt")
        pathlib.Path(longer).write_text(filler(5000))
        trained = json.loads(quarry("info", "--json").stdout)["shape"]["context"]
        for arguments, limit, advice in (([], trained, "shorten the text"), (["-c", "400"], 400, "raise -c"), (["-c", "400", "-q"], 400, "raise -c")):
            result = quarry("ask", *arguments, "--doc", self.long_document if arguments else longer, "What?")
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            line = re.fullmatch(r"quarry: the documents and the question take (\d+) tokens, (.*)\n", result.stderr)
            self.assertIsNotNone(line, result.stderr)
            self.assertGreater(int(line[1]), limit)
            self.assertIn(f" {limit}", line[2])
            self.assertIn(advice, line[2])

    def test_files_that_are_no_models_are_named(self):
        whole = pathlib.Path(TINY_MODEL).read_bytes()
        broken = os.path.join(self.folder.name, "broken.gguf")
        for content in (b"", whole[:3], whole[:20], whole[:2000], whole[: len(whole) // 2], whole[:-1000], b"GGML" + whole[4:]):
            pathlib.Path(broken).write_bytes(content)
            for command in (["info"], ["tokenize", "-p", "a"], ["ask", "a"]):
                result = quarry(*command, "-m", broken)
                self.assertEqual((result.returncode, result.stdout), (1, ""))
                self.assertRegex(result.stderr, r"^quarry: .*broken\.gguf.*\n$")
        result = quarry("info", "-m", self.folder.name)
        self.assertEqual(result.returncode, 1)
        self.assertIn(self.folder.name, result.stderr)

    def test_files_that_may_not_be_read_are_named(self):
        secret = os.path.join(self.folder.name, "secret.txt")
        pathlib.Path(secret).write_text("secret")
        os.chmod(secret, 0)
        if os.access(secret, os.R_OK):
            self.skipTest("this user may read everything")
        for arguments in (["ask", "--doc", secret, "What?"], ["run", "-f", secret], ["info", "-m", secret]):
            result = quarry(*arguments)
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            self.assertRegex(result.stderr, r"^quarry: .*secret\.txt.*Permission denied.*\n$")

    def test_the_limit_of_tokens_and_stop_strings_end_the_answer(self):
        cut = json.loads(self.ask("--json", "-n", "3").stdout)
        self.assertEqual((cut["stop"], cut["generated"]["tokens"]), ("length", 3))
        whole = json.loads(self.ask("--json", "-n", "40").stdout)["answer"]
        middle = whole[len(whole) // 2 :][:4]
        stopped = json.loads(self.ask("--json", "-n", "40", "--stop", middle.replace("\\", "\\\\")).stdout)
        self.assertEqual((stopped["stop"], stopped["answer"]), ("stop", whole[: whole.index(middle)]))

    def test_a_full_context_ends_the_answer(self):
        read = json.loads(self.ask("--json", "-n", "0").stdout)
        length = read["read"]["tokens"] + read["question"]["tokens"]
        full = json.loads(self.ask("--json", "-c", str(length + 5), "--ignore-eos").stdout)
        self.assertEqual((full["stop"], full["generated"]["tokens"]), ("context", 5))

    def test_a_seed_repeats_an_answer(self):
        def sample(seed):
            return quarry("run", "-q", "-n", "20", "--temp", "1.5", "-s", str(seed), "-p", "Once upon a time").stdout

        self.assertEqual(sample(1), sample(1))
        self.assertGreater(len({sample(seed) for seed in range(4)}), 1)

    def test_logit_bias_forbids_a_token(self):
        prompt = "The capital of France is"
        greedy = quarry("run", "-q", "-n", "1", prompt).stdout.removesuffix("\n")
        tokens = json.loads(quarry("tokenize", "--json", "--no-special", "-p", greedy).stdout)["tokens"]
        self.assertEqual(len(tokens), 1)
        forbidden = f"{tokens[0]['id']}-inf"
        self.assertNotEqual(quarry("run", "-q", "-n", "1", "--logit-bias", forbidden, prompt).stdout.removesuffix("\n"), greedy)
        wrong = quarry("ask", "--logit-bias", "99999999+1", "--doc", self.long_document, "?")  # told before the document is read
        self.assertEqual(wrong.returncode, 2)
        self.assertIn("99999999+1", wrong.stderr)

    def test_a_text_is_continued_alike_from_argument_file_and_input(self):
        prompt = "One, two, three, four, five,"
        path = os.path.join(self.folder.name, "prompt.txt")
        pathlib.Path(path).write_text(prompt)
        given = [quarry("run", "-q", "-n", "6", *where, text=text) for where, text in (((prompt,), None), (("-p", prompt), None), (("-f", path), None), ((), prompt))]
        self.assertEqual({result.stdout for result in given}, {given[0].stdout})
        self.assertEqual({result.returncode for result in given}, {0})

    def test_tokens_put_together_are_the_text(self):
        text = "naïve café 🦉\n\ttabs"
        tokens = json.loads(quarry("tokenize", "--json", "--no-special", text).stdout)["tokens"]
        pieces = b"".join(t["piece"].encode() if isinstance(t["piece"], str) else bytes(t["piece"]) for t in tokens)
        self.assertEqual(pieces.decode(), text)
        ids = quarry("tokenize", "--ids", "--no-special", text).stdout.split()
        self.assertEqual([int(i) for i in ids], [t["id"] for t in tokens])
        lines = subprocess.run([QUARRY, "tokenize", "--no-special", text], capture_output=True, env=ENVIRONMENT, timeout=HANGS).stdout.splitlines()
        self.assertEqual(len(lines), len(tokens))  # a line may hold part of a character

    def test_info_reckons_with_the_context(self):
        small, large = (json.loads(quarry("info", "--json", "-c", c).stdout) for c in ("1024", "8192"))
        self.assertEqual(large["memory"]["kv"], 8 * small["memory"]["kv"])
        self.assertEqual(small["architecture"], "llama")
        text = quarry("info").stdout
        for word in ("parameters", "kernels", "keys and values", "index", "together", "stored context"):
            self.assertIn(word, text)

    def test_info_reckons_with_the_policy_and_the_way_of_reading(self):
        def memory(*arguments):
            result = json.loads(quarry("info", "--json", "-c", "8192", *arguments).stdout)
            return dict(result["memory"], stored=result["disk"]["stored_kv"] + result["disk"]["stored_index"])

        usual, full = memory(), memory("--attn", "full")
        self.assertGreater(usual["index"], 100 * full["index"])
        self.assertEqual((full["kv"], full["stored"]), (usual["kv"], 0))
        self.assertEqual(memory("--kv-f32")["kv"], 2 * usual["kv"])
        self.assertGreater(memory("--extend")["kv"], usual["kv"])  # local rows are kept twice
        self.assertGreater(memory("-t", "4")["scratch"], usual["scratch"])
        self.assertTrue(usual["kv"] < usual["stored"] < 1.25 * usual["kv"])
        self.assertIn("unknown retrieval policy 'ivfqp'", quarry("info", "--attn", "ivfqp").stderr)
        self.assertTrue(usual["fits"])
        self.assertFalse(memory("--extend", "-c", "1000000000")["fits"])
        self.assertRegex(quarry("info", "--extend", "-c", "1000000000").stdout, r"Does not fit: 1000000000 tokens take \d+ MiB .* at most \d+ tokens")

    def test_what_does_not_fit_is_refused_before_it_is_read(self):
        def limit():
            resource.setrlimit(resource.RLIMIT_DATA, (64 << 20, resource.RLIM_INFINITY))

        if SANITIZED:
            self.skipTest("the sanitizer takes more than any limit")
        text = os.path.join(self.folder.name, "novel.txt")
        pathlib.Path(text).write_text(filler(40000))
        command = ("ask", "--extend", "-t", "1", "--doc", text, QUESTION)
        result = quarry(*command, preexec_fn=limit)
        self.assertEqual((result.returncode, result.stdout), (1, ""), result.stderr)
        self.assertRegex(result.stderr, r"^quarry: \d+ tokens take \d+ MiB of memory \(keys and values \d+, index \d+\), and ulimit leaves \d+: .*smaller model\n$")
        stored = quarry("context", "create", *command[1:-1], preexec_fn=limit)
        self.assertEqual(stored.returncode, 1)
        self.assertIn("and ulimit leaves", stored.stderr)

    def test_weights_that_may_not_be_locked_are_said_and_used(self):
        def limit():
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))

        plain, locked = self.ask("-q"), self.ask("-q", "--mlock", preexec_fn=limit)
        self.assertEqual((locked.returncode, locked.stdout), (0, plain.stdout))
        if os.geteuid() != 0:  # the superuser locks what he likes
            self.assertIn("the weights are not kept in memory", locked.stderr)
        self.assertEqual(self.ask("-q", "--no-mmap").stdout, plain.stdout)

    def test_wrong_policies_are_refused_by_name(self):
        for policy in ("ivfqp", "ivfpq:budgte=0.1", "ivfpq:budget=much"):
            result = self.ask("--attn", policy)
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            self.assertEqual(len(result.stderr.splitlines()), 1)

    def test_a_full_disk_is_an_error(self):
        with open("/dev/full", "w") as full:
            result = self.ask(stdout=full)
        self.assertEqual(result.returncode, 1)
        self.assertIn("No space left", result.stderr)

    def test_a_reader_that_went_away_ends_it_quietly(self):
        process = subprocess.Popen([QUARRY, "run", "-q", "--ignore-eos", "-n", "500", "-p", "Once"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=ENVIRONMENT)
        process.stdout.read(1)
        process.stdout.close()
        self.assertIn(process.wait(timeout=HANGS), (141, -signal.SIGPIPE))
        self.assertEqual(process.stderr.read(), b"")
        process.stderr.close()

    def test_a_document_is_read_once(self):
        store = tempfile.mkdtemp(dir=STORES.name)
        first = quarry("ask", "--json", "-n", "4", "--doc", self.document, QUESTION, store=store)
        again = quarry("ask", "--json", "-n", "4", "--doc", self.document, QUESTION, store=store)
        first, again = json.loads(first.stdout), json.loads(again.stdout)
        self.assertEqual(first["answer"], again["answer"])
        self.assertEqual((first["stored"]["taken"]["tokens"], again["read"]["tokens"]), (0, 0))
        self.assertEqual(again["stored"]["taken"]["tokens"], first["read"]["tokens"])
        self.assertGreater(first["stored"]["kept"]["bytes"], 0)
        self.assertEqual(again["stored"]["kept"]["bytes"], 0)
        self.assertNotIn("stored", json.loads(quarry("ask", "--no-store", "--json", "-n", "4", "--doc", self.document, QUESTION, store=store).stdout))
        self.assertIn("read before", quarry("ask", "-n", "4", "--doc", self.document, QUESTION, store=store).stderr)

    def test_a_context_that_is_nearly_another_is_made_all_the_same(self):
        store, nearly = tempfile.mkdtemp(dir=STORES.name), os.path.join(self.folder.name, "nearly.txt")
        text = filler(40)
        for ending in (b".", b"\n\xe2\x82"):  # a control character and part of a character where they differ
            pathlib.Path(nearly).write_bytes(text.encode() + ending + text.encode())
            made = quarry("context", "create", "--doc", nearly, store=store)
            self.assertEqual(made.returncode, 0, made.stderr)
            self.assertIn("are kept", made.stdout)
        self.assertRegex(made.stderr, r"(?m)^quarry: a stored context is the same up to token \d+.*$")
        pathlib.Path(nearly).write_bytes(text.encode() + b"\xf0\x9f" + text.encode())
        answer = json.loads(quarry("ask", "--json", "-n", "1", "--doc", nearly, "What?", store=store).stdout)
        self.assertIn("the same up to token", answer["stored"]["note"])
        self.assertNotIn("\n", answer["stored"]["note"])
        refused = quarry("context", "create", "--attn", "full", "--doc", nearly, store=store)
        self.assertEqual((refused.returncode, refused.stdout), (1, ""))
        self.assertIn("--attn full", refused.stderr)

    def test_contexts_are_made_listed_verified_carried_and_removed(self):
        store, away = tempfile.mkdtemp(dir=STORES.name), os.path.join(self.folder.name, "away")
        more = os.path.join(self.folder.name, "more.txt")
        pathlib.Path(more).write_text(filler(30))
        made = quarry("context", "create", "--doc", self.document, "--doc", more, store=store)
        self.assertRegex(made.stdout, r"^(\d+) tokens are kept: 0 were, \1 are new", made.stderr)
        listed = json.loads(quarry("context", "list", "--json", store=store).stdout)
        (context,) = listed["contexts"]
        self.assertEqual((context["documents"], context["pieces"], listed["pieces"]), (["island.txt", "more.txt"], 2, 2))
        number = str(context["id"])
        self.assertIn("island.txt, more.txt", quarry("context", "list", store=store).stdout)
        self.assertIn("document more.txt", quarry("context", "info", number, store=store).stdout)
        self.assertIn("all checksums are right", quarry("context", "verify", store=store).stdout)
        self.assertEqual(quarry("context", "export", number, away, store=store).returncode, 0)
        taken = json.loads(quarry("ask", "--json", "-n", "1", "--store", away, "--doc", self.document, "--doc", more, "What?").stdout)
        self.assertEqual(taken["stored"]["taken"]["tokens"], context["tokens"])
        for wrong in (["rm", "99"], ["rm", number, "99"], ["info", "x"], ["export", "99", away]):
            failed = quarry("context", *wrong, store=store)
            self.assertEqual((failed.returncode, failed.stdout), (1, ""))
            self.assertIn("no stored context has the number", failed.stderr)
        piece = next(pathlib.Path(store).glob("*.piece"))
        damaged = bytearray(piece.read_bytes())
        damaged[-50] ^= 1
        piece.write_bytes(damaged)
        failed = quarry("context", "verify", store=store)
        self.assertEqual(failed.returncode, 1)
        self.assertIn(piece.name, failed.stderr)
        self.assertIn("removed 1 contexts, 2 files", quarry("context", "rm", number, store=store).stdout)
        self.assertEqual(list(pathlib.Path(store).glob("*.piece")), [])

    def test_an_interrupt_while_reading_ends_it(self):
        controller, terminal = pty.openpty()
        process = subprocess.Popen([QUARRY, "ask", "-t", "1", "-b", "1", "--doc", self.long_document, "What?"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=terminal, env=ENVIRONMENT)
        os.close(terminal)
        shown = b""
        while b" left" not in shown:  # the progress bar
            shown += os.read(controller, 4096)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(timeout=HANGS), 130)
        try:
            while chunk := os.read(controller, 4096):
                shown += chunk
        except OSError:  # the terminal is gone with the process
            pass
        self.assertRegex(shown, rb"\d+/\d+ tokens +\d+ tokens/s +.* left")
        self.assertTrue(shown.endswith(b"quarry: interrupted\r\n"), shown)
        self.assertEqual(process.stdout.read(), b"")
        process.stdout.close()
        os.close(controller)

    def test_an_interrupt_while_answering_ends_it(self):
        process = subprocess.Popen([QUARRY, "run", "--ignore-eos", "-n", "5000", "-p", "Once"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=ENVIRONMENT)
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANGS)
        self.assertEqual(process.returncode, 130)
        self.assertTrue(out.endswith(b"\n"))
        self.assertEqual(err, b"quarry: interrupted\n")

    def bench(self, *arguments):
        run = quarry("bench", "-q", "-r", "2", "-o", "json", *arguments)
        self.assertEqual(run.returncode, 0, run.stderr)
        return json.loads(run.stdout)

    def test_bench_measures_every_kind_of_test(self):
        results = self.bench("-p", "16", "-n", "4", "-np", "1,2", "--read", "40", "--ttft", "3", "-d", "0,20", "--attn", "window,full")
        found = [(r["attn"], r["test"], r["n_prompt"], r["n_gen"], r["n_depth"], r["n_parallel"]) for r in results]
        deep = [("pp", 16, 0, 1), ("ttft", 3, 0, 1), ("tg", 0, 4, 1), ("tg", 0, 4, 2)]
        expected = [(attn, "read", 40, 0, 0, 1) for attn in ("window", "full")]
        expected += [(attn, name, p, n, depth, parallel) for depth in (0, 20) for name, p, n, parallel in deep for attn in ("window", "full")]
        self.assertEqual(found, expected)
        for r in results:
            tokens = (r["n_prompt"] + r["n_gen"]) * r["n_parallel"]
            self.assertEqual(len(r["samples_ns"]), 2)
            for ns, ts in zip(r["samples_ns"], r["samples_ts"]):
                self.assertAlmostEqual(tokens / (ns * 1e-9) / ts, 1, places=3)
            self.assertAlmostEqual(r["avg_ts"] / (sum(r["samples_ts"]) / 2), 1, places=5)

    def test_bench_reads_a_text_and_leaves_out_what_is_zero(self):
        results = self.bench("-f", self.document, "-p", "0", "-n", "2", "-np", "2", "-d", "30")
        self.assertEqual([(r["test"], r["n_gen"], r["n_parallel"], r["attn"]) for r in results], [("tg", 2, 2, "ivfpq")])
        self.assertEqual(self.bench("-p", "0", "-n", "0"), [])

    def test_bench_prints_tables(self):
        arguments = ["bench", "-q", "-r", "1", "-p", "8", "-n", "2", "-np", "3", "-d", "9", "--attn", "full"]
        rows = quarry(*arguments).stdout.splitlines()
        self.assertEqual(len(rows), 4)
        self.assertEqual({row.count("|") for row in rows}, {11})
        self.assertIn("| tg2 x 3 @ d9 |", re.sub(" +", " ", rows[3]))
        head, *rows = quarry(*arguments, "-o", "csv").stdout.splitlines()
        self.assertEqual([row.count(",") for row in rows], [head.count(",")] * 2)

    def test_bench_says_what_is_wrong_with_a_list(self):
        for flag in ("--read", "--ttft", "-np", "-n"):
            run = quarry("bench", flag, "12,x")
            self.assertNotEqual(run.returncode, 0)
            self.assertIn(f'{flag}: "12,x"', run.stderr)
        self.assertIn("from 1 to", quarry("bench", "-np", "0").stderr)

    def test_a_grid_of_needles_counts_every_cell(self):
        needles = ["eval", "needle", "-q", "--attn", "window", "-d", "400,500", "--count", "2", "--positions", "3", "-n", "2", "-f", self.long_document]
        result = quarry(*needles, "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        page = json.loads(result.stdout)
        self.assertEqual(page["parameters"]["positions"], 3)
        for r in page["results"]:
            cells = [(c["length"], round(c["depth"], 3), c["asked"]) for c in r["grid"]]
            self.assertEqual(cells, [(d, p, 2) for d in (400, 500) for p in (0.167, 0.5, 0.833)])
            self.assertEqual(sum(c["correct"] for c in r["grid"]), r["correct"])
            self.assertAlmostEqual(r["loss"], (r["full_correct"] - r["correct"]) / r["asked"])
        table = quarry(*needles)
        self.assertEqual(len(re.findall(r"^ +(?:16\.7|50\.0|83\.3) %(?: +0/2){2}$", table.stdout, re.M)), 6, table.stdout)
        wrong = quarry(*needles, "--needles", "2")
        self.assertEqual(wrong.returncode, 1)
        self.assertIn("--positions", wrong.stderr)
        journal = os.path.join(self.folder.name, "needle.journal")
        self.assertEqual(quarry(*needles, "--json", "--journal", journal).stdout, result.stdout)
        lines = pathlib.Path(journal).read_text().splitlines(True)
        self.assertEqual(len(lines), 13)
        pathlib.Path(journal).write_text("".join(lines[:7]))  # as if stopped half way
        self.assertEqual(quarry(*needles, "--json", "--journal", journal).stdout, result.stdout)
        self.assertEqual(quarry(*needles, "--journal", journal).stdout, table.stdout)
        other = quarry(*needles, "--journal", journal, "-s", "2")
        self.assertEqual((other.returncode, other.stdout), (1, ""))
        self.assertIn("needle.journal: is the journal of another measurement", other.stderr)

    def test_questions_about_documents_go_on_from_a_journal_and_make_a_report(self):
        def path(name):
            return os.path.join(self.folder.name, name)

        questions = [{"document": os.path.basename(self.document), "question": "Who?", "answers": ["keeper", "fisherman"]},
                     {"text": filler(20), "question": "Who?", "answer": "nobody"}]
        pathlib.Path(path("questions.jsonl")).write_text("\n".join(map(json.dumps, questions)))
        doc = ["eval", "doc", "-q", "--attn", "window", "-n", "8", "-f", path("questions.jsonl"), "--journal", path("doc.journal")]
        result = quarry(*doc, "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        page = json.loads(result.stdout)
        self.assertEqual((page["command"], page["seed"]), ("eval doc", None))
        self.assertEqual([t["name"] for t in page["texts"]], ["questions.jsonl", os.path.basename(self.document)])
        self.assertEqual([(r["attn"], r["task"], r["n"]) for r in page["results"]], [("full", "all", 2), ("window", "all", 2)])
        for r in page["results"]:
            self.assertEqual(r["score"], r["correct"] / 2)
            self.assertAlmostEqual(r["loss"], (r["full_correct"] - r["correct"]) / 2)
            self.assertLessEqual(r["score_low"], r["score"])
        self.assertEqual(len(pathlib.Path(path("doc.journal")).read_text().splitlines()), 3)
        self.assertEqual(quarry(*doc, "--json", "-v").stdout, result.stdout)  # nothing is measured again
        self.assertIn("2 questions about 2 documents", quarry(*doc).stdout)
        pathlib.Path(path("doc.json")).write_text(result.stdout)
        self.assertEqual(quarry("eval", "report", path("doc.json"), "-o", path("doc.html")).returncode, 0)
        self.assertIn("Questions about documents", pathlib.Path(path("doc.html")).read_text())
        other = quarry(*doc[:-1], path("doc.journal"), "-n", "9")
        self.assertEqual(other.returncode, 1)
        self.assertIn("doc.journal: is the journal of another measurement", other.stderr)
        pathlib.Path(path("questions.jsonl")).write_text(json.dumps(questions[0]) + '\n{"question": "Who?"}')
        self.assertRegex(quarry(*doc).stderr, r"^quarry: .*questions\.jsonl: line 2: has neither .*\n$")
        pathlib.Path(path("questions.jsonl")).write_text(json.dumps(dict(questions[0], document=".")))
        folder = quarry(*doc)
        self.assertEqual((folder.returncode, folder.stdout), (1, ""))
        self.assertRegex(folder.stderr, r"^quarry: .*questions\.jsonl: line 1: .*: cannot read: Is a directory\n$")
        self.assertEqual(quarry(*doc[:-4]).returncode, 2)

    def test_ruler_takes_its_texts_from_standard_input_too(self):
        def ruler(name, text=None):
            result = quarry("eval", "ruler", "--attn", "window", "--tasks", "niah_single_2,fwe", "--lengths", "600", "--samples", "1", "-v", "--json", "-f", name, text=text)
            self.assertEqual(result.returncode, 0, result.stderr)
            page = json.loads(result.stdout)
            self.assertEqual(page["command"], "eval ruler")
            return page["results"], re.findall("^(?:niah|fwe).*", result.stderr, re.M)

        results, answers = ruler(self.long_document)
        self.assertEqual(len(answers), 4)
        self.assertEqual([(r["task"], r["attn"], r["length"]) for r in results[:4]],
                         [(task, attn, 600) for task in ("niah_single_2", "fwe") for attn in ("full", "window")])
        self.assertEqual(ruler("-", text=pathlib.Path(self.long_document).read_text()), (results, answers))

    def test_perplexity_goes_on_from_a_journal(self):
        journal = os.path.join(self.folder.name, "ppl.journal")
        ppl = ["eval", "ppl", "-q", "--attn", "window", "-c", "300", "-n", "10", "--samples", "2", "-f", self.long_document, "--journal", journal]
        result = quarry(*ppl, "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        page = json.loads(result.stdout)
        self.assertEqual((page["command"], page["parameters"]["depth"]), ("eval ppl", 289))
        for r in page["results"]:
            self.assertEqual((r["n"], r["samples"]), (20, 2))
            self.assertAlmostEqual(math.log(r["perplexity"]), r["nll"])
            self.assertGreater(r["nll_error"], 0)
        lines = pathlib.Path(journal).read_text().splitlines(True)
        self.assertEqual(len(lines), 3)
        pathlib.Path(journal).write_text("".join(lines[:2]))  # as if stopped after the first window
        self.assertEqual(quarry(*ppl, "--json").stdout, result.stdout)
        self.assertIn("last 10 tokens of 2 windows of 300", quarry(*ppl).stdout)
        self.assertIn("eval ppl -c 300", page["line"])
        self.assertEqual(quarry(*ppl, "--samples", "3").returncode, 1)
        self.assertIn("long.txt: has", quarry(*ppl[:-2], "-c", "60000", "-n", "9").stderr)


@unittest.skipUnless(REAL_MODEL, "QUARRY_TEST_MODEL is not set")
class CliRealModel(unittest.TestCase):
    def test_an_answer_comes_from_the_document_that_holds_it(self):
        with tempfile.TemporaryDirectory() as folder:
            other = os.path.join(folder, "other.txt")
            pathlib.Path(other).write_text(filler(4))
            result = quarry("ask", "-m", REAL_MODEL, "--json", "-n", "48", "--doc", other, "--doc", "-", QUESTION, text=filler(4) + FACT + filler(4))
            answer = json.loads(result.stdout)
            self.assertIn(CODE, answer["answer"])
            self.assertEqual(answer["stop"], "end")

    def test_the_first_citation_is_the_sentence_that_holds_the_answer(self):
        with tempfile.TemporaryDirectory() as folder:
            other = os.path.join(folder, "other.txt")
            pathlib.Path(other).write_text(filler(40))
            for attn in ("ivfpq", "full"):
                result = quarry("ask", "-m", REAL_MODEL, "--json", "--attn", attn, "--cite", "-n", "48", "--doc", other, "--doc", "-", QUESTION,
                                text=filler(30) + "\n" + FACT + "\n" + filler(30))
                answer = json.loads(result.stdout)
                self.assertIn(CODE, answer["answer"])
                self.assertIn(CODE, answer["citations"][0]["text"], attn)
                self.assertEqual((answer["citations"][0]["document"], answer["citations"][0]["first_line"]), ("standard input", 2))

    @unittest.skipUnless(os.path.exists(DEMO_DOCUMENT), "no " + DEMO_DOCUMENT)
    def test_the_question_of_the_demo_is_answered_from_its_document(self):
        script = (pathlib.Path(__file__).resolve().parent.parent / "scripts/demo.sh").read_text()
        self.assertIn(f"document={DEMO_DOCUMENT}\n", script)
        question = re.search('^question="(.*)"$', script, re.MULTILINE)[1]
        for isa in (None, "avx2"):
            result = quarry("ask", "-m", REAL_MODEL, "-q", "--doc", DEMO_DOCUMENT, question, isa=isa)
            self.assertIn("show w", result.stdout, isa)

    @unittest.skipIf(SANITIZED, "the sanitizer's memory is in nobody's account")
    def test_the_parts_of_memory_are_together_what_the_system_counts(self):
        with tempfile.TemporaryDirectory() as folder:
            document = os.path.join(folder, "long.txt")
            pathlib.Path(document).write_text(filler(100))
            for attn in ("ivfpq", "full"):
                store = os.path.join(folder, attn)
                for turn in ("read", "stored", "not stored"):
                    extra = ["--no-store"] if turn == "not stored" else []
                    result = quarry("ask", "-m", REAL_MODEL, "--json", "-n", "8", "--attn", attn, *extra, "--doc", document, QUESTION, store=store)
                    memory = json.loads(result.stdout)["memory"]
                    self.assertAlmostEqual(memory["together"] / memory["resident"], 1, delta=0.05, msg=f"{attn}, {turn}")

    @unittest.skipIf(SANITIZED, "the sanitizer takes more than any limit")
    def test_weights_that_do_not_fit_are_refused(self):
        def limit():
            resource.setrlimit(resource.RLIMIT_DATA, (48 << 20, resource.RLIM_INFINITY))

        result = quarry("run", "-m", REAL_MODEL, "-t", "1", "-p", "One", preexec_fn=limit)
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertRegex(result.stderr, r"^quarry: .*: the weights take \d+ MiB of memory, and ulimit leaves \d+: use a smaller model.*\n$")

    def test_a_text_is_continued_in_its_sense(self):
        result = quarry("run", "-m", REAL_MODEL, "-q", "-n", "4", "One, two, three, four, five,")
        self.assertIn("six", result.stdout)
        self.assertEqual(result.stderr, "")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
