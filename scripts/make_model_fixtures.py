#!/usr/bin/env python3
"""Makes the reference outputs that the forward pass is tested against, from programs that are not ours.

    make_model_fixtures.py tiny REFERENCE_LOGITS
        tests/data/tiny_logits.bin: transformers and torch, on the F32 models of make_tiny_models.py, computed in float64. llama.cpp runs the same
        files as a second opinion; the two must agree (the differences are printed).
    make_model_fixtures.py smollm2 REFERENCE_LOGITS LLAMA_TOKENIZE SMOLLM2.gguf
        tests/data/smollm2_logprobs.bin, smollm2_greedy.bin: llama.cpp on the default model (SmolLM2-135M-Instruct Q4_1) with its weights written
        out in F32, so that the reference rounds neither activations nor keys and values. What llama.cpp itself loses on the Q4_1 file is printed.

REFERENCE_LOGITS is scripts/reference_logits.c, compiled; LLAMA_TOKENIZE is llama.cpp's llama-tokenize. Needs numpy, gguf, torch, transformers (tiny).

All files are little-endian and without padding.

tiny_logits.bin
    char magic[8] "QLOGITS1"; uint32 n_models; then for each model:
    char name[16] (zeros behind it; the file is name-f32.gguf); uint32 n_tokens, n_positions, n_vocab;
    int32 tokens[n_tokens]; int32 positions[n_positions] (ascending); float32 logits[n_positions][n_vocab] (what follows tokens[positions[i]])

smollm2_logprobs.bin
    char magic[8] "QLOGPRB1"; uint32 n_texts, n_top; then for each text:
    uint32 n_tokens; int32 tokens[n_tokens]; then for each of the n_tokens positions:
    int32 ids[n_top] (most probable first); float32 log_probabilities[n_top]; float32 rest (probability of all other tokens)
    KL >= sum p (log p - log q) over the top + rest (log rest - log q's rest); the tail's own divergence is left out.

smollm2_greedy.bin
    char magic[8] "QGREEDY1"; uint32 n_prompts; then for each prompt:
    uint32 n_prompt, n_generated; int32 tokens[n_prompt + n_generated]; float32 margins[n_generated]
    margins[i]: by how much the best logit leads the second where generated token i is chosen. The last token may be the end of the turn.
"""
import os
import random
import struct
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import make_tiny_models as tiny  # noqa: E402

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "data")
N_TOKENS, POSITIONS, N_TOP, N_TEXT, N_GENERATE = 40, (0, 1, 5, 13, 27, 39), 64, 64, 32

# Openings of novels in the public domain (Austen 1811-1817, Melville 1851).
TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. However little known the "
    "feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding "
    "families, that he is considered as the rightful property of some one or other of their daughters.",
    "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, seemed to unite some of the best blessings of "
    "existence; and had lived nearly twenty-one years in the world with very little to distress or vex her. She was the youngest of the two daughters "
    "of a most affectionate, indulgent father; and had, in consequence of her sister's marriage, been mistress of his house from a very early period.",
    "The family of Dashwood had long been settled in Sussex. Their estate was large, and their residence was at Norland Park, in the centre of their "
    "property, where, for many generations, they had lived in so respectable a manner as to engage the general good opinion of their surrounding "
    "acquaintance. The late owner of this estate was a single man, who lived to a very advanced age.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing particular to interest me on "
    "shore, I thought I would sail about a little and see the watery part of the world. It is a way I have of driving off the spleen and regulating "
    "the circulation. Whenever I find myself growing grim about the mouth, I account it high time to get to sea as soon as I can.",
]

CHAT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little girl who lived in the",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5, 6,",
    CHAT % "What is the capital of Italy?",
    CHAT % "Write one sentence about the sea.",
]


