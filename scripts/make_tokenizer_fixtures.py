#!/usr/bin/env python3
"""Writes what the tests of src/text compare with, into tests/data:

  tokenizer.bin       strings, and per pre-tokenizer or vocabulary a hash of what each string becomes
  tokenizer_*.gguf    small vocabularies trained here, so that the tests need no model
  chat.bin            chat templates (Jinja), conversations, and what Jinja makes of them

References: the `regex` package with the published patterns for the splits, Hugging Face `tokenizers` for byte-level BPE, llama.cpp for
SentencePiece (its program is compiled here), `jinja2` for the templates. Vocabularies of others are read and not stored.

  make_tokenizer_fixtures.py --model SmolLM2.gguf --gemma GEMMA3.gguf --vocabs FOLDER --llama-source FOLDER --llama-libraries FOLDER [--output tests/data]

--vocabs: ggml-vocab-{qwen2,llama-bpe,gpt-2,llama-spm,phi-3}.gguf, as in llama.cpp's models/.
Needs: pip install gguf tokenizers regex jinja2
"""

import argparse
import collections
import json
import pathlib
import random
import struct
import subprocess
import tempfile
import unicodedata

import gguf
import regex
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"gpt-2": GPT2, "smollm": GPT2, "qwen2": LLAMA3.replace("{1,3}", ""), "llama-bpe": LLAMA3}
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
N_STRINGS = 5000

ATOMS = """the and of hello world word Word WORD Document camelCase ALLCAPS a_b __init__ qzx user@example.com http://a.b/c?d=e&f don't I'LL
's 't 're 've 'm 'll 'd 'S 'LL 'Ve 'RE 'D 'ſ ’s ' '' " naïve Zoë é ß İ ı ǅ ﬁ ẞ ŉ ö Ελληνικά Привет 中文 日本語 かな カタカナ 한국어 الْعَرَبِيَّة مرحبا שלום हिन्दी ไทย 𝔘𝔫𝔦 𒀀
👍 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ❤️ 😀 1 12 123 1234 3.14 1,000,000 0x1F ٣ ٤٥ Ⅷ ½ ² 一 １２ १२३ ! ?! ... -- == -> // /* */ { } (); [0] € $ © ™ ▁ ▁▁ _ # <b> </s> <s> <unk> <0x0A>
<|im_start|> <|im_end|> <|im|> <|im <|endoftext|> <|eot_id|> <think> </think> [INST] <|user|> <|end|>""".split() + [
    " ", " ", " ", "  ", "   ", "    ", "\n", "\n\n", "\r\n", "\r", "\t", "\t\t", " \n", "   \n  ", "\n ", "\u00a0", "\u3000", "\u2028", "\u2003", "\u0085",
    "\x00", "\x01", "\x06", "\x1b[31m", "\x1c", "\x7f", "\u200d", "\u200b", "\ufeff", "\u0301", "e\u0301", "n\u0303", "\u0378", "\U000e0001", "\ue000", "\uffff",
    "def f(x):\n    return x\n", "if (a<b) {\n\t", "#include <stdio.h>\n", "x" * 40, "aaaaaaaa", "        ", "!!!!!!!!", "11111111", "\n\n\n\n",
    " the", " and", " of", " hello", " é", " 中", " 1", " 12", " 👍", "\n1", "\n a", "\t1", "\t a", " \u0301", "\u00a0a", "\u3000a", "It was", " 's", " 'Ll",
]  # fmt: skip
RANGES = [(0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x400, 0x6FF), (0x900, 0xDFF), (0x2000, 0x2FFF), (0x3000, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]


def make_strings():
    r = random.Random(1)
    strings = ["", " ", "  ", "\n", "\x00", "Hello world", " Hello world", "Hello  world ", "the the the"]
    while len(strings) < N_STRINGS:
        kind = r.random()
        if kind < 0.6:
            s = "".join(r.choice(ATOMS) for _ in range(r.randint(1, 12)))
        elif kind < 0.72:
            s = "".join(chr(r.randint(*r.choice(RANGES))) for _ in range(r.randint(1, 16)))
        elif kind < 0.82:
            s = "".join(chr(r.randint(0, 0x7F)) for _ in range(r.randint(1, 40)))
        elif kind < 0.95:
            s = " ".join(r.choice(ATOMS) for _ in range(r.randint(1, 10)))
        else:
            s = r.choice(ATOMS) * r.randint(1, 40)
        if not any(map(is_recent, s)):
            strings.append(s)
    return strings


def is_recent(character):
    """Assigned in a later version of Unicode than Python's: the references may differ about it."""
    return unicodedata.category(character) == "Cn" and not regex.match(r"\p{Cn}", character)


def fnv(numbers):
    h = 2166136261
    for n in numbers:
        for byte in struct.pack("<i", n):
            h = ((h ^ byte) * 16777619) & 0xFFFFFFFF
    return h


# ---- splits ----


def split_ends(name, text):
    """Byte offsets of the ends of the pieces."""
    runs = regex.findall(r"\p{N}|\P{N}+", text) if name == "smollm" else [text]
    pieces = [m.group() for run in runs for m in regex.finditer(PATTERNS[name], run)]
    assert "".join(pieces) == text
    ends, end = [], 0
    for piece in pieces:
        end += len(piece.encode())
        ends.append(end)
    return ends


# ---- vocabularies ----


class Vocabulary:
    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        get = lambda key: (lambda f: f.contents() if f else None)(reader.get_field("tokenizer.ggml." + key))
        self.path, self.model, self.pre = path, get("model"), get("pre")
        self.tokens, self.merges, self.types = get("tokens"), get("merges"), get("token_type")

    def reference(self):
        """The byte-level tokenizer as Hugging Face would have it."""
        merges = [(m[: m.index(" ", 1)], m[m.index(" ", 1) + 1 :]) for m in self.merges]
        t = Tokenizer(models.BPE({token: i for i, token in enumerate(self.tokens)}, merges, ignore_merges=self.pre == "llama-bpe"))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pre in ("gpt-2", "smollm"))
        if self.pre == "smollm":
            t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
        elif self.pre == "gpt-2":
            t.pre_tokenizer = level
        else:
            t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS[self.pre]), "isolated"), level])
        t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s, kind in zip(self.tokens, self.types) if kind == CONTROL])
        t.add_tokens([AddedToken(s, special=False, normalized=False) for s, kind in zip(self.tokens, self.types) if kind == USER])
        return t

    def encode(self, strings, special, llama):
        if self.model == "llama":
            return llama(self.path, strings, special)
        t = self.reference()
        t.encode_special_tokens = not special
        return [e.ids for e in t.encode_batch(strings, add_special_tokens=False)]


