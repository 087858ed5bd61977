#!/usr/bin/env python3
"""Reads stored contexts by docs/context-format.md alone: test_context_format.py [BUILD_FOLDER]

A reader that shares nothing with quarry's own but the specification. What it finds must add up, and be the same however a text was cut."""
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import unittest

DEBIAN_PYTHON = "/usr/bin/python3"  # for which there is a package
try:
    import xxhash
except ImportError:
    xxhash = None
    if os.path.exists(DEBIAN_PYTHON) and os.path.realpath(sys.executable) != os.path.realpath(DEBIAN_PYTHON):
        os.execv(DEBIAN_PYTHON, [DEBIAN_PYTHON, *sys.argv])

QUARRY = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build") / "quarry"
MODELS = pathlib.Path(os.environ.get("QUARRY_TINY_MODELS", ""))
SINKS = 8


def up(n, multiple):
    return -(-n // multiple) * multiple


class Piece:
    """One file, every byte of which is accounted for."""

    def __init__(self, path):
        self.data = data = pathlib.Path(path).read_bytes()
        magic, version, size = struct.unpack_from("<8sII", data)
        assert (magic, version, size) == (b"QUARRYCX", 1, 4096)
        self.check(0, 4096)
        self.key, self.parent = data[16:32], data[32:48]
        self.fingerprint, self.first, self.end = struct.unpack_from("<3Q", data, 48)
        self.n_layer, self.heads, self.d, self.type, self.n_local, self.window = struct.unpack_from("<6I", data, 72)
        n_segments, self.segments_end, n_state, _ = struct.unpack_from("<4Q", data, 96)
        self.index, self.about = (data[a:b].rstrip(b"\0").decode() for a, b in ((128, 384), (384, 1408)))
        assert not any(data[1408:4088])
        self.row_bytes = 2 * self.d * (4 if self.type else 2)
        self.block_rows = next(n for n in range(1, 4097) if n * self.row_bytes % 4096 == 0)
        n = self.end - self.first
        self.tokens = struct.unpack_from(f"<{n}I", data, 4096)
        at = up(4096 + 4 * n, 64)
        self.segments = [struct.unpack_from("<3Q", data, at + 24 * i) for i in range(n_segments)]
        at = self.check(4096, up(at + 24 * n_segments + 8, 64))
        digest = xxhash.xxh3_128(data[32:48] + data[48:96] + self.index.encode() + b"\0" + struct.pack(f"<{n}I", *self.tokens))
        assert digest.digest() == self.key
        assert pathlib.Path(path).name == self.key.hex() + ".piece"
        self.read_regions(self.check_records(at, n_state))

    def check(self, start, end):
        assert xxhash.xxh3_64_intdigest(self.data[start:end - 8]) == struct.unpack_from("<Q", self.data, end - 8)[0], (start, end)
        return end

    def check_records(self, at, n_state):
        """The regions: (positions of a part's rows, parts, orders, checksums of blocks by part); returns where rows begin."""
        kept = max(0, self.end - self.window + 1 - 512) // 256 * 256 if self.n_local else 0
        loose = list(range(min(SINKS, self.end))) if self.first == 0 else []
        loose += range(self.segments_end, self.end)
        regions = [(list(range(first, first + n)), part_bytes) for first, n, part_bytes in self.segments]
        regions += [(loose, None), (list(range(max(self.first, kept), self.end)), None)]
        self.regions = []
        for i, (positions, part_bytes) in enumerate(regions):
            n, blocks = len(positions), -(-len(positions) // self.block_rows)
            parts = (self.n_local if i == len(regions) - 1 else self.n_layer) * self.heads
            extra = 0 if part_bytes is None else 2 * n + part_bytes
            orders, sums = [], []
            for _ in range(parts):
                end = self.check(at, at + up(extra + 8 * blocks + 8, 64))
                order = range(n) if part_bytes is None else struct.unpack_from(f"<{n}H", self.data, at)
                assert sorted(order) == list(range(n))
                assert not any(self.data[at + extra + 8 * blocks:end - 8])
                orders.append([positions[k] for k in order])
                sums.append(struct.unpack_from(f"<{blocks}Q", self.data, at + extra))
                at = end
            self.regions.append((orders, sums))
        return self.check(at, up(at + n_state + 8, 4096))

    def read_regions(self, at):
        """self.rows[region]: {(part, position): row}"""
        self.rows, block_bytes = [], self.block_rows * self.row_bytes
        for orders, sums in self.regions:
            rows = {}
            for part, (order, blocks) in enumerate(zip(orders, sums)):
                for i, expected in enumerate(blocks):
                    assert xxhash.xxh3_64_intdigest(self.data[at + i * block_bytes:at + (i + 1) * block_bytes]) == expected
                for i, position in enumerate(order):
                    rows[part, position] = self.data[at + i * self.row_bytes:at + (i + 1) * self.row_bytes]
                at += len(blocks) * block_bytes
            self.rows.append(rows)
        assert at == len(self.data), (at, len(self.data))


def chain_of(folder):
    """The pieces of a store that holds one context, in order."""
    pieces = {p.parent: p for p in map(Piece, pathlib.Path(folder).glob("*.piece"))}
    chain = [pieces[bytes(16)]]
    while chain[-1].key in pieces:
        chain.append(pieces[chain[-1].key])
    assert len(chain) == len(pieces)
    return chain


def rows_of(chain):
    """What a context's rows are: (those of all layers, those of layers with a window)."""
    everything = {}
    for p in chain:
        for region in p.rows[:-2]:
            everything.update(region)
    everything.update({k: v for k, v in chain[0].rows[-2].items() if k[1] < SINKS})
    everything.update(chain[-1].rows[-2])
    last = chain[-1]
    kept = max(0, last.end - last.window + 1 - 512) // 256 * 256 if last.n_local else 0
    return everything, {k: v for p in chain for k, v in p.rows[-1].items() if k[1] >= kept}


@unittest.skipUnless(xxhash, "python3-xxhash is not installed")
class ContextFormat(unittest.TestCase):
    def create(self, folder, model, documents, *options):
        store = tempfile.mkdtemp(dir=folder)
        names = [flag for d in documents for flag in ("--doc", str(d))]
        subprocess.run([QUARRY, "context", "create", "-q", "-m", MODELS / model, "--attn", "ivfpq:segment=128", "--store", store, *names, *options], check=True)
        return chain_of(store)

    def test_files_are_as_specified_and_add_up(self):
        words = [f"{a} {b} the {c}." for a in "one two three four five".split() for b in "sees hears finds".split() for c in "sea hill road door lamp".split()]
        for model, options in (("llama-f32.gguf", []), ("gemma3-q8_0.gguf", []), ("llama-mha-f16.gguf", ["--kv-f32"])):
            with self.subTest(model=model), tempfile.TemporaryDirectory() as folder:
                one, two = pathlib.Path(folder) / "one.txt", pathlib.Path(folder) / "two.txt"
                one.write_text(" ".join(words[:20]))
                two.write_text(" ".join(words[20:40]))
                first, both = self.create(folder, model, [one], *options), self.create(folder, model, [one, two], *options)
                self.assertEqual([p.key for p in first], [p.key for p in both[:1]])  # the same piece
                for chain in (first, both):
                    p = chain[-1]
                    rows, local = rows_of(chain)
                    parts, end = p.n_layer * p.heads, p.end
                    self.assertEqual(set(rows), {(part, pos) for part in range(parts) for pos in range(end)})
                    self.assertLessEqual({(part, pos) for part in range(p.n_local * p.heads) for pos in range(max(0, end - p.window), end)}, set(local))
                    self.assertEqual(p.about.split("\n")[0].split(" ")[0], "model")
                self.assertTrue(both[0].segments and both[1].segments)
                self.assertIn("document two.txt", both[1].about)
                before, after = rows_of(first)[0], rows_of(both)[0]
                self.assertTrue(all(after[k] == row for k, row in before.items()))  # wherever a row lies now


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
