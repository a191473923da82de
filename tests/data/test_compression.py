"""Compressed files: whole ones are read, cut ones are never complete, and little memory suffices."""

import bz2
import gzip
import lzma
import resource
import struct

import pytest
import zstandard

from deepseek_jax.data import compression, json_files
from tests.support.reading import TEXTS, contents, lines, read, skipping

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
MANY = [f"document {i} " + "word " * (i % 50) for i in range(2000)]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("form", ["jsonl", "ndjson", "json", "txt"])
def test_every_compression_of_every_format(tmp_path, suffix, form):
    path = tmp_path / f"c4-train.00000.{form.upper()}.{suffix}"
    plain = tmp_path / f"plain.{form}"
    plain.write_bytes("".join(MANY).encode() if form == "txt" else lines(MANY))
    path.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    assert contents(path) == contents(plain)
    assert len(contents(path)) > 20
    share = sum(document.num_file_bytes for document in read(path)[0])
    assert 0.8 * path.stat().st_size <= share <= path.stat().st_size  # for a progress bar


@pytest.mark.parametrize("suffix", COMPRESS)
def test_several_streams_and_zeros_after_them(tmp_path, suffix):
    compress = COMPRESS[suffix]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(compress(lines(TEXTS[:1])) + compress(lines(TEXTS[1:])) + bytes(70_000))
    assert contents(path) == TEXTS
    if suffix == "zst":  # a frame that decoders skip
        skipped = struct.pack("<II", 0x184D2A50, 5) + b"hello"
        path.write_bytes(skipped + compress(lines(TEXTS)) + skipped)
        assert contents(path) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("missing", [1, 3, "half"])
def test_a_cut_file_is_never_complete(tmp_path, suffix, missing):
    """Case 04: python-zstandard's reader calls a cut frame the end of the file."""
    whole = COMPRESS[suffix](lines(MANY))
    path = tmp_path / f"cut.jsonl.{suffix}"
    path.write_bytes(whole[: -len(whole) // 2 if missing == "half" else -missing])
    with pytest.raises(ValueError, match=r"cut.jsonl.\w+ .* after line \d+: it is cut off inside a compress"):
        read(path)
    texts, messages = skipping(path)
    assert texts == MANY[: len(texts)]
    assert len(messages) == 1
    text = tmp_path / f"cut.txt.{suffix}"
    text.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"cut.txt.\w+ cannot be read after \d+ bytes of text: it is cut off inside"):
        read(text)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_was_decoded_before_a_fault_is_kept(tmp_path, suffix):
    compress = COMPRESS[suffix]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(compress(lines(TEXTS).rstrip()) + b"bytes of something else")
    texts, (message,) = skipping(path)
    assert texts == TEXTS  # the last line too, whose end is that of the stream
    assert "a.jsonl" in message and "after line 3" in message
    path.write_bytes(b"not compressed at all")
    assert "after line 0" in skipping(path)[1][0]
    path.write_bytes(b"")
    assert "it is empty, which no compressed file is" in skipping(path)[1][0]
    damaged = bytearray(compress(lines(MANY)))
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    assert len(skipping(path)[1]) == 1


def test_windows_up_to_two_gigabytes(tmp_path, monkeypatch):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "reddit.jsonl.zst"
    path.write_bytes(compressor.compress(lines(MANY)) + compressor.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size > 1 << 27  # the library's own limit
    assert contents(path) == MANY
    monkeypatch.setattr(compression, "LARGEST_WINDOW", 1 << 20)
    with pytest.raises(ValueError, match=r"window is larger than 1048576 bytes, .* zstd --long=31 or less"):
        read(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_is_one_problem_and_needs_little_memory(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(json_files, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(json_files, "LONGEST_SKIP", 1 << 25)
    compress = COMPRESS[suffix]
    zeros = compress(bytes(1 << 22))
    path = tmp_path / f"bomb.jsonl.{suffix}"
    path.write_bytes(compress(lines(TEXTS)) + zeros + compress(b"\n" + lines(TEXTS)) + zeros * 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    texts, messages = skipping(path)
    assert texts == TEXTS + TEXTS
    assert "line 4 is longer than 1048576 bytes" in messages[0]
    assert "line 8 is longer than 34603008 bytes; it and what follows it cannot be read" in messages[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