LLAMA = r"""
#include "llama.h"
#include <cstdio>
#include <cstdlib>
#include <vector>
int main(int, char **argv) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    auto params = llama_model_default_params();
    params.vocab_only = true;
    auto *vocab = llama_model_get_vocab(llama_model_load_from_file(argv[1], params));
    uint32_t n;
    while (fread(&n, 4, 1, stdin) == 1) {
        std::vector<char> text(n + 1);
        if (fread(text.data(), 1, n, stdin) != n) return 1;
        std::vector<llama_token> ids(n + 16);
        uint32_t count = llama_tokenize(vocab, text.data(), n, ids.data(), ids.size(), false, atoi(argv[2]));
        fwrite(&count, 4, 1, stdout);
        fwrite(ids.data(), 4, count, stdout);
    }
}
"""


def build_llama(folder, source, libraries):
    program, code = pathlib.Path(folder) / "tokenize", pathlib.Path(folder) / "tokenize.cpp"
    code.write_text(LLAMA)
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base"]
    subprocess.run(["g++", f"-I{source}/include", f"-I{source}/ggml/include", code, "-o", program] + link, check=True)

    def encode(path, strings, special):
        data = b"".join(struct.pack("<I", len(s.encode())) + s.encode() for s in strings)
        out = subprocess.run([program, path, str(int(special))], input=data, stdout=subprocess.PIPE, check=True).stdout
        result, at = [], 0
        while at < len(out):
            (n,) = struct.unpack_from("<I", out, at)
            result.append(list(struct.unpack_from(f"<{n}i", out, at + 4)))
            at += 4 + 4 * n
        assert len(result) == len(strings)
        return result

    return encode


