#!/usr/bin/env python3
"""Writes tests/data/blocks.bin: GGUF blocks and their values according to the Python package `gguf` (tested with 0.19).

    python3 scripts/make_block_fixtures.py tests/data/blocks.bin

A record is: u32 kind (0: bytes -> values, 1: values -> bytes), u32 type, u32 number of bytes, u32 number of values, the bytes, the values as f32.
"""
import struct
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T, quants

# Where the f16 scales of a block lie; all other bytes are random.
SCALES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.IQ4_NL: [0], T.Q2_K: [80, 82],
          T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
QUANTIZED = [T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0]


def record(kind, qtype, data, values):
    data, values = data.tobytes(), np.ascontiguousarray(values, dtype="<f4")
    return struct.pack("<4I", kind, qtype, len(data), values.size) + data + values.tobytes()


def main(path):
    random = np.random.default_rng(4)
    out = b""
    for qtype in [T.F16, T.BF16, *SCALES]:
        n_weights, n_bytes = GGML_QUANT_SIZES[qtype]
        n_blocks = max(2, 64 // n_weights)
        blocks = random.integers(0, 256, (n_blocks, n_bytes), dtype=np.uint8)
        for offset in SCALES.get(qtype, []):
            scales = random.normal(0, 0.02, n_blocks).astype("<f2")
            blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(n_blocks, 2)
        if qtype == T.F16:
            blocks = random.normal(0, 1, n_blocks).astype("<f2").view(np.uint8).reshape(n_blocks, 2)
        if qtype == T.BF16:
            blocks[:, 1] &= 0xBF  # exponents far from infinity
        out += record(0, qtype, blocks, quants.dequantize(blocks.reshape(-1), qtype))
    for qtype in QUANTIZED:
        values = random.normal(0, 1, 96).astype(np.float32)
        values[:32] *= 1e-3
        values[64:] = 0 if qtype != T.BF16 else values[64:] * 1e9
        out += record(1, qtype, quants.quantize(values, qtype), values)
    with open(path, "wb") as file:
        file.write(out)


main(sys.argv[1])
