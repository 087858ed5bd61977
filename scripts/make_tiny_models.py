#!/usr/bin/env python3
"""Writes tiny random GGUF models for tests: every supported architecture, in F32, F16, Q8_0, Q4_0 and Q4_1.

    make_tiny_models.py FOLDER [MODEL...]

FOLDER/MODEL-TYPE.gguf, for example llama-f32.gguf (about 0.4 MB; all together 8 MB, in a few seconds). The standard library suffices.

The weights come from random.random() of a fixed seed, which Python promises to keep, and from exactly rounded arithmetic: they are the same on
every machine, so that stored reference logits (make_model_fixtures.py) belong to them. Their scales make attention choose (scores spread by about 2)
and logits spread by several units, so that a mistake anywhere shows. q4_1 keeps its embeddings in Q8_0, as the default model does; norms and biases
are F32 throughout.

The tokenizer is byte-level BPE: three control tokens (0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>), 256 bytes, 41 merges; chatml template.
"""
import math
import os
import random
import struct
import sys

UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5
BLOCK_TYPE = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 8}
N_VOCAB, ALIGNMENT = 300, 32

# head_dim differs from n_embd / n_head where key_length is said; rows and columns are multiples of 32 but not of more.
MODELS = {
    "llama": dict(arch="llama", seed=1, n_embd=64, n_layer=3, n_head=4, n_head_kv=2, head_dim=16, n_ff=96, base=10000.0, tied=False, pre="smollm"),
    "llama-tied": dict(arch="llama", seed=2, n_embd=96, n_layer=2, n_head=3, n_head_kv=1, head_dim=32, n_ff=160, base=100000.0, tied=True, pre="smollm"),
    "llama-mha": dict(arch="llama", seed=3, n_embd=64, n_layer=2, n_head=4, n_head_kv=4, head_dim=16, n_ff=96, base=10000.0, tied=False, pre="gpt-2"),
    "llama-freqs": dict(arch="llama", seed=4, n_embd=64, n_layer=2, n_head=2, n_head_kv=1, head_dim=32, n_ff=96, base=500000.0, tied=False,
                        pre="llama-bpe", add_bos=True, llama3=dict(factor=8.0, low=1.0, high=4.0, original=64)),
    "qwen2": dict(arch="qwen2", seed=5, n_embd=64, n_layer=3, n_head=4, n_head_kv=2, head_dim=16, n_ff=96, base=1000000.0, tied=True, pre="qwen2"),
    "qwen3": dict(arch="qwen3", seed=6, n_embd=64, n_layer=3, n_head=4, n_head_kv=2, head_dim=32, n_ff=96, base=1000000.0, tied=False, pre="qwen2"),
    # five layers with a window, one that sees everything, one with a window
    "gemma3": dict(arch="gemma3", seed=7, n_embd=64, n_layer=7, n_head=4, n_head_kv=1, head_dim=32, n_ff=96, base=1000000.0, tied=True, pre="smollm", window=16),
}
RMS_EPSILON, N_CONTEXT = 1e-5, 16384

MERGES = """Ġ t|h e|Ġ a|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|o u|Ġ o|e n|i s|Ġ b|e d|Ġ c|i t|Ġ f|a n|Ġ m|in g|Ġ p|e s|o r|Ġo f|Ġ d|a r|Ġ in|a l|Ġ an|Ġan d|Ġt o|l l|Ġ h|o m|a s|
Ġ l|i c|v e""".replace("\n", "").split("|")

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def byte_letters():
    """The letter that byte-level BPE writes for each byte: itself if printable, else one from U+0100 on."""
    printable = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def vocabulary():
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + byte_letters()
    for merge in MERGES:
        left, right = merge.split(" ")
        assert left in tokens and right in tokens and left + right not in tokens, merge
        tokens.append(left + right)
    assert len(tokens) == N_VOCAB
    return tokens


# ---- the file format ----


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind, x):
    if kind == STRING:
        return string(x)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], x)