def run_reference(program, model, n_generate, sequences):
    """(tokens[n], logits[n][n_vocab]) of each sequence, from scripts/reference_logits.c."""
    text = "".join(" ".join(map(str, s)) + "\n" for s in sequences)
    out = subprocess.run([program, model, str(n_generate)], input=text.encode(), stdout=subprocess.PIPE, check=True).stdout
    at, results, n_vocab = 0, [], vocabulary_size(model)
    while at < len(out):
        n = struct.unpack_from("<I", out, at)[0]
        tokens = np.frombuffer(out, "<i4", n, at + 4)
        logits = np.frombuffer(out, "<f4", n * n_vocab, at + 4 + 4 * n).reshape(n, n_vocab)
        results.append((tokens, logits))
        at += 4 + 4 * n + 4 * n * n_vocab
    assert at == len(out) and len(results) == len(sequences)
    return results


def vocabulary_size(model):
    from gguf import GGUFReader
    return len(GGUFReader(model).fields["tokenizer.ggml.tokens"].data)


def log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ---- tiny models, through transformers ----


def state_of(path, m):
    """The GGUF file's tensors under transformers' names; llama's query and key rows go back from adjacent pairs to halves."""
    import torch
    from gguf import GGUFReader
    gemma = m["arch"] == "gemma3"  # whose norms are stored with the 1 that transformers adds, and where ffn_norm means what its name says
    parts = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
             "ffn_norm": "pre_feedforward_layernorm" if gemma else "post_attention_layernorm",
             "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    ends = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    state = {}
    for t in GGUFReader(path).tensors:
        x = np.array(t.data, dtype=np.float64)
        if t.name == "rope_freqs.weight":
            continue
        stem, kind = t.name.rsplit(".", 1)
        if gemma and stem.endswith("_norm"):
            x = x - 1
        if m["arch"] == "llama" and stem.endswith(("attn_q", "attn_k")):
            x = x.reshape(-1, m["head_dim"] // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            stem = "model.layers.%s.%s" % (layer, parts[part])
        else:
            stem = ends[stem]
        state[stem + "." + kind] = torch.from_numpy(np.ascontiguousarray(x))
    return state


def transformers_logits(path, m, tokens):
    import torch
    import transformers as tf
    config = dict(hidden_size=m["n_embd"], num_hidden_layers=m["n_layer"], num_attention_heads=m["n_head"], num_key_value_heads=m["n_head_kv"],
                  head_dim=m["head_dim"], intermediate_size=m["n_ff"], vocab_size=tiny.N_VOCAB, rms_norm_eps=tiny.RMS_EPSILON,
                  tie_word_embeddings=m["tied"], max_position_embeddings=tiny.N_CONTEXT, attn_implementation="eager")
    rope = dict(rope_type="default", rope_theta=m["base"])
    if "llama3" in m:
        r = m["llama3"]
        rope.update(rope_type="llama3", factor=r["factor"], low_freq_factor=r["low"], high_freq_factor=r["high"],
                    original_max_position_embeddings=r["original"])
    if "window" in m:
        local = dict(rope_type="default", rope_theta=10000.0)
        kinds = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(m["n_layer"])]
        rope = dict(full_attention=rope, sliding_attention=local)
        config.update(sliding_window=m["window"], layer_types=kinds, query_pre_attn_scalar=m["head_dim"], hidden_activation="gelu_pytorch_tanh")
    config["rope_parameters"] = rope
    kind = {"llama": (tf.LlamaConfig, tf.LlamaForCausalLM), "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM), "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM),
            "gemma3": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM)}
    make_config, make_model = kind[m["arch"]]
    model = make_model(make_config(**config)).double().eval()
    missing, unexpected = model.load_state_dict(state_of(path, m), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if m["tied"] else set()), (missing, unexpected)
    model.tie_weights()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def make_tiny(reference_program):
    out = [b"QLOGITS1", struct.pack("<I", len(tiny.MODELS))]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, tiny.__file__, folder], check=True)
        for name, m in tiny.MODELS.items():
            rnd = random.Random(100 + m["seed"])
            tokens = [rnd.randrange(tiny.N_VOCAB) for _ in range(N_TOKENS)]
            path = os.path.join(folder, name + "-f32.gguf")
            logits = transformers_logits(path, m, tokens)
            other = run_reference(reference_program, path, 0, [tokens])[0][1]
            spread = np.abs(logits).max()
            difference = np.abs(logits - other).max() / spread
            print("%-12s max |logit| %.1f, standard deviation %.2f, largest difference to llama.cpp %.1e of max |logit|" %
                  (name, spread, logits.std(), difference))
            assert difference < (5e-4 if m["arch"] == "gemma3" else 5e-5), name  # llama.cpp looks GELU up in a table of f16
            out += [struct.pack("<16sIII", name.encode(), N_TOKENS, len(POSITIONS), tiny.N_VOCAB), np.array(tokens, "<i4").tobytes(),
                    np.array(POSITIONS, "<i4").tobytes(), logits[list(POSITIONS)].astype("<f4").tobytes()]
    with open(os.path.join(DATA, "tiny_logits.bin"), "wb") as f:
        f.write(b"".join(out))


