"""Latent caches of other projects, read and written; one module per format.

A format's module has
    TITLE      whose it is and how it looks, for `--help` and messages
    PAYLOADS   what it can hold, the first that a dataset can give counts: "moments", "latents" (means of moments,
               where that is what a dataset has), "tokens"; empty where nothing is written
    SCALING    (factor, shift) of the values, stored = (raw - shift) * factor; (1, 0) where they are raw; None where
               files do not tell
    DTYPE      if the format has one dtype only; ROUNDING, if reading does not give what was written bit for bit;
               renamed(key), if a key of another dataset changes (all three may be left out)
    claims(files, found) -> int           how many of the files are of this format; it looks into a few at most
    open_cache(files, found, told) -> Cache      (fastlatent.caches.cache)
    write(outgoing, out) -> Iterator[int]        (fastlatent.caches.outgoing)
and is named in `fastlatent.caches.formats`. Nothing is unpickled but what torch.load(weights_only=True) takes, and
nothing is allocated because a header claims it.
"""