def pair(key, kind, x):
    if isinstance(x, list):
        return string(key) + struct.pack("<IIQ", ARRAY, kind, len(x)) + b"".join(value(kind, e) for e in x)
    return string(key) + struct.pack("<I", kind) + value(kind, x)


def quantize(kind, x):
    """Blocks of 32 weights, rounded as ggml's reference quantisation does."""
    if kind in ("f32", "f16"):
        return struct.pack("<%d%s" % (len(x), "f" if kind == "f32" else "e"), *x)
    out = []
    for i in range(0, len(x), 32):
        block = x[i:i + 32]
        if kind == "q8_0":
            d = max(abs(w) for w in block) / 127
            q = [math.floor(w / d + 0.5) if d else 0 for w in block]
            out.append(struct.pack("<e32b", d, *q))
            continue
        if kind == "q4_0":
            d = max(block, key=abs) / -8
            q = [min(15, int(w / d + 8.5)) if d else 8 for w in block]
            head = struct.pack("<e", d)
        else:
            low = min(block)
            d = (max(block) - low) / 15
            q = [min(15, int((w - low) / d + 0.5)) if d else 0 for w in block]
            head = struct.pack("<ee", d, low)
        out.append(head + bytes(q[j] | q[j + 16] << 4 for j in range(16)))
    return b"".join(out)


def write_gguf(path, pairs, tensors):
    """tensors: (name, dims with columns first, block type, bytes)."""
    infos, data = [], bytearray()
    for name, dims, kind, content in tensors:
        infos.append(string(name) + struct.pack("<I%dQIQ" % len(dims), len(dims), *dims, BLOCK_TYPE[kind], len(data)))
        data += content + bytes(-len(content) % ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pair(*p) for p in pairs) + b"".join(infos)
    with open(path + ".part", "wb") as f:
        f.write(head + bytes(-len(head) % ALIGNMENT) + data)
    os.replace(path + ".part", path)


# ---- the models ----


