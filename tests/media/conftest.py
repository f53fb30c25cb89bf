import pytest
from every_decoder import decoder_of
from toy_videos import make_video

from fastlatent.media.video_decoders import NAMES


@pytest.fixture(params=NAMES)
def decoder(request):
    found = decoder_of(request.param)
    return pytest.skip(found) if isinstance(found, str) else found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def make(folder):
    """(the file's bytes, the frames that went in), made once a module."""
    made = {}

    def make(suffix, **options):
        key = f"{suffix} {sorted(options.items())}"
        if key not in made:
            path = folder / f"{len(made)}{suffix}"
            made[key] = (make_video(path, **options), path.read_bytes())
        return made[key][::-1]

    return make
