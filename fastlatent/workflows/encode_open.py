"""Images or videos: which of the two an encode is of."""

from __future__ import annotations

from fastlatent.config import EncodeConfig
from fastlatent.config.encode import VIDEO_KINDS
from fastlatent.encoders.video_clips import is_video_model
from fastlatent.workflows.encode_clips import set_up_clips
from fastlatent.workflows.encode_images import set_up_images
from fastlatent.workflows.encode_setup import EncodeSetup


def set_up_encode(config: EncodeConfig) -> EncodeSetup:
    """Open and choose everything. Of clips where there is a teacher, an autoencoder of videos or a --kind of videos.

    Raises:
        ValueError: the source, the encoder or a setting cannot be used as asked.
    """
    if config.vae is None or config.kind in VIDEO_KINDS or is_video_model(config.vae):
        return set_up_clips(config)
    return set_up_images(config)