def llama3_factors(m):
    """What divides the angle of each pair (Llama 3.1's rule): long waves are stretched by factor, short ones kept, those between blended."""
    r, n_rot, factors = m["llama3"], m["head_dim"], []
    for i in range(n_rot // 2):
        wave = 2 * math.pi * m["base"] ** (2 * i / n_rot)
        if wave < r["original"] / r["high"]:
            factors.append(1.0)
        elif wave > r["original"] / r["low"]:
            factors.append(r["factor"])
        else:
            smooth = (r["original"] / wave - r["low"]) / (r["high"] - r["low"])
            factors.append(1 / ((1 - smooth) / r["factor"] + smooth))
    return factors


def make_tensors(m):
    """(name, dims, values) in the order of the file; values rounded to f32."""
    rnd = random.Random(m["seed"])
    tensors = []

    def add(name, dims, deviation, mean=0.0):
        n = dims[0] * (dims[1] if len(dims) > 1 else 1)
        width = deviation * math.sqrt(12.0)  # of a uniform distribution
        values = [mean + width * (rnd.random() - 0.5) for _ in range(n)]
        tensors.append((name, dims, struct.unpack("<%df" % n, struct.pack("<%df" % n, *values))))

    n_embd, n_ff, d = m["n_embd"], m["n_ff"], m["head_dim"]
    q, kv = m["n_head"] * d, m["n_head_kv"] * d
    unit = 1 / math.sqrt(n_embd)  # a matrix of this deviation keeps the scale of its input
    add("token_embd.weight", (n_embd, N_VOCAB), 0.35)
    for i in range(m["n_layer"]):
        layer = "blk.%d." % i
        add(layer + "attn_norm.weight", (n_embd,), 0.2, 1.0)
        add(layer + "attn_q.weight", (n_embd, q), 1.4 * unit)
        add(layer + "attn_k.weight", (n_embd, kv), 1.4 * unit)
        add(layer + "attn_v.weight", (n_embd, kv), unit)
        if m["arch"] == "qwen2":
            for part, n in (("q", q), ("k", kv), ("v", kv)):
                add(layer + "attn_%s.bias" % part, (n,), 0.5)
        if m["arch"] in ("qwen3", "gemma3"):
            for part in "qk":
                add(layer + "attn_%s_norm.weight" % part, (d,), 0.3, 1.4)
        add(layer + "attn_output.weight", (q, n_embd), 0.7 / math.sqrt(q))
        for norm in ("post_attention_norm", "ffn_norm", "post_ffw_norm") if m["arch"] == "gemma3" else ("ffn_norm",):
            add(layer + norm + ".weight", (n_embd,), 0.2, 1.0)
        add(layer + "ffn_gate.weight", (n_embd, n_ff), unit)
        add(layer + "ffn_up.weight", (n_embd, n_ff), unit)
        add(layer + "ffn_down.weight", (n_ff, n_embd), 1 / math.sqrt(n_ff))
    add("output_norm.weight", (n_embd,), 0.2, 1.0)
    if not m["tied"]:
        add("output.weight", (n_embd, N_VOCAB), 2.5 * unit)
    if "llama3" in m:
        tensors.append(("rope_freqs.weight", (d // 2,), llama3_factors(m)))
    return tensors


def make_pairs(name, m, kind):
    arch, tokens = m["arch"], vocabulary()
    pairs = [
        ("general.architecture", STRING, arch),
        ("general.name", STRING, "tiny %s %s" % (name, kind)),
        ("general.alignment", UINT32, ALIGNMENT),
        (arch + ".context_length", UINT32, N_CONTEXT),
        (arch + ".embedding_length", UINT32, m["n_embd"]),
        (arch + ".block_count", UINT32, m["n_layer"]),
        (arch + ".feed_forward_length", UINT32, m["n_ff"]),
        (arch + ".attention.head_count", UINT32, m["n_head"]),
        (arch + ".attention.head_count_kv", UINT32, m["n_head_kv"]),
        (arch + ".attention.layer_norm_rms_epsilon", FLOAT32, RMS_EPSILON),
        (arch + ".rope.freq_base", FLOAT32, m["base"]),
        (arch + ".vocab_size", UINT32, N_VOCAB),
        ("tokenizer.ggml.model", STRING, "gpt2"),
        ("tokenizer.ggml.pre", STRING, m["pre"]),
        ("tokenizer.ggml.tokens", STRING, tokens),
        ("tokenizer.ggml.token_type", INT32, [3] * 3 + [1] * (N_VOCAB - 3)),
        ("tokenizer.ggml.merges", STRING, MERGES),
        ("tokenizer.ggml.bos_token_id", UINT32, 1),
        ("tokenizer.ggml.eos_token_id", UINT32, 2),
        ("tokenizer.ggml.add_bos_token", BOOL, m.get("add_bos", False)),
        ("tokenizer.chat_template", STRING, CHATML),
    ]
    if m["head_dim"] * m["n_head"] != m["n_embd"]:
        pairs += [(arch + ".attention.key_length", UINT32, m["head_dim"]), (arch + ".attention.value_length", UINT32, m["head_dim"])]
    if "window" in m:
        pairs.append((arch + ".attention.sliding_window", UINT32, m["window"]))
    if arch == "llama":
        pairs.append((arch + ".rope.dimension_count", UINT32, m["head_dim"]))
    return pairs


def tensor_type(name, dims, kind):
    if len(dims) == 1:
        return "f32"
    return "q8_0" if kind == "q4_1" and name == "token_embd.weight" else kind


def main():
    if len(sys.argv) < 2 or any(name not in MODELS for name in sys.argv[2:]):
        sys.exit("usage: make_tiny_models.py FOLDER [MODEL...]   with MODEL one of " + ", ".join(MODELS))
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    for name in sys.argv[2:] or MODELS:
        tensors = make_tensors(MODELS[name])
        for kind in BLOCK_TYPE:
            types = [tensor_type(n, dims, kind) for n, dims, _ in tensors]
            blocks = [(n, dims, t, quantize(t, x)) for (n, dims, x), t in zip(tensors, types)]
            write_gguf(os.path.join(folder, "%s-%s.gguf" % (name, kind)), make_pairs(name, MODELS[name], kind), blocks)


if __name__ == "__main__":
    main()
