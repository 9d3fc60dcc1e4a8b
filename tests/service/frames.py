"""The golden frames in ``frames.txt``, whose head describes the format."""

import re
from pathlib import Path

PATH = Path(__file__).with_name("frames.txt")

_TOKEN = re.compile(
    r"""\s+ | \#[^\n]*
      | (?P<name>[a-z][a-z0-9-]*):
      | "(?P<text>[^"\n]*)"
      | (?P<byte>[0-9a-f]{2})\*(?P<times>[0-9]+)
      | (?P<hex>(?:[0-9a-f]{2})+)(?=\s)
    """,
    re.VERBOSE,
)


def parsed(text: str) -> dict[str, bytes]:
    """The frames by name, in the order of the file."""
    frames: dict[str, bytearray] = {}
    frame = bytearray()
    at = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        assert token, f"line {text.count(chr(10), 0, at) + 1}: {text[at : at + 20]!r}"
        at = token.end()
        if name := token["name"]:
            assert name not in frames, name
            frame = frames[name] = bytearray()
        elif token["text"] is not None:
            frame += token["text"].encode("ascii")
        elif token["byte"]:
            frame += bytes.fromhex(token["byte"]) * int(token["times"])
        elif token["hex"]:
            frame += bytes.fromhex(token["hex"])
    return {name: bytes(frame) for name, frame in frames.items()}


#: The golden frames.
FRAMES = parsed(PATH.read_text("ascii"))
