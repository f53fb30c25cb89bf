"""Damage in the middle of Matroska files, which FFmpeg passes over in silence."""

import pytest
from toy_videos import make_video

from fastlatent.media.matroska import damaged_at, segment_end
from fastlatent.media.video_decoders import open_video_decoder
from fastlatent.media.video_error import VideoError

SEGMENT, CLUSTER = bytes.fromhex("18538067"), bytes.fromhex("1f43b675")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two clusters, each of 12 frames and of sound."""
    path = tmp_path_factory.mktemp("matroska") / "a.webm"
    make_video(path, audio=True)
    return path.read_bytes()


@pytest.fixture(scope="module")
def decoder():
    return open_video_decoder("pyav")


def test_sound_files(sound, tmp_path):
    make_video(tmp_path / "a.mkv", options={"bf": "2"})  # groups of blocks, with references
    for data in (sound, (tmp_path / "a.mkv").read_bytes()):
        assert damaged_at(data) is None and segment_end(data) == len(data)
        assert damaged_at(data + b"more") is None  # behind the segment
    for text in (b"", b"\x1a", b"RIFF1234AVI ", bytes(64)):
        assert damaged_at(text) is None and segment_end(text) is None


def test_damage_is_found_where_the_frames_go_missing(sound, decoder):
    first = sound.index(CLUSTER)
    for begin, length in ((first + 200, 300), (len(sound) // 2, 200), (first, 4)):  # in the first, any, its very id
        spoilt = sound[:begin] + bytes(length) + sound[begin + length :]
        place = damaged_at(spoilt)
        assert place is not None and first <= place <= begin + length
        with pytest.raises(VideoError, match=rf"damaged at byte {place} of {len(sound)}"):
            decoder.open(spoilt)


def test_what_was_recorded_live_is_taken(sound):
    """Its segment, or its clusters, do not say how long they are."""
    first = sound.index(CLUSTER) + 4
    assert sound[first] >> 6 == 1  # the cluster's size is in 2 bytes, the segment's in 8
    assert damaged_at(sound[:first] + b"\x7f\xff" + sound[first + 2 :]) is None
    whole = sound.index(SEGMENT) + 4
    assert sound[whole] == 1
    assert segment_end(sound[:whole] + b"\x01" + b"\xff" * 7 + sound[whole + 8 :]) is None
