# SPDX-License-Identifier: Apache-2.0
"""Altered files: bytes at random, and texts altered where they mean something. A seed gives the same file again."""

import json

TOKENS = (
    b"[", b"{", b"}", b"]", b'"', b"\\", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b"\t", b"null", b"true",
    b"NaN", b"Infinity", b"-1", b"1e999", b"0x", b"9" * 5000, b"[" * 3000, b"{\"a\":" * 3000, b"&a [*a, *a]", b"*a",
    b"!!python/object/apply:os.system ['true']", b"2001-99-99", b"? [a]\n: b", b"<<: {a: 1}", b"\\ud800", b"%YAML 9",
    b"---\n", b"...\n", b"0b_", b"0o9", b"1:99:99", b"!!binary x", b"!!set {a}", b"\xe2\x80\xa8", b"../../x",
)  # fmt: skip
VALUES = (
    None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**400, "", "../../x", "\x00", "\ud800", "x" * 5000, [], [[]],
    {}, {"": {}}, [None], [1, 2, 3, 4, 5], "os.system",
)  # fmt: skip


def altered_bytes(data, generator):
    """A few bytes replaced, perhaps cut off, perhaps with something behind."""
    out = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 4, 16])):
        if out:
            out[generator.randrange(len(out))] = generator.randrange(256)
    if generator.random() < 0.2:
        del out[generator.randrange(len(out) + 1) :]
    if generator.random() < 0.1:
        out += generator.randbytes(40)
    return bytes(out)


def altered_text(data, generator):
    """Bytes, tokens of the formats, or a value somewhere in a JSON document."""
    kind = generator.random()
    if kind < 0.3:
        return altered_bytes(data, generator)
    if kind < 0.7:
        try:
            return altered_json(data, generator)
        except ValueError:
            pass
    out = data
    for _ in range(generator.choice([1, 1, 2, 3])):
        start = generator.randrange(len(out) + 1)
        end = min(len(out), start + generator.choice([0, 0, 1, 8]))
        out = out[:start] + generator.choice(TOKENS) + out[end:]
    return out


def altered_json(data, generator):
    """One value, anywhere in the document, is another, or is gone. Lines of JSON: in one of the lines."""
    lines = data.split(b"\n") if data.count(b"\n{") or data.endswith(b"}\n") else [data]
    chosen = generator.choice([i for i, line in enumerate(lines) if line.strip()] or [0])
    document = [json.loads(lines[chosen])]
    node, key = generator.choice(list(places(document)))
    if generator.random() < 0.25 and node is not document:
        del node[key]
    else:
        node[key] = generator.choice(VALUES)
    lines[chosen] = json.dumps(document[0]).encode()
    return b"\n".join(lines)


def places(node):
    """Every (container, key) of a document."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from places(node[key])
