"""Latent caches of other projects, read and written; one module per format.

A format's module has
    TITLE      whose it is and how it looks, for `--help` and messages
    PAYLOADS   what it can hold, the first that a dataset can give counts: "moments", "latents" (means of moments,
               where that is what a dataset has), "tokens"; empty where nothing is written
    SCALING    (factor, shift) of the values, stored = (raw - shift) * factor; (1, 0) where they are raw; None where
               files do not tell
    claims(files, found) -> int           how many of the files are of this format; it looks into a few at most
    open_cache(files, found, told) -> Cache      (fastlatent.caches.cache)
    write(outgoing, out) -> Iterator[int]        (fastlatent.caches.outgoing)
and may have
    DTYPE      the only dtype that it writes
    WRITES     (factor, shift) that is written where SCALING is None
    ROUNDING   relative error of what is read after it was written; else it is equal bit for bit
    EXTRAS     names of the further tensors that it writes of any dataset, None for all; else none, but its own again
    NUMBERED   True where rows are read again by their numbers, not their keys
    renamed(key) -> str                   the key that a row of another dataset is read again by
It is named in `fastlatent.caches.formats`. Nothing is unpickled but what torch.load(weights_only=True) takes, and
nothing is allocated because a header claims it.
"""