# ---- the default model, through llama.cpp ----


def write_f32(source, target):
    """The same model with all tensors in F32."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], element)
    for t in reader.tensors:
        writer.add_tensor(t.name, dequantize(t.data, t.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenize(program, model, text):
    out = subprocess.run([program, "-m", model, "-p", text, "--ids", "--log-disable", "--no-escape"], stdout=subprocess.PIPE, check=True).stdout
    return [int(x) for x in out.decode().strip().strip("[]").split(",")]


def pack_logprobs(results):
    out = [b"QLOGPRB1", struct.pack("<II", len(results), N_TOP)]
    for tokens, logits in results:
        out += [struct.pack("<I", len(tokens)), tokens.astype("<i4").tobytes()]
        for row in log_softmax(logits):
            top = np.argsort(-row, kind="stable")[:N_TOP]
            rest = np.exp(np.delete(row, top)).sum()
            out += [top.astype("<i4").tobytes(), row[top].astype("<f4").tobytes(), struct.pack("<f", rest)]
    return b"".join(out)


def pack_greedy(prompts, results):
    out = [b"QGREEDY1", struct.pack("<I", len(results))]
    for prompt, (tokens, logits) in zip(prompts, results):
        n = len(prompt)
        best = np.sort(logits[n - 1:-1].astype(np.float64), axis=1)
        margins = best[:, -1] - best[:, -2]
        print("greedy: %d + %d tokens, smallest margins %s" % (n, len(margins), np.round(np.sort(margins)[:4], 3)))
        out += [struct.pack("<II", n, len(margins)), tokens.astype("<i4").tobytes(), margins.astype("<f4").tobytes()]
    return b"".join(out)


def mean_kl(reference, other):
    p, q = log_softmax(np.concatenate([r[1] for r in reference])), log_softmax(np.concatenate([r[1] for r in other]))
    kl = (np.exp(p) * (p - q)).sum(-1)
    return kl.mean(), kl.max()


def make_smollm2(reference_program, tokenize_program, model):
    texts = [tokenize(tokenize_program, model, text)[:N_TEXT] for text in TEXTS]
    prompts = [tokenize(tokenize_program, model, text) for text in PROMPTS]
    assert all(len(t) == N_TEXT for t in texts)
    with tempfile.TemporaryDirectory() as folder:
        exact = os.path.join(folder, "f32.gguf")
        write_f32(model, exact)
        results = run_reference(reference_program, exact, 0, texts)
        greedy = run_reference(reference_program, exact, N_GENERATE, prompts)
    quantized = run_reference(reference_program, model, 0, texts)
    print("KL of llama.cpp on the quantised file to the reference: mean %.2e, largest %.2e" % mean_kl(results, quantized))
    quantized = run_reference(reference_program, model, N_GENERATE, prompts)
    for (a, _), (b, _) in zip(greedy, quantized):
        same = min(len(a), len(b))
        first = next((i for i in range(same) if a[i] != b[i]), None)
        print("greedy text of llama.cpp on the quantised file: %s" % ("the same" if first is None else "differs from token %d on" % first))
    for name, content in (("smollm2_logprobs.bin", pack_logprobs(results)), ("smollm2_greedy.bin", pack_greedy(prompts, greedy))):
        with open(os.path.join(DATA, name), "wb") as f:
            f.write(content)


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "tiny":
        make_tiny(sys.argv[2])
    elif len(sys.argv) == 5 and sys.argv[1] == "smollm2":
        make_smollm2(*sys.argv[2:])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