def write_gguf(path, model, pre, tokens, types, merges=None, scores=None, **ids):
    w = gguf.GGUFWriter(path, "llama")
    w.add_tokenizer_model(model)
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types(types)
    if merges is not None:
        w.add_token_merges(merges)
    if scores is not None:
        w.add_token_scores(scores)
    for name, value in ids.items():
        (w.add_bool if isinstance(value, bool) else w.add_uint32)("tokenizer.ggml." + name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()


def write_byte_level(folder, strings):
    """One small vocabulary with each pre-tokenizer."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(strings, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    trained = json.loads(t.to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].get)
    merges = [" ".join(m) for m in trained["merges"]]
    whole = ["qzxqzx", "\u0120qzx", "\u0120\u0120qzx"]  # no merges lead here: reached only where a word that is a token is taken whole
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im|>", "<|eot_id|>"]
    user = ["<think>", "   ", "</think>"]
    types = [NORMAL] * (len(tokens) + len(whole)) + [CONTROL] * len(special) + [USER] * len(user)
    tokens += whole + special + user
    end = tokens.index("<|endoftext|>")
    for pre in PATTERNS:
        own, kinds = list(tokens), list(types)
        if pre == "smollm":  # like SmolLM's, without a token for some byte
            missing = own.index("\u0106")
            own[missing], kinds[missing] = "[PAD0]", UNUSED
        write_gguf(folder / f"tokenizer_{pre}.gguf", "gpt2", pre, own, kinds, merges, bos_token_id=end, eos_token_id=end)


def write_sentencepiece(folder, strings):
    """Words apart (as Llama's vocabulary), and one whose pieces cross spaces and whose scores have ties."""
    counts = collections.Counter("".join(strings))
    common = set(sorted(counts, key=lambda c: (-counts[c], c))[:300])
    strings = [s for s in strings if common.issuperset(s)]
    for name, crossing in (("spm", False), ("spm-crossing", True)):
        t = Tokenizer(models.BPE())
        t.normalizer = normalizers.Replace(" ", "\u2581")
        if not crossing:
            t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        t.train_from_iterator(strings, trainers.BpeTrainer(vocab_size=900, show_progress=False))
        trained = json.loads(t.to_str())["model"]
        merged = ["".join(m) for m in trained["merges"]]
        single = [s for s in sorted(trained["vocab"], key=trained["vocab"].get) if len(s) == 1]
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
        types, scores = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256, [0.0] * 259
        for i, piece in enumerate(dict.fromkeys(merged)):
            tokens.append(piece)
            scores.append(-float(i // 4 if crossing else i))
        for i, piece in enumerate(single):
            tokens.append(piece)
            scores.append(-float(len(merged) + i))
        types += [NORMAL] * (len(tokens) - len(types))
        for piece, kind in (("<think>", USER), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<b>", USER)):
            tokens.append(piece)
            types.append(kind)
            scores.append(-1000.0)
        ids = dict(bos_token_id=1, eos_token_id=2, unknown_token_id=0, add_bos_token=True, add_eos_token=False, add_space_prefix=not crossing)
        write_gguf(folder / f"tokenizer_{name}.gguf", "llama", "default", tokens, types, None, scores, **ids)


def write_tokenizer(output, options):
    strings = make_strings()
    training = [s for s in strings if not any(c in s for c in "<\x06\x00")]  # llama.cpp takes tokens as C strings
    write_byte_level(output, training)
    write_sentencepiece(output, training)
    columns = [(f"split {name}", [fnv(split_ends(name, s)) for s in strings]) for name in PATTERNS]
    vocabularies = [(f"tokenizer_{name}", output / f"tokenizer_{name}.gguf") for name in list(PATTERNS) + ["spm", "spm-crossing"]]
    vocabularies.append(("smollm2", options.model))
    vocabularies += [(name, options.vocabs / f"{name}.gguf") for name in (f"ggml-vocab-{v}" for v in ("qwen2", "llama-bpe", "gpt-2", "llama-spm", "phi-3"))]
    vocabularies.append(("gemma3", options.gemma))
    with tempfile.TemporaryDirectory() as folder:
        llama = build_llama(folder, options.llama_source, options.llama_libraries)
        for name, path in vocabularies:
            v = Vocabulary(path)
            for special in (False, True):
                ids = v.encode(strings, special, llama)
                columns.append((f"{'special' if special else 'plain'} {name}", [fnv(i) for i in ids]))
    with open(output / "tokenizer.bin", "wb") as f:
        f.write(struct.pack("<II", len(strings), len(columns)))
        for s in strings:
            f.write(struct.pack("<I", len(s.encode())) + s.encode())
        for name, hashes in columns:
            f.write(struct.pack("<I", len(name)) + name.encode() + struct.pack(f"<{len(hashes)}I", *hashes))


# ---- chat templates ----
# The templates that models of these families are published with, shortened where they deal with tools.

CHAT = {
    "chatml": [
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        # Qwen2.5
        r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
        # Qwen3: no default system message; thoughts of earlier answers are dropped
        r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
        # a default in double quotes with an escaped quote, and one in plain text
        r"""{% if messages[0]['role'] != 'system' %}{{ "<|im_start|>system\nYou're \"brief\".<|im_end|>\n" }}{% endif %}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are 'Dolphin'.<|im_end|>\n{% endif %}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ],
    "llama-2": [
        r"{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        r"{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ],
    "llama-3": [
        r"{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ],
    "llama-3.1": [
        r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    ],
    "mistral": [
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    ],
    "mistral-v1": [
        r"""{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    ],
    "mistral-v3": [
        r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is defined and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    ],
    "mistral-v3-tekken": [
        r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is defined and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS][" }}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    ],
    "mistral-v7": [
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}{{ '[SYSTEM_PROMPT] ' + message['content'] + '[/SYSTEM_PROMPT]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}{% endfor %}",
    ],
    "mistral-v7-tekken": [
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
    ],
    "gemma": [
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        # Gemma 3
        """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
""",
    ],
    "phi-3": [
        "{{ bos_token }}{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ],
    "phi-4": [
        "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    ],
    "zephyr": [
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    ],
    "deepseek": [
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}",
    ],
    "deepseek-r1": [
        r"{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\n'}}{% endif %}",
    ],
}  # fmt: skip

# BOS and EOS of the models that are published with these templates
MARKS = {
    "chatml": ("", "<|im_end|>"), "llama-3": ("<|begin_of_text|>", "<|eot_id|>"), "llama-3.1": ("<|begin_of_text|>", "<|eot_id|>"), "gemma": ("<bos>", "<end_of_turn>"),
    "phi-3": ("<s>", "<|endoftext|>"), "phi-4": ("", "<|im_end|>"), "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), "deepseek-r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}  # fmt: skip

CONVERSATIONS = [
    (["user", "What is a rose?"],),
    (["system", "Be brief."], ["user", "What is a rose?"]),
    (["user", "Hi"], ["assistant", "Hello. What can I do?"], ["user", "Spell “naïve”."]),
    (["system", "Be brief.\nAnd kind."], ["user", "Hi"], ["assistant", "Hello!"], ["user", "Who?"], ["assistant", "I."], ["user", "Why?"]),
    (["user", "  white space around \n"], ["assistant", "\n kept or not "], ["user", "\t\u00a0more\u3000\x1f\n"]),
    (["user", "Two and two?"], ["assistant", "<think>\nIt is\nfour.\n</think>\n\nFour."], ["user", "<|im_end|> {{ braces }} [INST] </s>"]),
    (["user", ""],),
]


def render(template, family, conversation):
    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    bos, eos = MARKS.get(family, ("<s>", "</s>"))
    messages = [{"role": role, "content": content} for role, content in conversation]
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos)


def write_chat(output):
    def string(s):
        return struct.pack("<I", len(s.encode())) + s.encode()

    records = []
    for family, templates in CHAT.items():
        for template in templates:
            for conversation in CONVERSATIONS:
                try:
                    expected = render(template, family, conversation)
                except ValueError:  # the template refuses system messages
                    continue
                messages = b"".join(string(role) + string(content) for role, content in conversation)
                records.append(string(family) + string(template) + struct.pack("<I", len(conversation)) + messages + string(expected))
    (output / "chat.bin").write_bytes(struct.pack("<I", len(records)) + b"".join(records))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--gemma", "--vocabs", "--llama-source", "--llama-libraries"):
        p.add_argument(name, type=pathlib.Path, required=True)
    p.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tests/data"))
    options = p.parse_args()
    write_chat(options.output)
    write_tokenizer(options.output, options)


if __name__ == "__main__":
    main()
